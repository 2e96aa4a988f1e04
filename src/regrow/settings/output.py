"""What is measured, and how the checkpoint is stored."""

from typing import Literal

from pydantic import Field

from regrow.settings.base import Bos, Count, Length, Section


class Evaluation(Section):
    """What is measured, of the dense and of the pruned model alike."""

    windows: tuple[Length, ...] = Field(
        default=(256,), min_length=1, description="Perplexity's window lengths; 128 and 2048 are the literature's."
    )
    bos: Bos = Field(default="document", description="Where BOS goes in the text evaluated.")
    max_windows: Count | None = Field(
        default=None, description="Evaluate at most so many windows; null: all of the text."
    )
    speed: bool = Field(default=True, description="Measure prefill and decode speed.")
    speed_batches: tuple[Count, ...] = Field(default=(1, 4), min_length=1, description="Batch sizes for the speed.")
    memory: bool = Field(default=True, description="Measure peak memory, each checkpoint in a process of its own.")
    tasks: tuple[str, ...] = Field(
        default=(),
        description="Zero-shot tasks, by lm-evaluation-harness (pip install 'regrow[eval]'): its names (boolq, piqa, "
        "hellaswag, winogrande, arc-e, arc-c, openbookqa, …), a task's .yaml file, or a .jsonl file of records with "
        "query, choices and gold (or context_options, continuation and gold; context and continuation).",
    )
    task_limit: Count | None = Field(default=None, description="Use the first so many items of each task; null: all.")
    prompts: tuple[str, ...] = Field(
        default=(), description="Prompts that all models complete, side by side in the report; see `completions`."
    )
    completions: int = Field(
        default=3, ge=0, description="Without `prompts`: complete the starts of so many held-out documents; 0: none."
    )


class Output(Section):
    """The checkpoint."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: as the original checkpoint."
    )
    shard_size: str = Field(
        default="5GB",
        pattern="^([0-9]*[1-9][0-9]*([.][0-9]+)?|0+[.][0-9]*[1-9][0-9]*)[KMGT]B$",
        description="Largest size of a safetensors file (above zero), for example 5GB.",
    )
    keep_adapter: bool = Field(
        default=False,
        description="Leave, beside the merged model/, also base/ (pruned and refitted, not merged) and adapter/, a "
        "PEFT folder that goes on it.",
    )
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        default="none",
        description="Where losses, sparsity, learning rate and data weights also go while a run trains, by way of "
        "accelerate: TensorBoard files in the run's folder (tracker/), or a project named regrow. Its package must be "
        "installed (tensorboard or tensorboardX, wandb, trackio).",
    )
