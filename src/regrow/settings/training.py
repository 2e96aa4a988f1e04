"""How the skill is regrown."""

from typing import Literal

from pydantic import Field

from regrow.settings.base import Count, MixtureRule, Section, Share


class Training(Section):
    """LoRA training: recovery, and the steps between cuts."""

    steps: int = Field(default=400, ge=0, description="Optimizer steps, those between cuts included.")
    batch_size: Count = Field(default=8, description="Sequences in a forward pass, of all processes together.")
    accumulate: Count = Field(default=1, description="Forward passes in an optimizer step.")
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak learning rate of AdamW; null: by `learning_rate_rule`."
    )
    learning_rate_rule: Literal["sqrt-width", "width"] = Field(
        default="sqrt-width",
        description="sqrt-width: 3e-4 · sqrt(4096 / hidden_size). width: 1e-4 · 4096 / hidden_size, as μP does.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Learning rate after warm-up."
    )
    warm_up: Share = Field(default=0.03, description="Share of the steps over which the learning rate rises.")
    beta2: float = Field(
        default=0.999, gt=0, lt=1, description="AdamW's decay of squared gradients; lower suits short trainings."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    clip: float = Field(default=1.0, gt=0, description="Largest norm of the gradient.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="bfloat16 autocast: on GPUs that have it (auto), everywhere (bfloat16) or nowhere (float32). "
        "Without it the weights' own dtype is computed in: float32 on a CPU, on a GPU as the checkpoint is stored.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none",
        description="How the frozen weights of the decoder layers' linears are kept while the model is scored and "
        "trained, by bitsandbytes (pip install 'regrow[quant]'): in 8 bits, in 4 (removed units then stay behind "
        "closed gates), or as they are. Plan and adapters are applied to the original weights; see original_share.",
    )
    original_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="With a quantization: share of the steps, the last ones, that train on the original weights, "
        "brought layer by layer from the checkpoint's files (see offload). Until then removed units stay behind closed "
        "gates. If not 0, scores measured before training, a refit and a cached teacher use them, too. null: 0.5 with "
        "nf4; with int8 where there is a refit (compensation.method=least-squares); else 0.",
    )
    offload: Literal["none", "cpu", "disk", "shards"] = Field(
        default="none",
        description="Where the frozen matrices of the decoder layers lie when they are not computed with: on the "
        "device, in the host's memory (cpu), in the checkpoint's files (disk), or in equal parts on the devices of "
        "several processes (shards). They are brought layer by layer, which takes time; gradient_checkpointing is "
        "then on, and refits go into the adapters.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, more time."
    )
    check_memory: bool = Field(
        default=True,
        description="Refuse a run whose memory, by a coarse estimate, is more than what is free; false: only say so.",
    )
    deterministic: bool = Field(
        default=False,
        description="On CUDA, take algorithms that give the same bits every time, where torch has them (for attention "
        "in float32 it has none).",
    )
    eval_interval: Count = Field(default=50, description="Steps between validation losses; the best adapters are kept.")
    checkpoint_interval: Count | None = Field(
        default=None, description="Steps between checkpoints that an interrupted run goes on from; null: eval_interval."
    )
    eval_windows: Count = Field(default=32, description="Held-out windows of each source in a validation loss.")
    patience: int = Field(
        default=0, ge=0, description="Stop after so many validations without a better loss; 0: never."
    )
    max_skipped: Count = Field(
        default=10, description="Stop with an error after so many updates in a row were not finite."
    )

    @property
    def steps_between_checkpoints(self) -> int:
        """As said, or as often as the validation loss is measured."""
        return self.checkpoint_interval or self.eval_interval

    @property
    def quantized(self) -> bool:
        """Whether the base is kept in fewer bits, and so cannot be written to."""
        return self.quantization != "none"

    @property
    def ends_on_originals(self) -> bool:
        """Whether the last steps train on the weights that the base was quantised from."""
        return self.quantized and bool(self.original_share)

    @property
    def offloaded(self) -> bool:
        """Whether the base lies elsewhere, and so cannot be written to."""
        return self.offload != "none"

    @property
    def offload_alone(self) -> str:
        """Where the base lies once the other processes have gone."""
        return "disk" if self.offload == "shards" else self.offload


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
    teacher_dtype: Literal["auto", "float32", "bfloat16", "int8", "nf4"] = Field(
        default="auto",
        description="How a second copy is kept; auto: as the model that is pruned. int8, nf4: the linears of its "
        "decoder layers by bitsandbytes (pip install 'regrow[quant]').",
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
        "case near the initial shares, of losses above what a scaling law foretells (DRPruning).",
    )
    interval: Count = Field(default=50, description="Optimizer steps in a round.")
    floor: Share | None = Field(
        default=None,
        description="Least share of a source: of its initial share (degradation); of its reference share, which begins "
        "there and moves within half and twice of it (drpruning); of all spread evenly (sheared); null: 0.3, 0.2 and "
        "0.0001.",
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
