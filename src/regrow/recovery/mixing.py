"""Which text each step trains on: stages, rounds, and the sources' shares (LoRAShear, arXiv 2310.18356, Alg. 5).

A stage (pretraining text, then instructions) goes in rounds of `recovery.interval` steps. Before each, the held-out
loss on every source is measured and the shares follow its distance from the dense model's, by the rule that the recipe
names (`data/mixture.py`). With one source, and nothing to end a stage early, nothing is measured.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.state import State
from regrow.data.corpus import Corpus
from regrow.data.mixture import Shares, reweight
from regrow.data.sampler import Sampler, SamplerState
from regrow.data.scaling import fit_loss_law
from regrow.data.tokens import Batch, Windows
from regrow.errors import InputError
from regrow.evaluation.compare import held_out_nll
from regrow.processes import ALONE, Processes
from regrow.recipe import Recipe
from regrow.settings import Stage

FORETOLD_FROM = 0.1
"""DRPruning: share of a stage's steps before which no loss is foretold, and"""
FORETOLD_AFTER = 10
"""from how many measurements none is yet."""


@dataclass
class StageState:
    """How far a stage is: plain values, enough to go on from."""

    sampler: SamplerState
    shares: Shares
    rounds: int = 0
    """Begun since everything is cut."""
    degradation: float | None = None
    """The mean over the stage's sources when the last of them began."""
    ended_at: int | None = None
    """The step at which it ended early."""
    seen: list[tuple[float, list[int], list[float]]] = field(default_factory=list)
    """Before each round: the share of the blocks removed, the sequences drawn of each source, its loss."""
    foretold: list[float] = field(default_factory=list)
    """The loss on each source that its law has foretold (DRPruning); empty before there is a law."""


@dataclass(frozen=True)
class StagePlan:
    """Some of the steps, and the sources that they draw from."""

    name: Stage
    part: float
    """What it weighs in the validation loss; all stages' parts sum to one."""
    steps: range
    members: list[int]
    """Numbers of the sources in the corpus."""
    sampler: Sampler
    state: StageState


class DataMix:
    """Training batches, stage by stage, from sources whose shares follow what the model has lost on each."""

    def __init__(self, corpus: Corpus, recipe: Recipe, measure: Callable[[Windows], float]) -> None:
        """Begin with the first step.

        Args:
            measure: mean NLL of the model, as it is now, over held-out windows (nats per scored token).
        """
        self.corpus = corpus
        self.recipe = recipe
        self.recovery = recipe.recovery
        self.measure = measure
        self.dense: list[float] = []
        """What the dense model loses on each source."""
        self.history: list[dict[str, Any]] = []
        """One entry per round, and one of the end."""
        self.stages = self._plan_stages()
        self.stage = self.stages[0]
        self._measured: tuple[int, list[float]] = (-1, [])

    def _plan_stages(self) -> list[StagePlan]:
        steps = self.recipe.training.steps
        part = self.recovery.instruct_share if self.corpus.members("instruct") else 0.0
        switch = steps - round(part * steps)
        plans = [self._plan_stage("pretrain", 1 - part, range(switch))]
        if part:
            plans.append(self._plan_stage("instruct", part, range(switch, steps)))
        return plans

    def _plan_stage(self, name: Stage, part: float, steps: range) -> StagePlan:
        members = self.corpus.members(name)
        shares = Shares.start([self.corpus.sources[number].weight for number in members])
        sampler = _sampler(self.corpus, members, shares, self.recipe, self.recipe.seed)
        return StagePlan(name, part, steps, members, sampler, StageState(sampler.state, shares))

    def state(self) -> State:
        """How far every stage is, and what has been measured."""
        return State(
            {
                "stages": [asdict(stage.state) for stage in self.stages],
                "dense": self.dense,
                "history": self.history,
                "measured": self._measured,
            }
        )

    def go_on(self, state: State, step: int) -> None:
        """Be where `state` was taken, before a step."""
        for stage, values in zip(self.stages, state.values["stages"], strict=True):
            sampler, shares = SamplerState(**values.pop("sampler")), values.pop("shares")
            stage.sampler.go_on(sampler)
            vars(stage.state).update(values, sampler=sampler, shares=Shares(*(tuple(q) for q in shares.values())))
        self.dense, self._measured = state.values["dense"], (*state.values["measured"],)
        self.history[:] = state.values["history"]
        self.stage = self._stage_of(step)

    def upcoming(self) -> Tensor:
        """Numbers of all windows that training may draw, ascending, int64 `[n]`."""
        return torch.tensor(sorted(set().union(*map(self._upcoming, self.stages))))

    def _upcoming(self, stage: StagePlan) -> Iterable[int]:
        if len(stage.members) > 1 and self.recovery.mixture != "fixed":
            return itertools.chain.from_iterable(self.corpus.ranges[number] for number in stage.members)
        foretold = _sampler(self.corpus, stage.members, stage.state.shares, self.recipe, self.recipe.seed)
        draws = len(stage.steps) * self.recipe.training.accumulate
        return itertools.chain.from_iterable(foretold.draw() for _ in range(draws))

    @property
    def in_rounds(self) -> bool:
        """Whether there is anything to measure for."""
        several = len(self.corpus.sources) > 1
        return several or self.recovery.tolerance > 0 or self.recovery.max_rounds is not None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self.stage.sampler)

    def losses(self, step: int) -> list[float]:
        """Held-out loss on every source before a step; measured once per step."""
        if self._measured[0] != step:
            self._measured = (step, [self.measure(source.validation) for source in self.corpus.sources])
        return self._measured[1]

    def validation_loss(self, step: int) -> float:
        """One figure for the whole run: every source's loss, weighted by its stage's part and its first share of it."""
        losses = self.losses(step)
        return math.fsum(
            stage.part * share * losses[number]
            for stage in self.stages
            for number, share in zip(stage.members, stage.state.shares.initial, strict=True)
        )

    def remember_dense(self) -> None:
        """Measure the model that nothing has been removed from yet.

        Raises:
            InputError: if its loss on a source is not finite: there would be nothing to measure against.
        """
        if not self.in_rounds:
            return
        self.dense = [self.measure(source.validation) for source in self.corpus.sources]
        for source, loss in zip(self.corpus.sources, self.dense, strict=True):
            if not math.isfinite(loss):
                raise InputError(
                    f"the whole model's held-out loss on {source.name} is {loss}; look for NaN or infinity in weights"
                )

    def steps(self, first: int = 0) -> Iterator[int]:
        """The numbers of the run's steps from one on, without those of a stage that has ended early."""
        return (step for step in range(first, self.recipe.training.steps) if not self.has_ended(step))

    def has_ended(self, step: int) -> bool:
        """Whether the stage of a step has ended before it."""
        return self._stage_of(step).state.ended_at is not None

    def before_step(self, step: int, all_cut: bool, removed: float = 0.0, aim: float = 0.0) -> None:
        """Enter the step's stage; where a round begins, measure, and end the stage or move its shares.

        Args:
            all_cut: whether the model has reached its target; a stage does not end before.
            removed: share of the blocks that has been removed by now.
            aim: and will have been in the end.
        """
        self.stage = self._stage_of(step)
        if not self.in_rounds or (step - self.stage.steps.start) % self.recovery.interval:
            return
        state = self.stage.state
        degradation = [self.losses(step)[number] - self.dense[number] for number in self.stage.members]
        if all_cut:
            if self._is_enough(state, fmean(degradation)):
                state.ended_at = step
                self.record(step)
                return
            state.rounds += 1
            state.degradation = fmean(degradation)
        if all(map(math.isfinite, degradation)):
            progress = (step - self.stage.steps.start) / len(self.stage.steps)
            if self.recovery.mixture == "drpruning":
                degradation = self._beyond_foretold(step, progress, removed, max(aim, removed))
            state.shares = reweight(self.recovery.mixture, state.shares, degradation, self.recovery.floor, progress)
            state.sampler.weights = list(state.shares.current)
        self.record(step)

    def _beyond_foretold(self, step: int, progress: float, removed: float, aim: float) -> list[float]:
        """By how much the loss on each source is above what it is foretold to come to (the dense model's before).

        As DRPruning's released code does: from more than ten points, never above the lowest seen or foretold.
        """
        state = self.stage.state
        losses = [self.losses(step)[number] for number in self.stage.members]
        drawn = list(state.sampler.taken)
        if removed > 0 and all(drawn):
            state.seen.append((removed, drawn, losses))
        if len(state.seen) > FORETOLD_AFTER and progress >= FORETOLD_FROM:
            shares, counts_PM, losses_PM = zip(*state.seen, strict=True)
            found = []
            for number, now in enumerate(drawn):
                seen = [each[number] for each in losses_PM]
                law = fit_loss_law([each[number] for each in counts_PM], shares, seen)
                found.append(min(law(now / progress, aim), *seen, *state.foretold[number : number + 1]))
            state.foretold = found
        references = state.foretold or [self.dense[number] for number in self.stage.members]
        return [loss - reference for loss, reference in zip(losses, references, strict=True)]

    def _is_enough(self, state: StageState, degradation: float) -> bool:
        if state.degradation is None:
            return False
        gain = state.degradation - degradation
        converged = self.recovery.tolerance > 0 and gain < self.recovery.tolerance * abs(state.degradation)
        return converged or state.rounds == self.recovery.max_rounds

    def _stage_of(self, step: int) -> StagePlan:
        return next((stage for stage in self.stages if step in stage.steps), self.stages[-1])

    def record(self, step: int) -> None:
        """Note the shares, and the losses on all sources, before a step."""
        if not self.in_rounds or (self.history and self.history[-1]["step"] == step):
            return
        losses, names = self.losses(step), [source.name for source in self.corpus.sources]
        shares = dict(zip(self.stage.members, self.stage.state.shares.current, strict=True))
        self.history.append(
            {
                "step": step,
                "stage": self.stage.name,
                "weights": {name: shares.get(number, 0.0) for number, name in enumerate(names)},
                **self._told(names),
                "losses": dict(zip(names, losses, strict=True)),
                "degradation": {
                    name: loss - dense for name, loss, dense in zip(names, losses, self.dense, strict=True)
                },
            }
        )

    def _told(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        members, foretold = self.stage.members, self.stage.state.foretold
        return {"foretold": {names[n]: loss for n, loss in zip(members, foretold, strict=True)}} if foretold else {}

    def summary(self) -> dict[str, Any]:
        """The rule, the sources with what was drawn of each, when stages ended, and all rounds."""
        assert self.in_rounds
        sources: dict[str, Any] = {}
        for stage in self.stages:
            parts = zip(stage.members, stage.state.shares.initial, stage.state.sampler.taken, strict=True)
            for number, share, taken in parts:
                source = self.corpus.sources[number]
                sources[source.name] = {
                    "source": source.train.source,
                    "stage": stage.name,
                    "initial_share": share,
                    "train_windows": len(source.train),
                    "validation_windows": len(source.validation),
                    "train_sha256": source.train.sha256,
                    "sequences_drawn": taken,
                    "dense_loss": self.dense[number],
                }
        return {
            "rule": self.recovery.mixture,
            "sources": sources,
            "ended_early_at": {s.name: s.state.ended_at for s in self.stages if s.state.ended_at is not None},
            "rounds": self.history,
        }


def calibration_batches(corpus: Corpus, recipe: Recipe) -> Sampler:
    """Batches to score on: of the pretraining stage, in its initial shares, not in training's order."""
    members = corpus.members("pretrain")
    shares = Shares.start([corpus.sources[number].weight for number in members])
    return _sampler(corpus, members, shares, recipe, recipe.seed + 1)


def _sampler(corpus: Corpus, members: list[int], shares: Shares, recipe: Recipe, seed: int) -> Sampler:
    ranges = [corpus.ranges[number] for number in members]
    state = SamplerState(list(shares.current), [0] * len(members))
    return Sampler(corpus.train, ranges, recipe.training.batch_size, seed, state)


def validation_loss(model: PreTrainedModel, corpus: Corpus, recipe: Recipe, processes: Processes = ALONE) -> float:
    """A model's loss over all held-out text, weighted as in `DataMix.validation_loss`: nats; perhaps not finite."""
    size = recipe.training.batch_size
    return DataMix(corpus, recipe, lambda windows: held_out_nll(model, windows, size, processes)).validation_loss(0)
