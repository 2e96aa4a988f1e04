"""The sections of a recipe.

Every field documents itself once; that text is what `regrow recipes --explain` and the docs show.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]
TrialShare = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=2)]


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """Text: where it comes from and how it is cut into windows."""

    source: str | None = Field(
        default=None,
        description="Text to score and train on: a .txt, .jsonl, .json or .parquet file, or a data set on the hub.",
    )
    eval_source: str | None = Field(
        default=None, description="Text to evaluate on; without it, documents held out of `source`."
    )
    text_field: str = Field(default="text", description="The field of a record that holds its text.")
    held_out: float = Field(
        default=0.05, gt=0, lt=0.5, description="Share of the documents of `source` held out for the validation loss."
    )
    sequence_length: int = Field(default=256, ge=8, description="Tokens in a training window.")
    bos: Literal["document", "once", "none"] = Field(
        default="document",
        description="Where the tokenizer's BOS goes: before each document, once at the start of the text, nowhere.",
    )
    max_tokens: Count | None = Field(
        default=None, description="Read at most this many tokens of `source`; by default what the run can use."
    )


class Lora(Section):
    """The adapters that regrow the skill."""

    rank: Count = Field(default=8, description="Rank r of the factors.")
    alpha: float = Field(default=16, gt=0, description="The adapter's output is scaled by alpha / rank.")
    dropout: Share = Field(default=0.05, description="Dropout on the adapter's input.")
    targets: tuple[str, ...] = Field(
        default=(), description="Last parts of the names of the linears to adapt; empty: all linears of the blocks."
    )


class Pruning(Section):
    """What is removed, by which measure, and when."""

    sparsity: float = Field(default=0.5, gt=0, lt=1, description="Share to remove.")
    basis: Literal["block", "units", "total"] = Field(
        default="block",
        description="What the share is of: parameters of the blocks, units of each kind, or all parameters.",
    )
    shape: Literal["uniform", "free"] = Field(
        default="uniform",
        description="uniform: every layer keeps the same widths, loads everywhere. free: each layer its own.",
    )
    criterion: str = Field(default="gate-fisher", description="What a unit is worth: a name, or FILE.py:FUNCTION.")
    allocation: Literal["local", "global", "curves"] = Field(
        default="local",
        description="local: the same share in every layer. global: lowest score per parameter first, across layers. "
        "curves: least damage per parameter first, as analysis.enabled has measured it of each layer.",
    )
    floor: Share = Field(default=0.0, description="Least share of a group's units that stays (one unit always does).")
    cap: float = Field(default=1.0, gt=0, le=1, description="Largest share of a group's units that may go.")
    multiple: Count = Field(default=1, description="FFN widths are multiples of this.")
    protect_first: Share = Field(
        default=0.0, description="Share of the layers, from the first, that is left alone (free shape only)."
    )
    protect_last: int = Field(
        default=0, ge=0, description="Number of last layers that are left alone (free shape only)."
    )
    schedule: Literal["one-shot", "cubic"] = Field(
        default="one-shot", description="one-shot: everything before training. cubic: step by step during training."
    )
    warm_up: Share = Field(default=0.1, description="cubic: share of the steps before the first cut.")
    cool_down: Share = Field(default=0.1, description="cubic: share of the steps after the last cut.")
    interval: Count = Field(default=10, description="cubic: optimizer steps between cuts.")
    decay_steps: int = Field(
        default=0, ge=0, description="Steps over which a chosen unit's gate fades from 1 to 0 before it is cut."
    )
    calibration_batches: int = Field(default=16, ge=0, description="Batches scored before the first training step.")
    ema: float | None = Field(
        default=0.9, ge=0, lt=1, description="Decay of the scores' moving average; null: plain mean."
    )


class Analysis(Section):
    """How sensitive each layer is, measured before anything is cut."""

    enabled: bool = Field(
        default=False, description="Prune each group alone, measure how the loss rises, and let the plan know."
    )
    criterion: str = Field(default="gate-fisher", description="Which units go in a trial: a name, or FILE.py:FUNCTION.")
    shares: tuple[TrialShare, ...] = Field(
        default=(0.25, 0.5), min_length=1, description="Shares of a group's units to remove in turn."
    )
    windows: Count = Field(
        default=32, description="Windows of held-out text to measure on; in a run at most training.eval_windows."
    )
    protect: Share = Field(
        default=0.15,
        description="Most groups to leave alone, as a share of all, if they are far more sensitive than the rest "
        "(free shape only).",
    )
    from_file: str | None = Field(
        default=None, description="A sensitivity.json of this model, to use instead of measuring."
    )


class Training(Section):
    """LoRA training: recovery, and the steps between cuts."""

    steps: int = Field(default=400, ge=0, description="Optimizer steps, those between cuts included.")
    batch_size: Count = Field(default=8, description="Sequences in a forward pass.")
    accumulate: Count = Field(default=1, description="Forward passes in an optimizer step.")
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak learning rate of AdamW; null: 3e-4 · sqrt(4096 / hidden_size)."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Learning rate after warm-up."
    )
    warm_up: Share = Field(default=0.03, description="Share of the steps over which the learning rate rises.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    clip: float = Field(default=1.0, gt=0, description="Largest norm of the gradient.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 autocast on hardware that has it, else float32."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, more time."
    )
    eval_interval: Count = Field(default=50, description="Steps between validation losses; the best adapters are kept.")
    eval_windows: Count = Field(default=32, description="Windows of held-out text in a validation loss.")
    patience: int = Field(
        default=0, ge=0, description="Stop after so many validations without a better loss; 0: never."
    )
    max_skipped: Count = Field(
        default=10, description="Stop with an error after so many updates in a row were not finite."
    )


class Evaluation(Section):
    """What is measured, of the dense and of the pruned model alike."""

    windows: tuple[Length, ...] = Field(
        default=(256,), min_length=1, description="Perplexity's window lengths; 128 and 2048 are the literature's."
    )
    bos: Literal["document", "once", "none"] = Field(
        default="document", description="Where BOS goes in the text evaluated."
    )
    max_windows: Count | None = Field(
        default=None, description="Evaluate at most so many windows; null: all of the text."
    )
    speed: bool = Field(default=True, description="Measure prefill and decode speed.")
    speed_batches: tuple[Count, ...] = Field(default=(1, 4), min_length=1, description="Batch sizes for the speed.")
    memory: bool = Field(default=True, description="Measure peak memory, each checkpoint in a process of its own.")
    prompts: tuple[str, ...] = Field(
        default=(), description="Prompts to complete; by default the start of a held-out document."
    )


class Output(Section):
    """The checkpoint."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: as the original checkpoint."
    )
    shard_size: str = Field(
        default="5GB",
        pattern=r"^\d+(\.\d+)?[KMGT]B$",
        description="Largest size of a safetensors file, for example 5GB.",
    )
