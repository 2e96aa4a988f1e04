"""The sections of a recipe.

Every field documents itself once; that text is what `regrow recipes --explain` and the docs show.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=2)]
Stage = Literal["pretrain", "instruct"]
MixtureRule = Literal["fixed", "degradation", "sheared", "drpruning"]


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextSource(Section):
    """One of several sources of text."""

    name: str = Field(description="What reports call it.")
    source: str = Field(description="A file or a data set on the hub, as `data.source`.")
    text_field: str = Field(default="text", description="pretrain: the field of a record that holds its text.")
    weight: float = Field(
        default=1.0, gt=0, description="What it contributes at first, relative to the other sources of its stage."
    )
    stage: Stage = Field(
        default="pretrain",
        description="pretrain: text. instruct: records with instruction, input and output, or with messages; trained "
        "on after the text, responses only.",
    )


class Data(Section):
    """Text: where it comes from and how it is cut into windows."""

    source: str | None = Field(
        default=None,
        description="Text to score and train on: a .txt, .jsonl, .json or .parquet file, or a data set on the hub.",
    )
    sources: tuple[TextSource, ...] = Field(
        default=(),
        description="Several sources in place of `source`: a list of {name, source, text_field, weight, stage}; scored "
        "and evaluated on are those of stage pretrain.",
    )
    instructions: str | None = Field(
        default=None,
        description="Instructions to train on after the text, responses only: a .jsonl, .json or .parquet file or a "
        "data set on the hub, of records with instruction, input and output, or with messages.",
    )
    template: Literal["auto", "alpaca", "chat"] = Field(
        default="auto",
        description="How instructions become text. alpaca: the Alpaca prompt. chat: the tokenizer's chat template. "
        "auto: chat if the tokenizer has one.",
    )
    eval_source: str | None = Field(
        default=None, description="Text to evaluate on; without it, documents held out of `source`."
    )
    text_field: str = Field(default="text", description="The field of a record that holds its text.")
    held_out: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="Share of the documents of each source held out for the validation loss.",
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
    allocation: Literal["local", "global"] = Field(
        default="local",
        description="local: the same share in every layer. global: lowest score per parameter first, across layers.",
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
    eval_windows: Count = Field(default=32, description="Held-out windows of each source in a validation loss.")
    patience: int = Field(
        default=0, ge=0, description="Stop after so many validations without a better loss; 0: never."
    )
    max_skipped: Count = Field(
        default=10, description="Stop with an error after so many updates in a row were not finite."
    )


class Recovery(Section):
    """What is trained on when: stages, and the shares of several sources.

    Training goes in rounds; before each, the held-out loss on every source is measured. Degradation is that loss minus
    the dense model's.
    """

    mixture: MixtureRule = Field(
        default="fixed",
        description="How the sources' shares follow their degradation. fixed: not at all. degradation: more of what "
        "has degraded more (LoRAShear). sheared: multiplied up round by round (Sheared-LLaMA). drpruning: the worst "
        "case near the initial shares (DRPruning).",
    )
    interval: Count = Field(default=50, description="Optimizer steps in a round.")
    floor: Share | None = Field(
        default=None,
        description="Least share of a source: of its initial share (degradation, drpruning), or of all spread evenly "
        "(sheared); null: 0.3, 0.2 and 0.0001.",
    )
    tolerance: Share = Field(
        default=0.0,
        description="End a stage when a round lowers the mean degradation by less than this share of it; 0: never.",
    )
    max_rounds: Count | None = Field(
        default=None, description="End a stage after so many rounds with everything cut; null: when its steps are done."
    )
    instruct_share: float = Field(
        default=0.25, gt=0, lt=1, description="Share of the steps, the last ones, that train on instructions, if any."
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
