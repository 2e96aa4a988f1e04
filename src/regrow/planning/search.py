"""Search over how many units each group loses: exchanges at equal cost, judged by a measured fitness.

Týr-the-Pruner (arXiv 2503.09657) moves sparsity between layers and keeps what brings the pruned model nearer to the
dense one. Here one candidate is kept and mutated (an evolution strategy with one parent and one child): with a few
dozen groups and at most some hundred evaluations a population would only spread them thin.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from regrow.planning.counts import Counts
from regrow.structure.groups import Group


@dataclass(frozen=True)
class Ladder:
    """The numbers of removed units that the search may choose for each group."""

    rungs: Mapping[str, tuple[int, ...]]
    """Ascending, from 0."""
    cost: Mapping[str, int]
    """Parameters of one unit."""

    @classmethod
    def of(cls, groups: Sequence[Group], limit: Mapping[str, int], levels: int) -> "Ladder":
        """Rungs at most `1 / levels` of a group apart, up to each group's limit."""
        rungs = {}
        for group in groups:
            step = max(1, group.units // levels)
            rungs[group.name] = tuple(range(0, limit.get(group.name, 0) + 1, step))
        return cls(rungs, {group.name: group.cost for group in groups})

    def removed(self, counts: Mapping[str, int]) -> int:
        """Parameters that go."""
        return sum(self.cost[name] * count for name, count in counts.items())

    def nearest(self, counts: Mapping[str, int], target: int) -> Counts:
        """The rungs next to some counts that remove at least `target` parameters, with little beyond it."""
        found = {name: max(r for r in rungs if r <= counts[name]) for name, rungs in self.rungs.items()}
        while self.removed(found) < target:
            up = {name: self._step(found, name, 1) for name in found}
            shortfall = target - self.removed(found)
            gains = {n: self.cost[n] * (r - found[n]) for n, r in up.items() if r is not None}
            if not gains:
                break
            enough = {n: gain for n, gain in gains.items() if gain >= shortfall}
            pick = (
                min(enough, key=lambda n: enough[n])
                if enough
                else max(gains, key=lambda n: (counts[n] - found[n], gains[n]))
            )
            found[pick] = up[pick]  # type: ignore[assignment]
        return found

    def _step(self, counts: Mapping[str, int], name: str, by: int) -> int | None:
        rungs = self.rungs[name]
        position = rungs.index(counts[name]) + by
        return rungs[position] if 0 <= position < len(rungs) else None

    def exchange(self, counts: Mapping[str, int], target: int, reach: int, chance: torch.Generator) -> Counts | None:
        """One group loses up to `reach` rungs more; others, at random, get back all that the target leaves room for.

        Returns:
            None if the group drawn has nothing more to lose, or no other could get anything back.
        """
        names = list(self.rungs)
        order = [names[i] for i in torch.randperm(len(names), generator=chance).tolist()]
        found, loser = dict(counts), order[0]
        up = self._step(found, loser, 1 + int(torch.randint(reach, (1,), generator=chance)))
        if up is None:
            return None
        found[loser] = up
        for name in order[1:]:
            while (down := self._step(found, name, -1)) is not None:
                if self.removed(found) - self.cost[name] * (found[name] - down) < target:
                    break
                found[name] = down
        return None if all(found[n] == counts[n] for n in names if n != loser) else found


@dataclass(frozen=True)
class Found:
    """The best candidate, and the way there."""

    counts: Counts
    fitness: float
    trace: tuple[float, ...]
    """Fitness of the best so far after each evaluation."""


def exchange_search(
    starts: Sequence[Counts],
    ladder: Ladder,
    target: int,
    fitness: Callable[[Counts], float],
    evaluations: int,
    seed: int,
    allows: Callable[[Counts], bool] = lambda counts: True,
) -> Found:
    """Mutate the best start as long as evaluations last; keep what is better.

    Args:
        starts: candidates on the ladder's rungs; each costs one evaluation.
        target: parameters that must go at least.
        fitness: lower is better.
        allows: whether a candidate may be tried at all; costs nothing.
    """
    chance = torch.Generator().manual_seed(seed)
    trace: list[float] = []
    tried: set[tuple[int, ...]] = set()
    best, value = dict(starts[0]), float("inf")
    queue = [dict(start) for start in starts]
    misses = 0
    while len(trace) < evaluations and misses < 1000:
        reach = 3 if len(trace) < evaluations // 2 else 1
        candidate = queue.pop(0) if queue else ladder.exchange(best, target, reach, chance)
        if candidate is None or (key := tuple(candidate[name] for name in ladder.rungs)) in tried:
            misses += 1
            continue
        tried.add(key)
        if not allows(candidate):
            misses += 1
            continue
        misses = 0
        measured = fitness(candidate)
        if measured < value:
            best, value = candidate, measured
        trace.append(value)
    return Found(best, value, tuple(trace))
