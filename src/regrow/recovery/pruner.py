"""The progressive loop's other half: choose units by their scores, let them fade, cut them.

With the lhspg schedule a fade takes a period, and a unit may be gone before its end; see `lhspg.py`. With the
learned-mask schedule masks say what goes, which are learned until then; see `masks.py`.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from regrow.checkpoint.state import State, named
from regrow.criteria.registry import find_criterion
from regrow.data.tokens import Batch
from regrow.errors import InputError
from regrow.planning.allocation import choose
from regrow.planning.hidden import removals
from regrow.planning.interactions import least_joint_damage
from regrow.planning.plan import Plan
from regrow.planning.schedule import cut_events, fade_ends
from regrow.planning.sensitivity import Prior
from regrow.recipe import Recipe
from regrow.recovery.average import Average, MeanGradients
from regrow.recovery.learner import Learner, clip_gradients
from regrow.recovery.lhspg import HalfSpace, forget_moments
from regrow.recovery.masks import learned_masks
from regrow.recovery.pooling import gather_samples
from regrow.recovery.preparation import Preparation, Prepared
from regrow.recovery.scoring import Scorer
from regrow.structure.adapters import adapter_parameters
from regrow.structure.cut import cut
from regrow.structure.gates import Gates
from regrow.structure.groups import RESIDUAL, Groups

Timing = Callable[[str], AbstractContextManager[None]]
"""Given a part's name: a context whose time counts for it."""


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
        prepare: Callable[[Gates], Preparation] | None = None,
        scores: Average | None = None,
        prior: Prior | None = None,
        timing: Timing = lambda part: nullcontext(),
    ) -> None:
        """Take charge of a LoRA-wrapped model.

        Args:
            groups: of the whole model, adapters attached.
            calibration: batches to score before training.
            cut_early: False keeps removed units behind closed gates until `finish`; same result, no gain (but an nf4
                base stays as it is).
            prepare: makes what searches and compensates, given the gates; needed if the recipe asks for either.
            scores: what `calibrate` would find, if it has been found before.
            prior: what an analysis has found, for the allocation.
            timing: told of the parts that are no plain training.
        """
        self.model = model
        self.pruning = recipe.pruning
        self.learner = learner
        self.processes = learner.processes
        self.calibration = calibration
        self.on_event = on_event
        self.cut_early = cut_early
        self.prior = prior
        self.timing = timing
        self.original = groups
        self.groups = groups
        self.plan = Plan.whole(groups)
        """What the model's gates and tensors will be once everything chosen has faded."""
        self.cut_plan = self.plan
        """What its tensors are."""
        self.settled_plan = self.plan
        """What it computes as, apart from units that still fade: its tensors, and (not cutting early) closed gates."""
        self.depth = "layer" in self.pruning.kinds
        self.hidden = "hidden" in self.pruning.kinds and len(removals(groups, self.pruning)) > 1
        self.gates = Gates(
            model, groups.groups, groups.layers if self.depth else (), groups.residual if self.hidden else None
        )
        self.events = cut_events(self.pruning, recipe.training.steps)
        self.fade_ends = fade_ends(self.pruning, recipe.training.steps)
        self.last_event = max(self.events)
        self.masks = learned_masks(self.gates, groups, recipe, prior, self.processes)
        criterion = find_criterion(self.pruning.criterion)
        self.scorer = Scorer(
            model, self.plan, self.gates, criterion, self.pruning.ema, recipe.seed, self.depth, self.hidden,
            perturbations=self.pruning.perturbations, processes=self.processes,
            mask=self.masks.present if self.masks else None,
        )  # fmt: skip
        self._late_scores = self.masks is not None or (self.pruning.schedule == "lhspg" and not criterion.needs)
        """Nothing to measure: score when a choice is due, not in every step."""
        self.preparation = prepare(self.gates) if prepare else None
        self._known = scores is not None
        if scores is not None:
            self.scorer.average = copy.deepcopy(scores)
        self._chosen_at = 0
        self._fading: dict[str, torch.Tensor] = {}
        """Which of the units as they are now are between present and gone."""
        self._half_space: HalfSpace | None = None
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
        """Score `calibration_batches` without training. At least once if the first cut comes before any step.

        Nothing is done if the scores were given, or are taken when a choice is due.
        """
        if self._known or self._late_scores:
            return
        count = self.pruning.calibration_batches
        if not self.scorer.criterion.needs:
            count = min(count, 1)
        # What adds up over batches is scored when all are in: over more tokens, and once.
        at_once = bool(self.scorer.criterion.needs & {"inputs", "channels", "probes"})
        self.scorer.keep_samples = self.pruning.interactions > 1
        mean = MeanGradients(self.learner.parameters)
        for _ in range(batches := max(count, 1 if 0 in self.events else 0)):
            fine = not self.scorer.criterion.needs or self._measure(math.inf if at_once else self.learner.training.clip)
            fine = fine and (at_once or self._score())
            if fine and at_once:
                mean.add()
            elif not fine and not at_once:
                self.scorer.forget(self.groups)
            self.learner.count(skipped=not fine)
            self.learner.optimizer.zero_grad(set_to_none=True)
            on_batch()
        if mean.count:
            mean.put()
            self._score()
            self.learner.optimizer.zero_grad(set_to_none=True)
        if batches:
            self._check_scored(f"none of {batches} calibration batches gave")
        self.scorer.keep_samples = False
        gather_samples(self.processes, self.scorer.samples)

    def _measure(self, clip: float) -> bool:
        labels = self.scorer.generator if self.pruning.labels == "model" else None
        loss = self.learner.backward(self.calibration, self.scorer.recording, labels, self.scorer.look)
        norm = clip_gradients(self.learner.parameters, clip)
        return math.isfinite(loss) and math.isfinite(norm)

    def _check_scored(self, told: str) -> None:
        if not (self.scorer.average.count or self._known):
            raise InputError(
                f"criterion {self.pruning.criterion}: {told} scores that are finite; look for NaN or infinity in the "
                "model's weights, or take another criterion or text"
            )

    def _score(self) -> bool:
        with self.timing("score"):
            return self.scorer.update(self.groups, self.cut_plan, self.plan)

    def before_step(self, step: int) -> None:
        """Whatever the schedule asks for before optimizer step `step` (0-based)."""
        if self.finished:
            return
        if self.masks and not self._reached:
            self.masks.show()
        if step in self.events:
            with self.timing("plan"):
                self._choose(step, self.events[step])
        if self.plan != self.settled_plan:
            end = self.fade_ends[self._chosen_at]
            if step >= end:
                self.settle()
            else:
                if self._half_space and step > self._chosen_at:
                    self._fading = self._half_space.within(self._fading, (end - step) / (end - step + 1))
                self._fade(1 - (step - self._chosen_at) / (end - self._chosen_at))

    def train_step(self) -> float:
        """One optimizer step, scored as long as there is something to choose. Returns the loss."""
        if self._half_space:
            self._half_space.remember()
        if self.masks and not self._reached:
            return self.masks.train_step(self.learner).loss
        if self._reached or self._late_scores:
            return self.learner.step().loss
        step = self.learner.step(self.scorer.recording, self._score)
        if step.skipped:
            self.scorer.forget(self.groups)
        return step.loss

    def settle(self) -> None:
        """Let what has been chosen and still fades go at once: cut it, or (not cutting early) close its gates."""
        if self.plan == self.settled_plan:
            return
        if self.cut_early:
            self._cut()
        else:
            self._fade(0.0)
            self.settled_plan = self.plan
            self.learner.objective.closed = frozenset(self.plan.removed_layers)
            self._half_space = None

    def finish(self) -> None:
        """Cut whatever has been chosen and is still there."""
        if self.plan != self.cut_plan:
            self._cut()

    def refitted(self) -> dict[str, torch.Tensor]:
        """Copies of the base parameters that compensation has written to, by their present names, on the CPU."""
        if self.preparation is None:
            return {}
        compensator, found = self.preparation.compensator, set()
        for group in self.groups:
            if group.name in self.preparation.refitted:
                found |= compensator.parameters(group)
        return {name: self.model.get_parameter(name).detach().cpu().clone() for name in sorted(found)}

    def state(self) -> State:
        """Plans, gates, scores, and the base weights that are not those of the checkpoint any more."""
        plans = {"plan": self.plan, "cut": self.cut_plan, "settled": self.settled_plan}
        values: dict[str, Any] = {name: plan.model_dump(mode="json") for name, plan in plans.items()}
        values |= {"chosen_at": self._chosen_at, "reached": self._reached, "in_period": self._half_space is not None}
        if self.preparation:
            values |= {"done": asdict(self.preparation.done), "refitted": sorted(self.preparation.refitted)}
        gates = {name: self.gates.value(name) for name in self._gated()}
        tensors = named("gates", gates) | named("fading", self._fading) | named("refitted", self.refitted())
        masks = {"masks": self.masks.state()} if self.masks else {}
        return State.of(own=State(values, tensors), scorer=self.scorer.state(), **masks)

    def go_on(self, state: State) -> None:
        """Be where `state` was taken; the model is whole and untouched."""
        own = state.part("own")
        plan, cut_plan, settled_plan = (Plan.model_validate(own.values[name]) for name in ("plan", "cut", "settled"))
        self._chosen_at, self._reached = own.values["chosen_at"], own.values["reached"]
        if self.preparation:
            self.preparation.done = Prepared(**own.values["done"])
            self.preparation.refitted = set(own.values["refitted"])
            if self.preparation.refitted:
                self.preparation.compensator.make_room(self.groups)
        if cut_plan != self.cut_plan:
            self.plan = cut_plan
            self._cut()
        self.plan, self.settled_plan = plan, settled_plan
        self.learner.objective.closed = frozenset(settled_plan.removed_layers)
        self._fading = own.under("fading")
        for name, value in own.under("gates").items():
            self.gates.set(name, value)
        for name, weight in own.under("refitted").items():
            self.model.get_parameter(name).data.copy_(weight)
        if own.values["in_period"]:
            self._half_space = HalfSpace(self.model, self.groups, self.pruning.epsilon)
        self.scorer.go_on(state.part("scorer"))
        if self.masks:
            self.masks.go_on(state.part("masks"))
        if self._reached:
            self.scorer.close()

    def _gated(self) -> list[str]:
        stream = [RESIDUAL] if self.hidden and self.groups.residual is not None else []
        return [group.name for group in self.groups] + [layer.unit for layer in self.gates.layers] + stream

    def _choose(self, step: int, fraction: float) -> None:
        if self._late_scores and not self._score():  # before the cut: displacements count from uncut factors
            raise InputError(f"criterion {self.pruning.criterion}: scores at step {step} are not finite")
        self._check_scored(f"no step before {step} gave")
        if self.masks:
            self.gates.open()  # what stays is there whole
        self.settle()
        scores = self.scorer.average.scores
        before, self.plan = self.plan, self._next_plan(scores, fraction)
        self._fading = {
            name: self._is_one_of(name, set(group.keep) - set(self.plan.parts[name].keep))
            for name, group in before.parts.items()
        }
        self._chosen_at = step
        self._reached = step == self.last_event
        self.on_event(CutEvent(step, fraction, self.plan, scores))
        if self.pruning.schedule == "lhspg":
            self._begin_period()
        if self._reached:
            self.scorer.close()

    def _next_plan(self, scores: dict[str, torch.Tensor], fraction: float) -> Plan:
        preparation = self.preparation
        if preparation and preparation.compensator.writes_base(self.groups):
            self.learner.objective.before_change()
        if preparation and preparation.searches:
            with self.timing("search"):
                plan = preparation.search(self.original, self.plan, scores, self.prior)
        else:
            plan = choose(self.original, self.plan, scores, self.pruning, fraction, self.prior)
        if self.scorer.samples:
            plan = self._interacting(plan)
        plan = self._agreed(plan)
        if preparation and preparation.compensates:
            with self.timing("compensate"):
                plan = preparation.compensate(self.groups, self.cut_plan, plan)
        return plan

    def _agreed(self, plan: Plan) -> Plan:
        """The main process' plan: other machines may round differently."""
        return (
            plan
            if self.processes.count == 1
            else Plan.model_validate(self.processes.same(plan.model_dump(mode="json")))
        )

    def _interacting(self, plan: Plan) -> Plan:
        """A plan of the same widths whose removed units do least damage together."""
        keep = {}
        for group in self.original:
            left = len(plan.groups[group.name].keep)
            if 0 < left < group.units and group.kind != "expert":
                samples_NU, lost = torch.cat(self.scorer.samples[group.name]), group.units - left
                gone = least_joint_damage(samples_NU, lost, round(self.pruning.interactions * lost))
                keep[group.name] = sorted(set(range(group.units)) - set(gone.tolist()))
        self.scorer.samples.clear()
        return plan.keeping(keep)

    def _begin_period(self) -> None:
        for group in self.groups:
            redundant = group.only(self._fading[group.name].nonzero().flatten().numpy())
            forget_moments(self.model, redundant, self.learner.optimizer)
        if self.plan != self.cut_plan:
            self._half_space = HalfSpace(self.model, self.groups, self.pruning.epsilon)
        self.scorer.begin_period()

    def _is_one_of(self, name: str, units: Collection[int]) -> torch.Tensor:
        """For each unit of a group as it is now: whether it is among `units` (original numbers)."""
        return torch.isin(torch.tensor(self.cut_plan.parts[name].keep), torch.tensor(sorted(units), dtype=torch.long))

    def _fade(self, value: float) -> None:
        for number in set(self.plan.removed_layers) - set(self.cut_plan.removed_layers):
            fades = number not in self.settled_plan.removed_layers
            self.gates.set(f"layers.{number}", torch.tensor([value if fades else 0.0]))
        for name, group in self.plan.groups.items():
            if not group.keep:  # its layer's gate says so, or its expert's
                continue
            gone = torch.where(self._fading[name], value, 0.0)
            self.gates.set(name, torch.where(self._is_one_of(name, group.keep), 1.0, gone))
        if self.hidden and self.plan.residual is not None:  # hidden channels do not fade: they go when the others have
            present = self._is_one_of(RESIDUAL, self.plan.residual.keep)
            self.gates.set(RESIDUAL, (present | self._fading[RESIDUAL] if value > 0 else present).float())

    def _cut(self) -> None:
        self.learner.objective.before_change()
        with self.timing("cut"):
            self.groups = cut(
                self.model, self.groups, self.plan.positions_within(self.cut_plan), self.learner.optimizer
            )
        self.learner.parameters = adapter_parameters(self.model)
        self.learner.objective.layer_numbers = [layer.number for layer in self.groups.layers]
        self.cut_plan = self.settled_plan = self.plan
        ones = {group.name: torch.ones(group.units) for group in self.groups}
        self.gates.rebuild(
            self.groups.groups,
            ones,
            self.groups.layers if self.depth else (),
            self.groups.residual if self.hidden else None,
        )
        self._half_space = None
        if not self._reached:
            self.scorer.watch(self.groups)
