"""The progressive loop's other half: choose units by their scores, let them fade, cut them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from regrow.criteria.registry import find_criterion
from regrow.data.tokens import Batch
from regrow.planning.allocation import choose
from regrow.planning.plan import Plan
from regrow.planning.schedule import cut_events
from regrow.recipe import Recipe
from regrow.recovery.learner import Learner
from regrow.recovery.scoring import Scorer
from regrow.structure.cut import cut
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups


@dataclass(frozen=True)
class CutEvent:
    """What one event decided."""

    step: int
    fraction: float
    """Of the way to the target."""
    plan: Plan
    scores: dict[str, torch.Tensor]
    """One per original unit, as they were when the plan was made."""


class Pruner:
    """Carries a model along the recipe's schedule from whole to its final plan."""

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Groups,
        recipe: Recipe,
        learner: Learner,
        calibration: Iterator[Batch],
        on_event: Callable[[CutEvent], None] = lambda event: None,
        cut_early: bool = True,
    ) -> None:
        """Take charge of a LoRA-wrapped model.

        Args:
            groups: of the whole model, adapters attached.
            calibration: batches to score before training.
            cut_early: False keeps removed units behind closed gates until `finish`; same result, no gain.
        """
        self.model = model
        self.pruning = recipe.pruning
        self.learner = learner
        self.calibration = calibration
        self.on_event = on_event
        self.cut_early = cut_early
        self.original = groups
        self.groups = groups
        self.plan = Plan.whole(groups)
        """What the model's gates and tensors will be once everything chosen has faded."""
        self.cut_plan = self.plan
        """What its tensors are."""
        self.settled_plan = self.plan
        """What it computes as, apart from units that still fade: its tensors, and (not cutting early) closed gates."""
        self.gates = Gates(model, groups.groups)
        self.events = cut_events(self.pruning, recipe.training.steps)
        self.last_event = max(self.events)
        criterion = find_criterion(self.pruning.criterion)
        self.scorer = Scorer(model, self.plan, self.gates, criterion, self.pruning.ema, recipe.seed)
        self._chosen_at = 0
        self._reached = False

    def __enter__(self) -> "Pruner":
        self.gates.__enter__()
        self.scorer.watch(self.groups)
        return self

    def __exit__(self, *_: object) -> None:
        self.gates.__exit__()
        self.scorer.close()

    @property
    def finished(self) -> bool:
        """Whether the target is reached, in the tensors or (not cutting early) by closed gates."""
        return self._reached and self.settled_plan == self.plan

    def calibrate(self, on_batch: Callable[[], None] = lambda: None) -> None:
        """Score `calibration_batches` without training. At least once if the first cut comes before any step."""
        count = self.pruning.calibration_batches
        if not self.scorer.criterion.needs:
            count = min(count, 1)
        for _ in range(max(count, 1 if 0 in self.events else 0)):
            fine = not self.scorer.criterion.needs or self._measure()
            self.learner.count(skipped=not (fine and self._score()))
            self.learner.optimizer.zero_grad(set_to_none=True)
            on_batch()

    def _measure(self) -> bool:
        loss = self.learner.backward(self.calibration, self.scorer.recording)
        norm = torch.nn.utils.clip_grad_norm_(self.learner.parameters, self.learner.training.clip)
        return math.isfinite(loss) and bool(torch.isfinite(norm))

    def _score(self) -> bool:
        return self.scorer.update(self.groups, self.cut_plan, self.plan)

    def before_step(self, step: int) -> None:
        """Whatever the schedule asks for before optimizer step `step` (0-based)."""
        if self.finished:
            return
        if step in self.events:
            self._choose(step, self.events[step])
        if self.plan != self.settled_plan:
            faded = self.pruning.decay_steps == 0 or step - self._chosen_at >= self.pruning.decay_steps
            if faded:
                self.settle()
            else:
                self._fade(1 - (step - self._chosen_at) / self.pruning.decay_steps)

    def train_step(self) -> float:
        """One optimizer step, scored as long as there is something to choose. Returns the loss."""
        if self._reached:
            return self.learner.step().loss
        return self.learner.step(self.scorer.recording, self._score).loss

    def settle(self) -> None:
        """Let what has been chosen and still fades go at once: cut it, or (not cutting early) close its gates."""
        if self.plan == self.settled_plan:
            return
        if self.cut_early:
            self._cut()
        else:
            self._fade(0.0)
            self.settled_plan = self.plan

    def finish(self) -> None:
        """Cut whatever has been chosen and is still there."""
        if self.plan != self.cut_plan:
            self._cut()

    def _choose(self, step: int, fraction: float) -> None:
        self.settle()
        scores = self.scorer.average.scores
        self.plan = choose(self.original, self.plan, scores, self.pruning, fraction)
        self._chosen_at = step
        self._reached = step == self.last_event
        self.on_event(CutEvent(step, fraction, self.plan, scores))
        if self._reached:
            self.scorer.close()

    def _fade(self, value: float) -> None:
        for name, group in self.plan.groups.items():
            present = torch.tensor(self.cut_plan.groups[name].keep)
            stays = torch.isin(present, torch.tensor(group.keep))
            fades = torch.isin(present, torch.tensor(self.settled_plan.groups[name].keep))
            self.gates.set(name, torch.where(stays, 1.0, torch.where(fades, value, 0.0)))

    def _cut(self) -> None:
        self.learner.objective.before_change()
        self.groups = cut(self.model, self.groups, self.plan.positions_within(self.cut_plan), self.learner.optimizer)
        self.learner.objective.layer_numbers = [layer.number for layer in self.groups.layers]
        self.cut_plan = self.settled_plan = self.plan
        self.gates.rebuild(self.groups.groups, {group.name: torch.ones(group.units) for group in self.groups})
        if not self._reached:
            self.scorer.watch(self.groups)
