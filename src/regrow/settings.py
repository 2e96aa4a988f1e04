"""The sections of a recipe.

Every field documents itself once; that text is what `regrow recipes --explain` and the docs show.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]
TrialShare = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=2)]
Stage = Literal["pretrain", "instruct"]
MixtureRule = Literal["fixed", "degradation", "sheared", "drpruning"]


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextSource(Section):
    """One of several sources of text."""

    name: str = Field(min_length=1, description="What reports call it.")
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
        description="Text to score and train on: a .txt, .jsonl, .json or .parquet file, or a data set on the hub; "
        "null: text that the model writes itself (see `generate`).",
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


class Generate(Section):
    """Text that the model writes itself, when `data.source` gives none."""

    tokens: Count = Field(
        default=200_000, description="Tokens to write at most, dropped texts included; fewer if the run needs fewer."
    )
    length: Length = Field(
        default=256, description="Tokens of a text at most, its start token included; the model may end it earlier."
    )
    prefix_tokens: Count = Field(
        default=2, description="First tokens of a text, sampled from the model as it is, so that texts differ."
    )
    temperature: float = Field(default=0.7, gt=0, description="Of the tokens after the prefix.")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Sample among the likeliest tokens of this much mass.")
    top_k: Count = Field(default=50, description="Sample among at most so many tokens.")
    repetition_penalty: float = Field(
        default=1.1, gt=0, description="Divides the logits of tokens that the text already has; 1: none."
    )
    drop: Share = Field(default=0.2, description="Share of the texts to drop: those that surprise the model most.")
    batch_size: Count = Field(default=16, description="Texts written at once.")


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
    target: str | None = Field(
        default=None,
        description="What the result shall be, instead of a sparsity, which (of the blocks' parameters) then follows: "
        "params=2.0B, size=3GB, speedup=1.6x, perplexity=+5% (of the dense model's) or perplexity=6.5.",
    )
    target_trials: Count = Field(
        default=4, description="Target perplexity: trainings, each at another sparsity, to find the smallest model."
    )
    speed_phase: Literal["prefill", "decode"] = Field(
        default="decode",
        description="Target speedup: of writing on token by token, or of reading a prompt; one text at a time.",
    )
    basis: Literal["block", "units", "total"] = Field(
        default="block",
        description="What the share is of: parameters of the blocks, units of each kind, or all parameters.",
    )
    shape: Literal["uniform", "free"] = Field(
        default="uniform",
        description="uniform: every layer keeps the same widths, loads everywhere. free: each layer its own.",
    )
    kinds: tuple[Literal["attention", "ffn", "layer"], ...] = Field(
        default=("attention", "ffn"),
        min_length=1,
        description="What may go. attention: KV heads with their query heads. ffn: channels. layer: whole layers, as "
        "many as do least damage; alone, the fewest that reach the target.",
    )
    criterion: str = Field(default="gate-fisher", description="What a unit is worth: a name, or FILE.py:FUNCTION.")
    allocation: Literal["local", "global", "by-kind", "curves"] = Field(
        default="local",
        description="local: the same share in every layer. global: lowest score per parameter first, across layers. "
        "by-kind: the same share of heads as of channels, in each kind the lowest score first, across layers. "
        "curves: least damage per parameter first, as analysis.enabled has measured it of each layer.",
    )
    floor: Share = Field(
        default=0.0, description="Least share of a group's units, and of the layers, that stays (one always does)."
    )
    cap: float = Field(
        default=1.0, gt=0, le=1, description="Largest share of a group's units, and of the layers, that may go."
    )
    multiple: Count = Field(default=1, description="FFN widths are multiples of this.")
    protect_first: Share = Field(
        default=0.0,
        description="Share of the layers, from the first, that is left alone (uniform: is not removed whole).",
    )
    protect_last: int = Field(
        default=0,
        ge=0,
        description="Number of last layers that are left alone (uniform: are not removed whole).",
    )
    schedule: Literal["one-shot", "cubic", "lhspg"] = Field(
        default="one-shot",
        description="one-shot: everything before training. cubic: step by step during training. lhspg: in periods, "
        "the units chosen at the start of one fading to nothing until its end (LoRAShear).",
    )
    warm_up: Share = Field(default=0.1, description="cubic, lhspg: share of the steps before the first choice.")
    cool_down: Share = Field(default=0.1, description="cubic, lhspg: share of the steps after the last cut.")
    interval: Count = Field(default=10, description="cubic: optimizer steps between cuts.")
    periods: Count = Field(
        default=5, description="lhspg: periods between warm-up and cool-down; each takes the same share of the units."
    )
    epsilon: Share = Field(
        default=0.0,
        description="lhspg: a fading unit is zero at once when less than this share of it is left along its own "
        "direction after one step (half-space projection).",
    )
    decay_steps: int = Field(
        default=0,
        ge=0,
        description="one-shot, cubic: steps over which a chosen unit's gate fades from 1 to 0 before it is cut.",
    )
    calibration_batches: int = Field(default=16, ge=0, description="Batches scored before the first training step.")
    ema: float | None = Field(
        default=0.9, ge=0, lt=1, description="Decay of the scores' moving average; null: plain mean."
    )


class Compensation(Section):
    """What the units that stay take over of those that go, before anything is trained."""

    method: Literal["none", "bias", "least-squares"] = Field(
        default="none",
        description="least-squares: refit o_proj and down_proj on the inputs kept (and their bias, if they have one). "
        "bias: only the bias, as FLAP. none: plain cut.",
    )
    selection: Literal["criterion", "obs"] = Field(
        default="criterion",
        description="Which units of a group go: those the criterion ranks lowest, or those that a refit can best "
        "make up for (optimal brain surgeon, greedy).",
    )
    damping: float = Field(default=0.01, gt=0, description="Ridge of the refit, as a share of the mean input energy.")
    windows: Count = Field(default=128, description="Training windows that the moments are taken from.")
    rounds: Count = Field(default=16, description="selection obs: in how many rounds a group loses its units.")
    carrier: Literal["base", "adapter"] = Field(
        default="base",
        description="Where the refit goes: into the base weights, or into the adapters' start (low rank; for bases "
        "that cannot be written to).",
    )
    blend: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(0.5, 0.75, 1.0), min_length=1, description="Shares of it tried on held-out text; the best stays."
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


class Search(Section):
    """Better widths than scores alone can tell: candidates of equal size, tried out with their refits in place."""

    evaluations: int = Field(
        default=0,
        ge=0,
        description="Candidates to measure; 0: no search. free shape: exchanges between groups. uniform shape: numbers "
        "of layers, KV heads and channels that reach the target.",
    )
    windows: Count = Field(default=64, description="Training windows that the candidates are refitted on.")
    judge_windows: Count = Field(
        default=16, description="Training windows on which a candidate's divergence from the dense model is measured."
    )
    levels: Count = Field(default=16, description="free shape: steps in which a group may shrink.")


class Training(Section):
    """LoRA training: recovery, and the steps between cuts."""

    steps: int = Field(default=400, ge=0, description="Optimizer steps, those between cuts included.")
    batch_size: Count = Field(default=8, description="Sequences in a forward pass.")
    accumulate: Count = Field(default=1, description="Forward passes in an optimizer step.")
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak learning rate of AdamW; null: by `learning_rate_rule`."
    )
    learning_rate_rule: Literal["sqrt-width", "width"] = Field(
        default="sqrt-width",
        description="sqrt-width: 3e-4 · sqrt(4096 / hidden_size). width: 2e-4 · 4096 / hidden_size, as μP does.",
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


class Distillation(Section):
    """Recovery under a teacher, the model as it was before anything was removed:
    loss = (1 - weight) · cross-entropy + weight · temperature² · KL(teacher ‖ student) + hidden_weight · hidden states.
    """

    weight: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the divergence from the teacher in the loss, the text's own cross-entropy having the "
        "rest; 0: no distillation, 0.7 is a good value.",
    )
    temperature: float = Field(default=1.0, gt=0, description="Both models' logits are divided by it for the KL.")
    teacher: Literal["auto", "self", "model", "cached"] = Field(
        default="auto",
        description="auto: the model's own weights with gates open and adapters off until the first cut, from then on "
        "a second copy. self: never a second copy; removed units stay behind closed gates until training ends. "
        "model: a second copy from the start. cached: the most likely tokens at every position of the training text, "
        "written to disk before training.",
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Precision of a second copy; auto: as the model that is pruned."
    )
    top_k: Count = Field(
        default=64, description="cached: tokens kept at every position; the others' probability is one sum."
    )
    hidden_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the relative squared error of the decoder layers' outputs; not with a cached teacher.",
    )

    @property
    def on(self) -> bool:
        """Whether there is a teacher at all."""
        return self.weight > 0 or self.hidden_weight > 0

    @property
    def needs_whole_weights(self) -> bool:
        """Whether nothing may be cut before training is over."""
        return self.on and self.teacher == "self"


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
