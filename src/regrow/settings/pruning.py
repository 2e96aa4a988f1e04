"""What is removed, and what takes its place."""

from typing import Annotated, Literal

from pydantic import Field

from regrow.settings.base import Count, Section, Share, TrialShare


class Lora(Section):
    """The adapters that regrow the skill."""

    rank: Count = Field(default=8, description="Rank r of the factors.")
    alpha: float = Field(default=16, gt=0, description="The adapter's output is scaled by alpha / rank.")
    dropout: Share = Field(default=0.05, description="Dropout on the adapter's input.")
    targets: tuple[str, ...] = Field(
        default=(),
        description="Last parts of the names of the linears (or experts' weights) to adapt; empty: all of the blocks.",
    )
    expert_rank: int | None = Field(
        default=None,
        ge=0,
        description="Rank of each expert's own factors, in a mixture; null: rank / (experts that a token goes to), at "
        "least 1; 0: experts get none.",
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
    kinds: tuple[Literal["attention", "ffn", "hidden", "expert", "layer"], ...] = Field(
        default=("attention", "ffn"),
        min_length=1,
        description="What may go. attention: KV heads with their query heads. ffn: channels, those inside experts too. "
        "hidden: channels of the residual stream, in all layers alike. expert: whole experts, as many in every layer. "
        "layer: whole layers. Of both, as many as do least damage; alone, the fewest that reach the target.",
    )
    hidden: Share | None = Field(
        default=None,
        description="Share of the hidden channels to remove beside other kinds; null: the share that all kinds lose "
        "alike. Alone, the target decides.",
    )
    criterion: str = Field(default="gate-fisher", description="What a unit is worth: a name, or FILE.py:FUNCTION.")
    allocation: Literal["local", "global", "pooled", "by-kind", "log-increasing", "curves"] = Field(
        default="local",
        description="local: the same share in every layer. global: lowest score per parameter first, across layers. "
        "pooled: lowest score first, whatever the unit costs. by-kind: the same share of heads as of channels, in each "
        "kind the lowest score first, across layers. log-increasing: a share that grows with the logarithm of the "
        "layer's number. curves: least damage per parameter first, as analysis.enabled has measured it of each layer. "
        "In the uniform shape pooled, by-kind and log-increasing are local.",
    )
    first_share: Share = Field(
        default=0.5, description="log-increasing: what the first layer loses, as a share of the sparsity."
    )
    floor: Share = Field(
        default=0.0, description="Least share of a group's units, and of the layers, that stays (one always does)."
    )
    cap: float = Field(
        default=1.0, gt=0, le=1, description="Largest share of a group's units, and of the layers, that may go."
    )
    multiple: Count | None = Field(
        default=None,
        description="FFN and hidden widths: multiples of this. null: in FFNs of 1,024 channels and more of what GPUs "
        "like: 8 to 64, the largest power of two within 1/128 of the width; hidden: of 8.",
    )
    protect_first: Share = Field(
        default=0.0,
        description="Share of the layers, from the first, that is left alone (uniform: is not removed whole).",
    )
    protect_last: int = Field(
        default=0,
        ge=0,
        description="Number of last layers that are left alone (uniform: are not removed whole).",
    )
    schedule: Literal["one-shot", "cubic", "lhspg", "learned-mask"] = Field(
        default="one-shot",
        description="one-shot: everything before training. cubic: step by step during training. lhspg: in periods, "
        "the units chosen at the start of one fading to nothing until its end (LoRAShear). learned-mask: at once, "
        "after masks have been learned beside the adapters (Sheared-LLaMA).",
    )
    warm_up: Share = Field(default=0.1, description="cubic, lhspg: share of the steps before the first choice.")
    cool_down: Share = Field(
        default=0.1, description="cubic, lhspg, learned-mask: share of the steps after the last cut."
    )
    interval: Count = Field(default=10, description="cubic: optimizer steps between cuts.")
    periods: Count = Field(
        default=5, description="lhspg: periods between warm-up and cool-down; each takes the same share of the units."
    )
    epsilon: Share = Field(
        default=0.0,
        description="lhspg: a fading unit is zero at once when less than this share of it is left along its own "
        "direction after one step (half-space projection).",
    )
    ramp: Share = Field(
        default=0.2,
        description="learned-mask: share of the masks' steps over which what they shall remove rises to the target.",
    )
    mask_learning_rate: float = Field(
        default=1.0, gt=0, description="learned-mask: learning rate of log-alphas and multipliers (Adam)."
    )
    decay_steps: int = Field(
        default=0,
        ge=0,
        description="one-shot, cubic: steps over which a chosen unit's gate fades from 1 to 0 before it is cut.",
    )
    calibration_batches: int = Field(default=16, ge=0, description="Batches scored before the first training step.")
    perturbations: Count = Field(
        default=4, description="Criteria without a backward pass: directions tried with each calibration batch."
    )
    labels: Literal["text", "model"] = Field(
        default="text",
        description="What calibration scores are about: predicting the text, or the model's own samples (true Fisher).",
    )
    interactions: float = Field(
        default=0.0,
        ge=0,
        description="Above 1: units go by their joint damage, out of so many times as many (one-shot, gate scores).",
    )
    ema: float | None = Field(
        default=0.9, ge=0, lt=1, description="Decay of the scores' moving average; null: plain mean."
    )

    @property
    def scores_anew(self) -> bool:
        """Whether a choice needs more than scores that were taken before: later ones, or those of every batch."""
        return self.schedule != "one-shot" or self.interactions > 1


class Analysis(Section):
    """How sensitive each layer is, measured before anything is cut."""

    enabled: bool = Field(
        default=False, description="Prune each group alone, measure how the loss rises, and let the plan know."
    )
    criterion: str = Field(default="gate-fisher", description="Which units go in a trial: a name, or FILE.py:FUNCTION.")
    shares: tuple[TrialShare, ...] = Field(
        default=(0.1, 0.25, 0.5, 0.75), min_length=1, description="Shares of a group's units to remove in turn."
    )
    calibration_batches: Count = Field(default=16, description="Batches on which the criterion scores units.")
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
    finalists: Count | None = Field(
        default=None,
        description="uniform shape: so many of the nearest candidates are trained for trial_steps, and the nearest "
        "after that is taken. null: 2 where adapters carry the refit (compensation.carrier=adapter), and the "
        "divergence before training says less; else 1, which saves the training.",
    )
    trial_steps: Count = Field(default=40, description="Optimizer steps of each finalist's training.")


class Compensation(Section):
    """What the units that stay take over of those that go, before anything is trained."""

    method: Literal["none", "bias", "least-squares"] = Field(
        default="none",
        description="least-squares: refit o_proj and down_proj on the inputs kept (and their bias, if they have one). "
        "bias: only the bias, as FLAP; added where the class can have one and the model has not. none: plain cut.",
    )
    selection: Literal["criterion", "prefix", "obs"] = Field(
        default="criterion",
        description="Which units of a group go. criterion: those it ranks lowest. prefix: those it ranks lowest by "
        "what the already pruned groups before give (criteria of inputs, such as wanda). obs: those that a refit can "
        "best make up for (optimal brain surgeon, greedy).",
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

    @property
    def walks(self) -> bool:
        """Whether layers are treated in turn, each on what the pruned ones before it give."""
        return self.method != "none" or self.selection == "prefix"
