"""How many units each group loses, and which.

Counts first: a target in parameters (or in units) becomes a number of units per group. Within a group the
lowest scores go. A target is never missed: at least as much is removed as was asked, and less than one of the
smallest steps that the shape allows beyond it (a unit; in the uniform shape, `multiple` channels in every layer).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.errors import InputError
from regrow.planning.curves import least_damage, next_damage
from regrow.planning.plan import Plan
from regrow.planning.sensitivity import Prior
from regrow.settings import Pruning
from regrow.structure.groups import Group, Groups

Counts = dict[str, int]
"""Group name -> units removed of the original ones."""

UNIT_NAMES = {"attention": "KV heads", "ffn": "FFN channels"}


@dataclass(frozen=True)
class _Demand:
    """A number of parameters (or units, `price` then being 1) to take from some groups."""

    groups: tuple[Group, ...]
    price: Mapping[str, int]
    """What removing one unit of a group brings."""
    amount: int
    gone: Mapping[str, int]
    """Units already removed; they stay so."""
    limit: Mapping[str, int]
    """Most units that may be removed."""
    multiple: int

    def of_kind(self, ffn: bool) -> list[Group]:
        return [group for group in self.groups if group.kind.startswith("ffn") == ffn]

    def step(self, group: Group) -> int:
        return self.multiple if group.kind.startswith("ffn") else 1

    def width_ok(self, group: Group, removed: int) -> int:
        """The least removal from `removed` on that leaves a width which is a multiple."""
        left = group.units - removed
        return removed if removed == 0 else removed + left % self.step(group)

    def brings(self, counts: Counts) -> int:
        return sum(self.price[name] * count for name, count in counts.items())


def choose(
    groups: Groups,
    plan: Plan,
    scores: Mapping[str, Tensor],
    pruning: Pruning,
    fraction: float = 1.0,
    prior: Prior | None = None,
) -> Plan:
    """The next plan on the way to the target: nothing that `plan` removed comes back.

    Args:
        groups: the groups of the original model.
        plan: what stays so far.
        scores: group name -> one score per original unit, higher stays; those of removed units are ignored.
        fraction: how far to go; 1 reaches the target exactly. Below 1 each group goes to the nearest unit, so
            that a layer of few heads does not lose them all at the very end.
        prior: what an analysis has found; allocation by curves needs one.

    Raises:
        InputError: if the target is out of reach.
    """
    gone = {name: group.units - len(group.keep) for name, group in plan.groups.items()}
    present = {name: scores[name][list(group.keep)].double() for name, group in plan.groups.items()}
    final = final_counts(groups, gone, present, pruning, prior)
    keep = {}
    for name, count in final.items():
        now = max(gone[name], math.floor(count * fraction + 0.5))
        order = torch.argsort(present[name], stable=True)[now - gone[name] :]
        keep[name] = [plan.groups[name].keep[position] for position in order.tolist()]
    return plan.keeping(keep)


def check_reach(groups: Groups, pruning: Pruning, prior: Prior | None = None) -> None:
    """See whether the target can be reached, before anything is measured.

    Raises:
        InputError: if it cannot; the message says what is within it.
    """
    nothing = {group.name: 0 for group in groups}
    scores = {group.name: torch.zeros(group.units) for group in groups}
    final_counts(groups, nothing, scores, pruning.model_copy(update={"allocation": "local"}), prior)


def final_counts(
    groups: Groups, gone: Counts, scores: Mapping[str, Tensor], pruning: Pruning, prior: Prior | None = None
) -> Counts:
    """Units that each group has lost once the target is reached.

    Args:
        gone: units lost already.
        scores: scores of the units present, any order.

    Raises:
        InputError: if the target is out of reach; the message says what is within it.
    """
    assert prior is not None or pruning.allocation != "curves"
    protected = prior.protected if prior is not None and pruning.shape == "free" else frozenset()
    demands = _demands(groups, gone, pruning, protected)
    if pruning.shape == "uniform":
        allocate = _uniform
    else:
        allocate = {"local": _local, "global": _global, "curves": _by_curves}[pruning.allocation]
    counts = dict(gone)
    for demand in demands:
        counts.update(allocate(demand, scores, pruning, prior))
    return counts


def _demands(groups: Groups, gone: Counts, pruning: Pruning, protected: frozenset[str]) -> list[_Demand]:
    layers = protected_layers(groups, pruning)
    free = tuple(group for group in groups if group.layer not in layers and group.name not in protected)
    limit = {
        g.name: min(g.units - max(1, math.ceil(pruning.floor * g.units)), int(pruning.cap * g.units)) for g in free
    }
    if pruning.basis == "units":
        kinds = sorted({group.kind for group in groups})
        parts = [tuple(group for group in free if group.kind == kind) for kind in kinds]
        prices = [dict.fromkeys((group.name for group in part), 1) for part in parts]
        whole = [sum(group.units for group in groups if group.kind == kind) for kind in kinds]
        amounts = [round(pruning.sparsity * units) for units in whole]
    else:
        parts, prices = [free], [{group.name: group.cost for group in free}]
        whole = [groups.block_parameters if pruning.basis == "block" else groups.total_parameters]
        amounts = [math.ceil(pruning.sparsity * whole[0] - 1e-6)]
    demands = []
    for part, price, amount, size in zip(parts, prices, amounts, whole, strict=True):
        demand = _Demand(part, price, amount, gone, limit, pruning.multiple)
        within = demand.brings({group.name: _most(demand, group) for group in part})
        if within < amount:
            left = sorted({f"{g.units - _most(demand, g)} of {g.units} {UNIT_NAMES.get(g.kind, g.kind)}" for g in part})
            raise InputError(
                f"sparsity {pruning.sparsity} of {pruning.basis} is out of reach: even with only "
                f"{' and '.join(left)} left in each layer that may be cut, {within / size:.3f} is removed; "
                f"use at most {math.floor(100 * within / size) / 100}"
            )
        demands.append(demand)
    return demands


def protected_layers(groups: Groups, pruning: Pruning) -> set[int]:
    """Numbers of the layers that the recipe leaves alone; none in the uniform shape."""
    if pruning.shape == "uniform":
        return set()
    layers = len(groups.layers)
    return {*range(int(pruning.protect_first * layers)), *range(layers - pruning.protect_last, layers)}


def _most(demand: _Demand, group: Group) -> int:
    """The largest removal within the limit that leaves an allowed width."""
    limit = demand.limit[group.name]
    return max(
        (r for r in range(limit, max(limit - demand.step(group), -1), -1) if demand.width_ok(group, r) == r), default=0
    )


def _uniform(demand: _Demand, scores: Mapping[str, Tensor], pruning: Pruning, prior: Prior | None) -> Counts:
    """The same widths in every layer: a number of KV heads, then as many channels as the rest takes."""
    heads, channels = demand.of_kind(ffn=False), demand.of_kind(ffn=True)
    for kind in (heads, channels):
        if len({(group.units, demand.price[group.name]) for group in kind}) > 1:
            raise InputError("the uniform shape needs a model whose layers are equally wide; use pruning.shape=free")
    share = demand.amount / sum(demand.price[group.name] * group.units for group in demand.groups)
    best: tuple[tuple[bool, float], Counts] | None = None
    step = sum(demand.price[group.name] for group in channels or heads) * (demand.multiple if channels else 1)
    for removed in range(
        max((demand.gone[g.name] for g in heads), default=0), 1 + (_most(demand, heads[0]) if heads else 0)
    ):
        counts = dict.fromkeys((group.name for group in heads), removed)
        if channels:
            rest = max(0, demand.amount - demand.brings(counts))
            per_layer = math.ceil(rest / sum(demand.price[group.name] for group in channels))
            per_layer = demand.width_ok(channels[0], max(per_layer, demand.gone[channels[0].name]))
            counts |= dict.fromkeys((group.name for group in channels), per_layer)
        if demand.brings(counts) < demand.amount or any(counts[g.name] > demand.limit[g.name] for g in demand.groups):
            continue
        if pruning.allocation == "global":
            loss = sum(_damage(scores[name], count - demand.gone[name]) for name, count in counts.items())
        elif prior is not None and pruning.allocation == "curves":
            loss = sum(prior.curves[g.name](counts[g.name] / g.units) for g in demand.groups if counts[g.name])
        else:
            loss = abs(removed / heads[0].units - share) if heads else 0.0
        rank = (demand.brings(counts) - demand.amount >= step, loss)
        if best is None or rank < best[0]:
            best = rank, counts
    if best is None:
        raise InputError(
            f"no multiples of {demand.multiple} channels reach sparsity {pruning.sparsity}; lower pruning.multiple"
        )
    return best[1]


def _damage(scores: Tensor, count: int) -> float:
    return float(scores.sort().values[:count].sum())


def _local(demand: _Demand, scores: Mapping[str, Tensor], pruning: Pruning, prior: Prior | None) -> Counts:
    """The same share in every layer: heads to the nearest, channels evenly to fill the rest."""
    heads, channels = demand.of_kind(ffn=False), demand.of_kind(ffn=True)
    share = demand.amount / sum(demand.price[group.name] * group.units for group in demand.groups)
    counts = {g.name: max(min(round(share * g.units), demand.limit[g.name]), demand.gone[g.name]) for g in heads}
    room = sum(demand.price[g.name] * _most(demand, g) for g in channels)
    for group in sorted(heads, key=lambda g: -g.units):
        while demand.amount - demand.brings(counts) > room and counts[group.name] < demand.limit[group.name]:
            counts[group.name] += 1
    for group in reversed(heads):
        while demand.brings(counts) > demand.amount and counts[group.name] > demand.gone[group.name]:
            counts[group.name] -= 1
    rest = demand.amount - demand.brings(counts)
    width = sum(demand.price[group.name] * group.units for group in channels)
    for group in channels:
        even = math.floor(max(rest, 0) / width * group.units)
        counts[group.name] = max(min(even, demand.limit[group.name]), demand.gone[group.name])
    return _settle(demand, counts, [group.name for group in (*channels, *heads)])


def _global(demand: _Demand, scores: Mapping[str, Tensor], pruning: Pruning, prior: Prior | None) -> Counts:
    """Lowest score per parameter first, wherever it is (the LP relaxation of the budgeted choice)."""
    counts = {group.name: demand.gone[group.name] for group in demand.groups}
    ranked = [
        (score / demand.price[group.name], index)
        for index, group in enumerate(demand.groups)
        for score in scores[group.name].tolist()
    ]
    ranked.sort()
    least = min(demand.price.values())
    rest = demand.amount - demand.brings(counts)
    for _, index in ranked:
        group = demand.groups[index]
        price = demand.price[group.name]
        if rest <= 0:
            break
        if counts[group.name] < demand.limit[group.name] and (price <= rest or price == least):
            counts[group.name] += 1
            rest -= price
    next_score = {
        group.name: float(scores[group.name].sort().values[counts[group.name] - demand.gone[group.name] :][:1].sum())
        for group in demand.groups
    }
    cheapest_first = sorted(demand.groups, key=lambda g: (demand.price[g.name] > least, next_score[g.name]))
    return _settle(demand, counts, [group.name for group in cheapest_first])


def _by_curves(demand: _Demand, scores: Mapping[str, Tensor], pruning: Pruning, prior: Prior | None) -> Counts:
    """Least measured damage per parameter first, wherever it is."""
    assert prior is not None
    groups = {group.name: group for group in demand.groups}
    counts = least_damage(groups, prior.curves, demand.price, demand.limit, demand.gone, demand.amount)
    least = min(demand.price.values())

    def rank(name: str) -> tuple[bool, float]:
        curve, units = prior.curves.get(name), groups[name].units
        damage = next_damage(curve, units, counts[name]) / demand.price[name] if curve else math.inf
        return demand.price[name] > least, damage

    return _settle(demand, counts, sorted(groups, key=rank))


def _settle(demand: _Demand, counts: Counts, order: Sequence[str]) -> Counts:
    """Make widths multiples and the total exact: remove more, or give back, a step at a time along `order`."""
    groups = {group.name: group for group in demand.groups}
    for name, group in groups.items():
        counts[name] = min(demand.width_ok(group, counts[name]), _most(demand, group))
    changed = True
    while changed and demand.brings(counts) < demand.amount:
        changed = False
        for name in order:
            more = demand.width_ok(groups[name], counts[name] + 1)
            if demand.brings(counts) < demand.amount and more <= demand.limit[name]:
                counts[name], changed = more, True
    changed = True
    while changed:
        changed = False
        for name in reversed(order):
            less = counts[name] - demand.step(groups[name])
            surplus = demand.brings(counts) - demand.amount
            if surplus >= demand.price[name] * demand.step(groups[name]) and less >= demand.gone[name]:
                counts[name], changed = less, True
    return counts
