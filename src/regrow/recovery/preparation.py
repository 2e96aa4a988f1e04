"""What comes between choosing units and cutting them: a search for better widths, and compensation."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.journal import Forgetful
from regrow.checkpoint.originals import Originals
from regrow.criteria.registry import find_criterion
from regrow.data.corpus import Corpus
from regrow.data.tokens import Batch
from regrow.errors import InputError
from regrow.evaluation.perplexity import evaluation_mode
from regrow.planning.allocation import final_counts, lose, settle, uniform_candidates
from regrow.planning.counts import Counts
from regrow.planning.demand import most_removed
from regrow.planning.experts import fold, folded_name, unfold
from regrow.planning.hidden import the_rest
from regrow.planning.plan import Plan
from regrow.planning.search import Ladder, exchange_search
from regrow.planning.sensitivity import Prior
from regrow.processes import ALONE, Processes
from regrow.progress import Progress, Silent
from regrow.recipe import Recipe
from regrow.recovery.compensate import Compensated, Compensator
from regrow.recovery.learner import Diverged, Learner
from regrow.recovery.mixing import validation_loss
from regrow.recovery.supernet import Fitness, Supernet
from regrow.settings import Pruning
from regrow.structure.gates import Gates
from regrow.structure.groups import RESIDUAL, Groups

Allows = Callable[[Counts], bool]
"""Whether a search may settle on these numbers of units lost by each group."""


def anything(counts: Counts) -> bool:
    """What allows all."""
    return True


@dataclass
class Prepared:
    """What was found and done, for the report."""

    search: dict[str, Any] = field(default_factory=dict)
    """Divergences (nats per token) of every start or candidate, of the best, and how many were tried."""
    compensation: dict[str, Any] = field(default_factory=dict)
    """Mean share of the output error taken away, and the share of the refit that the held-out text preferred."""


def windows_wanted(recipe: Recipe) -> int:
    """How many training windows a `Preparation` looks at; 0 if the recipe neither searches nor compensates.

    A search refits, and trains finalists, on the first ones and judges by the last ones: not by those refitted on.
    """
    search, compensation = recipe.search, recipe.compensation
    training = search.trial_steps * recipe.training.batch_size if recipe.finalists > 1 else 0
    searching = max(search.windows, training) + search.judge_windows if search.evaluations else 0
    return max(searching, compensation.windows if compensation.walks else 0)


class Preparation:
    """Improves plans with the help of calibration windows."""

    def __init__(
        self,
        model: PreTrainedModel,
        gates: Gates,
        recipe: Recipe,
        batches: Sequence[Tensor],
        held_out: Callable[[], float],
        progress: Progress,
        journal: Forgetful,
        scratch: Path,
        processes: Processes = ALONE,
        true_weights: Callable[[], AbstractContextManager[None]] = nullcontext,
        allows: Allows = anything,
    ) -> None:
        """Nothing is measured yet.

        Args:
            gates: on the model.
            batches: token ids, each `[B, T]`; as many windows as `windows_wanted` says.
            held_out: mean NLL of the model as it is, on text that is not in `batches`.
            journal: knows whether the search is done.
            scratch: a folder where a search may put things aside.
            processes: those that share the batches.
            true_weights: a context in which a quantised model is refitted with the weights it was rounded from.
            allows: what else the search has to mind, if any plan that it begins with does.
        """
        self.model = model
        self.gates = gates
        self.true_weights = true_weights
        self.allows = allows
        self.recipe = recipe
        self.batches = batches
        self.held_out = held_out
        self.progress = progress
        self.journal = journal
        self.scratch = scratch
        criterion = find_criterion(recipe.pruning.criterion)
        self.compensator = Compensator(model, gates, recipe.compensation, criterion, processes)
        self.done = Prepared()
        self.refitted: set[str] = set()
        """Names of the groups whose consumers have been written to."""

    @property
    def searches(self) -> bool:
        """Whether the recipe wants a search."""
        return self.recipe.search.evaluations > 0

    @property
    def compensates(self) -> bool:
        """Whether the recipe wants compensation, or a selection that goes from layer to layer as it does."""
        return self.recipe.compensation.walks

    def search(self, groups: Groups, plan: Plan, scores: Mapping[str, Tensor], prior: Prior | None) -> Plan:
        """A plan of the same size as the recipe's allocation would make, nearer to the dense model.

        Args:
            groups: of the whole model; nothing has been cut yet.
            plan: the whole one.
        """
        self.compensator.make_room(groups)

        def work() -> dict[str, Any]:
            with evaluation_mode(self.model):
                counts = self._search(groups, scores, prior)
            return {"counts": counts, "report": self.done.search}

        found = self.journal.once("search", work)
        self.done.search = found["report"]
        return lose(groups, plan, found["counts"], scores, self.recipe.pruning)

    def _search(self, groups: Groups, scores: Mapping[str, Tensor], prior: Prior | None) -> Counts:
        """Units lost by each group of the best candidate."""
        pruning = self.recipe.pruning
        if "hidden" not in pruning.kinds:
            return self._searched(groups, scores, pruning, prior)
        # The stream's width is not searched: the others are, behind a mask that makes it as narrow as it will be.
        counts = final_counts(groups, {group.name: 0 for group in groups}, scores, pruning, prior)
        narrow, rest = the_rest(groups, pruning, counts.get(RESIDUAL, 0))
        if RESIDUAL in scores:
            self.gates.keep(RESIDUAL, torch.argsort(scores[RESIDUAL], stable=True)[counts[RESIDUAL] :].tolist())
        if rest.kinds:
            counts |= self._searched(narrow, scores, rest, prior)
        return counts

    def _searched(self, groups: Groups, scores: Mapping[str, Tensor], pruning: Pruning, prior: Prior | None) -> Counts:
        """How many units each group had best lose."""
        among = self._among_all if pruning.shape == "uniform" else self._by_exchange
        counts, value = among(groups, scores, pruning, prior)
        if not math.isfinite(value):
            raise InputError(
                "search: no candidate's divergence from the dense model is finite; look for NaN or infinity in the "
                "weights, or set search.evaluations=0"
            )
        self.done.search["best"] = value
        return counts

    def _among_all(
        self, groups: Groups, scores: Mapping[str, Tensor], pruning: Pruning, prior: Prior | None
    ) -> tuple[Counts, float]:
        """The best of the uniform shapes and its divergence: each is measured, the finalists again after training."""
        nothing, present = _before(groups, scores)
        candidates = uniform_candidates(groups, nothing, present, pruning)
        candidates.sort(key=lambda candidate: candidate.damage)
        starts = [candidate.counts for candidate in candidates]
        starts = ([each for each in starts if self.allows(each)] or starts)[: self.recipe.search.evaluations]
        ladder = Ladder(
            {g.name: tuple(sorted({0} | {counts[g.name] for counts in starts})) for g in groups},
            {group.name: group.cost for group in groups},
        )
        supernet, fitness = self._built(groups, ladder, scores, len(starts))
        values = [self._measured(fitness, counts) for counts in starts]
        finite = [math.inf if math.isnan(value) else value for value in values]
        order = sorted(range(len(starts)), key=lambda number: finite[number])
        nearest = [number for number in order[: self.recipe.finalists] if math.isfinite(finite[number])]
        self.done.search = {"candidates": [_widths(groups, each) for each in starts], "divergence": values}
        best = order[0]
        if len(nearest) > 1:
            trained = self._trained([starts[number] for number in nearest], supernet, fitness)
            best = nearest[int(np.argmin(trained))]
            self.done.search |= {"finalists": nearest, "divergence_trained": trained}
        supernet.close()
        return starts[best], finite[best]

    def _by_exchange(
        self, groups: Groups, scores: Mapping[str, Tensor], pruning: Pruning, prior: Prior | None
    ) -> tuple[Counts, float]:
        """What exchanging units between groups leads to, from what the allocations give, and its divergence."""
        settings, (nothing, present) = self.recipe.search, _before(groups, scores)
        folded, gone, worst = fold(groups, nothing, present, nothing)
        ladder = Ladder.of(folded, most_removed(folded, pruning, prior), settings.levels)
        ways = [final_counts(folded, gone, worst, way, prior) for way in _allocations(pruning, prior)]
        amount = min(sum(g.cost * counts[g.name] for g in folded) for counts in ways)
        starts = [ladder.nearest(counts, amount) for counts in ways]
        supernet, fitness = self._built(groups, ladder, scores, settings.evaluations)

        def whole(counts: Counts) -> Counts:
            return unfold(groups, counts, nothing)

        allowed = [each for each in starts if self.allows(whole(each))]
        found = exchange_search(
            allowed or starts, ladder, amount, lambda each: self._measured(fitness, whole(each)), settings.evaluations,
            self.recipe.seed, (lambda each: self.allows(whole(each))) if allowed else anything,
        )  # fmt: skip
        counts = whole(settle(folded, found.counts, pruning, prior))
        self.done.search = {"starts": len(starts), "trace": list(found.trace)}
        supernet.close()
        return counts, found.fitness

    def _built(
        self, groups: Groups, ladder: Ladder, scores: Mapping[str, Tensor], count: int
    ) -> tuple[Supernet, Fitness]:
        """What can be set to the rungs of a ladder, and what judges it; so many candidates are about to be."""
        search = self.recipe.search
        supernet = Supernet(self.model, groups, self.gates, self.compensator, self.scratch)
        rungs = {g.name: ladder.rungs.get(g.name, ladder.rungs.get(folded_name(g), ())) for g in groups}
        supernet.build(rungs, scores, self.batches[: self._batches_of(search.windows)], self.progress)
        fitness = Fitness(supernet, self.batches[-self._batches_of(search.judge_windows) :])
        self.progress.stage("search", count)
        return supernet, fitness

    def _measured(self, fitness: Fitness, counts: Counts) -> float:
        value = fitness(counts)
        self.progress.advance(1, f"divergence {value:.4f}")
        return value

    def _trained(self, candidates: Sequence[Counts], supernet: Supernet, fitness: Fitness) -> list[float]:
        """How far each candidate is from the dense model after a short training of its adapters, nats a token.

        What comes first before training need not after it (Minitron, arXiv 2407.14679, ranks candidates so).
        """
        search = self.recipe.search
        text = self.batches[: -self._batches_of(search.judge_windows)] or self.batches  # there may be no more of it
        training = self.recipe.training.model_copy(update={"steps": search.trial_steps})
        self.progress.stage("train finalists", len(candidates) * search.trial_steps)
        found = []
        for counts in candidates:
            supernet.set(counts)
            batches = itertools.cycle([Batch(ids_BT) for ids_BT in text])
            learner = Learner(self.model, training, batches, self.compensator.processes)
            untrained = learner.snapshot()
            value = math.inf
            with (
                suppress(Diverged),  # of this candidate alone: others may train well
                torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []),
            ):
                for _ in range(search.trial_steps):
                    learner.step()
                    self.progress.advance()
                with evaluation_mode(self.model):
                    value = fitness(counts)
            learner.restore(untrained)
            found.append(value if math.isfinite(value) else math.inf)
        return found

    def _batches_of(self, windows: int) -> int:
        return max(1, round(windows / len(self.batches[0])))

    def compensate(self, groups: Groups, cut_plan: Plan, plan: Plan) -> Plan:
        """Refit what stays. The gates of what goes are closed afterwards.

        Args:
            groups: as the tensors are now, cut to `cut_plan`.

        Returns:
            The plan; unless the criterion selects, of the same widths but other units.
        """
        self.compensator.make_room(groups)
        for number in set(plan.removed_layers) - set(cut_plan.removed_layers):
            self.gates.set(f"layers.{number}", torch.zeros(1))
        keep = {name: units for name, units in plan.positions_within(cut_plan).items() if len(units)}
        if (hidden := keep.pop(RESIDUAL, None)) is not None:
            self.gates.keep(RESIDUAL, hidden.tolist())
        batches = self.batches[: self._batches_of(self.recipe.compensation.windows)]
        with evaluation_mode(self.model), self.true_weights():
            done = self.compensator.run(groups, keep, batches, self.progress)
        self.refitted |= done.repaired.keys()
        if self.recipe.compensation.method != "none":
            repaired = list(done.repaired.values())
            self.done.compensation = {"repaired": float(np.mean(repaired)) if repaired else 0.0}
        if done.changes:  # none where the adapters carry the refit
            self.done.compensation |= self._blend(done)
        chosen = {
            name: [cut_plan.groups[name].keep[position] for position in units] for name, units in done.keep.items()
        }
        return plan.keeping(chosen)

    def _blend(self, done: Compensated) -> dict[str, Any]:
        trials = {}
        for share in self.recipe.compensation.blend:
            self.compensator.blend(done, share)
            trials[share] = self.held_out()
        finite = {share: loss for share, loss in trials.items() if math.isfinite(loss)}
        best = min(finite, key=lambda share: trials[share]) if finite else 0.0  # the plain cut
        self.compensator.blend(done, best)
        return {"blend": best, "validation_loss": {str(share): loss for share, loss in trials.items()}}


def _before(groups: Groups, scores: Mapping[str, Tensor]) -> tuple[Counts, dict[str, Tensor]]:
    """What each group has lost before anything is chosen, and what its units are worth, in float64."""
    return {group.name: 0 for group in groups}, {name: score.double() for name, score in scores.items()}


def _allocations(pruning: Pruning, prior: Prior | None) -> list[Pruning]:
    """The recipe's own way to share out the target, then the others."""
    ways = ("local", "by-kind", "global") if prior is None else ("local", "by-kind", "global", "curves")
    others = [pruning.model_copy(update={"allocation": way}) for way in ways]
    return [pruning, *(other for other in others if other.allocation != pruning.allocation)]


def _widths(groups: Groups, counts: Counts) -> dict[str, int]:
    """Layers that stay, and what is left of each kind in one of them."""
    left = {group.name: group.units - counts[group.name] for group in groups}
    stays = [group for group in groups if left[group.name]]
    return {"layers": len({group.layer for group in stays}), **{group.kind: left[group.name] for group in stays}}


def preparer(
    model: PreTrainedModel,
    recipe: Recipe,
    corpus: Corpus,
    progress: Progress,
    journal: Forgetful,
    scratch: Path,
    processes: Processes,
    originals: Originals | None,
    allows: Allows,
) -> Callable[[Gates], Preparation] | None:
    """What makes the `Preparation` once there are gates; None if the recipe neither searches nor compensates."""
    if not (wanted := windows_wanted(recipe)):
        return None
    size = recipe.training.batch_size
    batches = list(torch.split(corpus.pretrain.sample(wanted).ids_NT, size))
    if len(batches[0]) < processes.count:
        raise InputError(f"{len(batches[0])} windows of text are too few for {processes.count} processes; give more")
    shown = progress if recipe.pruning.schedule == "one-shot" else Silent()  # else it interrupts the training's bar
    return lambda gates: Preparation(
        model, gates, recipe, batches, lambda: validation_loss(model, corpus, recipe, processes), shown, journal,
        scratch, processes, partial(originals.borrowed, model, gates) if originals else nullcontext, allows,
    )  # fmt: skip
