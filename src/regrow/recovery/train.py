"""`[score → plan → cut → adapt]*` and recovery: one loop of LoRA steps, the best adapters kept."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from regrow.data.tokens import Windows, batches
from regrow.errors import InputError
from regrow.evaluation.compare import held_out_nll
from regrow.planning.plan import Plan
from regrow.planning.sensitivity import Prior
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.recovery.learner import Learner
from regrow.recovery.pruner import CutEvent, Pruner
from regrow.structure.groups import Groups


@dataclass
class History:
    """What happened during training, for the report."""

    steps: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    cuts: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Best:
    """The adapters with the lowest validation loss since the last cut."""

    loss: float = math.inf
    step: int = 0
    adapters: list[Tensor] = field(default_factory=list)
    waited: int = 0
    """Validations since."""

    def offer(self, loss: float, step: int, learner: Learner) -> None:
        """Take the learner's adapters if their loss is lower."""
        self.waited += 1
        if loss < self.loss:
            self.loss, self.step, self.adapters, self.waited = loss, step, learner.snapshot(), 0


@dataclass(frozen=True)
class Trained:
    """A model that has reached its target and been recovered; adapters still attached."""

    plan: Plan
    groups: Groups
    """As they are now."""
    adapters: dict[str, Tensor]
    """The best ones, by parameter name, on the CPU; the model holds the same."""
    history: History
    summary: dict[str, Any]


def train(
    model: PreTrainedModel,
    groups: Groups,
    recipe: Recipe,
    text: Windows,
    validation: Windows,
    progress: Progress,
    *,
    on_cut: Callable[[CutEvent], None],
    on_validation: Callable[[History], None],
    prior: Prior | None = None,
) -> Trained:
    """Carry a LoRA-wrapped model to its target and recover it.

    Args:
        groups: of the whole model, adapters attached.
        on_cut: sees every plan as it is made.
        on_validation: sees the history whenever it is worth writing down.
        prior: what an analysis has found, for the allocation.

    Raises:
        InputError: if training diverges.
    """
    training = recipe.training
    learner = Learner(model, training, batches(text, training.batch_size, recipe.seed))
    calibration = batches(text, training.batch_size, recipe.seed + 1)
    history, best = History(), Best()

    def record_cut(event: CutEvent) -> None:
        history.cuts.append({"step": event.step, "fraction": event.fraction, **event.plan.sparsity.model_dump()})
        on_cut(event)

    def validate(step: int) -> None:
        loss = held_out_nll(model, validation, training.batch_size)
        history.validations.append({"step": step, "loss": loss})
        best.offer(loss, step, learner)
        on_validation(history)

    with Pruner(model, groups, recipe, learner, calibration, record_cut, prior=prior) as pruner:
        if recipe.pruning.calibration_batches:
            progress.stage("score", recipe.pruning.calibration_batches)
        pruner.calibrate(progress.advance)
        progress.stage("train", training.steps)
        began = time.perf_counter()
        for step in range(training.steps):
            pruner.before_step(step)
            if step % training.eval_interval == 0 and pruner.finished:
                validate(step)
                if training.patience and best.waited >= training.patience:
                    progress.say(f"no better validation loss for {best.waited} validations; stopped at step {step}")
                    break
            loss = pruner.train_step()
            seconds = round(time.perf_counter() - began, 3)
            history.steps.append({"step": step, "loss": loss, "seconds": seconds})
            progress.advance(1, f"loss {loss:.3f} · removed {pruner.cut_plan.sparsity.block:.1%}")
        pruner.before_step(training.steps)
        pruner.finish()
    validate(learner.step_number)
    if not best.adapters:
        raise InputError("the validation loss is not finite; lower training.learning_rate, or check the model")
    learner.restore(best.adapters)
    progress.say(f"best validation loss {best.loss:.4f}, at step {best.step}")

    names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    adapters = dict(zip(names, best.adapters, strict=True))
    return Trained(pruner.plan, pruner.groups, adapters, history, _summary(learner, recipe, text, best))


def _summary(learner: Learner, recipe: Recipe, text: Windows, best: Best) -> dict[str, Any]:
    training = recipe.training
    return {
        "steps": learner.step_number,
        "tokens": learner.step_number * training.batch_size * training.accumulate * text.length,
        "learning_rate": learner.learning_rate,
        "rank": recipe.lora.rank,
        "trainable_parameters_at_the_end": sum(parameter.numel() for parameter in learner.parameters),
        "skipped_updates": learner.skipped,
        "best_step": best.step,
        "best_validation_loss": best.loss,
        "train_windows": len(text),
        "train_sha256": text.sha256,
    }
