"""`[score → plan → cut → adapt]*` and recovery: one loop of LoRA steps, the best adapters kept."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.data.corpus import Corpus
from regrow.errors import InputError
from regrow.evaluation.compare import held_out_nll
from regrow.planning.plan import Plan
from regrow.planning.sensitivity import Prior
from regrow.progress import Progress, Silent
from regrow.recipe import Recipe
from regrow.recovery.distillation import distil
from regrow.recovery.learner import Learner
from regrow.recovery.mixing import DataMix
from regrow.recovery.preparation import Preparation, windows_wanted
from regrow.recovery.pruner import CutEvent, Pruner
from regrow.recovery.scoring import Average
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups


@dataclass
class History:
    """What happened during training, for the report."""

    steps: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    cuts: list[dict[str, float]] = field(default_factory=list)
    mixture: list[dict[str, Any]] = field(default_factory=list)
    """Per round: step, stage, and by source its weight, loss and degradation; empty with a single source."""


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
    """The best ones, by parameter name, and refitted weights; on the CPU. The model holds the same."""
    history: History
    summary: dict[str, Any]


def train(
    model: PreTrainedModel,
    groups: Groups,
    recipe: Recipe,
    corpus: Corpus,
    progress: Progress,
    *,
    teacher_folder: Path,
    on_cut: Callable[[CutEvent], None],
    on_validation: Callable[[History], None],
    scores: Average | None = None,
    prior: Prior | None = None,
) -> Trained:
    """Carry a LoRA-wrapped model to its target and recover it.

    Args:
        groups: of the whole model, adapters attached.
        teacher_folder: where a cached teacher may write; it is gone when training is over.
        on_cut: sees every plan as it is made.
        on_validation: sees the history whenever it is worth writing down.
        scores: as `measure_scores` found them before; by default they are measured here.
        prior: what an analysis has found, for the allocation.

    Raises:
        InputError: if training diverges.
    """
    training = recipe.training
    mix = DataMix(corpus, recipe, lambda windows: held_out_nll(model, windows, training.batch_size))
    learner = Learner(model, training, mix)
    history, best = History(mixture=mix.history), Best()
    mix.remember_dense()

    def record_cut(event: CutEvent) -> None:
        history.cuts.append({"step": event.step, "fraction": event.fraction, **event.plan.sparsity.model_dump()})
        on_cut(event)

    def validate(step: int) -> None:
        loss = mix.validation_loss(step)
        history.validations.append({"step": step, "loss": loss})
        best.offer(loss, step, learner)
        on_validation(history)

    cut_early = not recipe.distillation.needs_whole_weights
    prepare = preparer(model, recipe, corpus, progress)
    with Pruner(
        model, groups, recipe, learner, mix.calibration(), record_cut, cut_early, prepare, scores, prior
    ) as pruner:
        if recipe.pruning.calibration_batches and scores is None:
            progress.stage("score", recipe.pruning.calibration_batches)
        pruner.calibrate(progress.advance)
        if recipe.distillation.on:
            learner.objective = distil(
                recipe.distillation, learner, pruner.gates, corpus.train, teacher_folder, progress
            )
        pruner.before_step(0)
        progress.stage("train", training.steps)
        began = time.perf_counter()
        for step in mix.steps():
            if step:
                pruner.before_step(step)
            mix.before_step(step, pruner.finished)
            if pruner.finished and (step % training.eval_interval == 0 or mix.has_ended(step)):
                validate(step)
                if training.patience and best.waited >= training.patience:
                    progress.say(f"no better validation loss for {best.waited} validations; stopped at step {step}")
                    break
            if mix.has_ended(step):
                progress.say(f"stage {mix.stage.name} has converged; ended at step {step}")
                continue
            learner.step_number = step  # where a stage ended early, the learning rate goes on with the next one's
            loss = pruner.train_step()
            seconds = round(time.perf_counter() - began, 3)
            history.steps.append({"step": step, "loss": loss, **learner.terms, "seconds": seconds})
            progress.advance(1, f"loss {loss:.3f} · removed {pruner.cut_plan.sparsity.block:.1%}")
        learner.objective.close()
        pruner.before_step(training.steps)
        pruner.settle()
        mix.record(learner.step_number)
        validate(learner.step_number)
        if not best.adapters:
            raise InputError("the validation loss is not finite; lower training.learning_rate, or check the model")
        learner.restore(best.adapters)
        pruner.finish()
    progress.say(f"best validation loss {best.loss:.4f}, at step {best.step}")

    names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    adapters = dict(zip(names, learner.snapshot(), strict=True)) | pruner.refitted()
    summary = _summary(learner, recipe, mix, best, len(history.steps))
    if pruner.preparation:
        summary |= {name: value for name, value in vars(pruner.preparation.done).items() if value}
    return Trained(pruner.plan, pruner.groups, adapters, history, summary)


def preparer(
    model: PreTrainedModel, recipe: Recipe, corpus: Corpus, progress: Progress
) -> Callable[[Gates], Preparation] | None:
    """What makes the `Preparation` once there are gates; None if the recipe neither searches nor compensates."""
    if not (wanted := windows_wanted(recipe)):
        return None
    size = recipe.training.batch_size
    batches = list(torch.split(corpus.train.first(wanted).ids_NT, size))
    shown = progress if recipe.pruning.schedule == "one-shot" else Silent()  # else it interrupts the training's bar
    return lambda gates: Preparation(
        model, gates, recipe, batches, lambda: held_out_nll(model, corpus.validation, size), shown
    )


def _summary(learner: Learner, recipe: Recipe, mix: DataMix, best: Best, steps: int) -> dict[str, Any]:
    training, text = recipe.training, mix.corpus.train
    return {
        "steps": steps,
        "tokens": steps * training.batch_size * training.accumulate * text.length,
        "learning_rate": learner.learning_rate,
        "rank": recipe.lora.rank,
        "trainable_parameters_at_the_end": sum(parameter.numel() for parameter in learner.parameters),
        "skipped_updates": learner.skipped,
        "best_step": best.step,
        "best_validation_loss": best.loss,
        "train_windows": len(text),
        "train_sha256": text.sha256,
        **({"distillation": learner.objective.summary()} if recipe.distillation.on else {}),
        **({"mixture": mix.summary()} if mix.in_rounds else {}),
    }
