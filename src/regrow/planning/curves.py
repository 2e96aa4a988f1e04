"""The allocation by measured curves: always the unit next whose removal adds the least damage per parameter.

As no curve gets flatter, this greedy choice solves `min Σ phi_g(k_g)` under a budget of parameters up to less
than one unit (the relaxation's optimality condition: equal marginal damage per parameter everywhere).
"""

import heapq
import math
from collections.abc import Mapping, Sequence

from regrow.planning.counts import Counts
from regrow.planning.demand import Demand, settle_counts
from regrow.planning.sensitivity import Curve, Prior
from regrow.structure.groups import Group


def next_damage(curve: Curve, units: int, removed: int) -> float:
    """What one unit more adds to the damage, nats per token."""
    return curve((removed + 1) / units) - curve(removed / units)


def least_damage(
    groups: Mapping[str, Group],
    curves: Mapping[str, Curve],
    price: Mapping[str, int],
    limit: Mapping[str, int],
    gone: Mapping[str, int],
    amount: int,
) -> dict[str, int]:
    """Units removed of each group once about `amount` is: the last unit may still be missing or be too much.

    Args:
        price: what removing one unit of a group brings.
        limit: most units that may be removed; groups at their limit are not touched.
        gone: units already removed; they stay so.

    Returns:
        Group name -> units removed, `gone` included.
    """
    counts = {name: gone[name] for name in groups}
    rest = amount - sum(price[name] * count for name, count in counts.items())
    least = min(price.values())

    def entry(name: str) -> tuple[float, float, str]:
        # Where all damage is zero, the group that has lost the smallest share is next.
        units = groups[name].units
        return next_damage(curves[name], units, counts[name]) / price[name], counts[name] / units, name

    heap = [entry(name) for name in groups if counts[name] < limit[name]]
    heapq.heapify(heap)
    while heap and rest > 0:
        *_, name = heapq.heappop(heap)
        if price[name] > rest and price[name] > least:
            continue  # too dear for what is left, and what is left only shrinks
        counts[name] += 1
        rest -= price[name]
        if counts[name] < limit[name]:
            heapq.heappush(heap, entry(name))
    return counts


def measured_damage(groups: Sequence[Group], counts: Counts, prior: Prior) -> float:
    """What counts of units lost cost by the curves: of each kind in all layers, or if there is none of each group.

    Layers that lose something at once lose more than the sum of what each would alone, and of one kind more so than of
    another; where all lose the same share the curve of all tells it.
    """
    damage = 0.0
    for kind in dict.fromkeys(group.kind for group in groups):
        members = [group for group in groups if group.kind == kind and counts[group.name]]
        if kind in prior.together and members:
            lost, units = sum(counts[g.name] for g in members), sum(g.units for g in groups if g.kind == kind)
            damage += prior.together[kind](lost / units)
        else:
            damage += sum(prior.curves[g.name](counts[g.name] / g.units) for g in members)
    return damage


def by_curves(demand: Demand, prior: Prior) -> Counts:
    """Least measured damage per parameter first, wherever it is, and the target exactly."""
    groups = {group.name: group for group in demand.groups}
    counts = least_damage(groups, prior.curves, demand.price, demand.limit, demand.gone, demand.amount)
    least = min(demand.price.values())

    def rank(name: str) -> tuple[bool, float]:
        curve, units = prior.curves.get(name), groups[name].units
        damage = next_damage(curve, units, counts[name]) / demand.price[name] if curve else math.inf
        return demand.price[name] > least, damage

    return settle_counts(demand, counts, sorted(groups, key=rank))
