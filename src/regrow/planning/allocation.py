"""How many units each group loses, and which.

Counts first: a target in parameters (or in units) becomes a number of units per group. Within a group the
lowest scores go. A target is never missed: at least as much is removed as was asked, and less than one of the
smallest steps that the shape allows beyond it (a unit; in the uniform shape, `multiple` channels in every layer).

Whole layers compete with widths by the damage done in all: for every number of layers, those of least damage per
parameter go and widths give the rest; the number with the least damage wins.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.errors import InputError
from regrow.planning.depth import (
    emptied_layers,
    layer_choices,
    layer_damage,
    layer_price,
    layers_wanted,
    least_damaging,
    outer_layers,
)
from regrow.planning.plan import Plan, layer_of
from regrow.settings import Pruning
from regrow.structure.groups import Group, Groups

Counts = dict[str, int]
"""Group name -> units removed of the original ones; all of them in a layer that goes whole."""

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
    whole: int
    """What the target is a share of."""
    by_layers: int
    """What layers that go whole bring, beside `amount`."""

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

    def within(self) -> int:
        """The most that can be brought."""
        return self.brings({group.name: _most(self, group) for group in self.groups})

    def surplus(self, counts: Counts) -> int:
        """What is brought beyond the amount."""
        return self.brings({group.name: counts[group.name] for group in self.groups}) - self.amount

    def least_step(self, shape: str) -> int:
        """What the shape's smallest step brings: a unit; uniform: a channel in every layer, or a head without any."""
        if shape == "free":
            return min((self.price[group.name] * self.step(group) for group in self.groups), default=0)
        return sum(self.price[group.name] * self.step(group) for group in self.of_kind(ffn=True) or self.groups)


@dataclass(frozen=True)
class Candidate:
    """One way to reach the target."""

    layers: tuple[int, ...]
    """Numbers of the layers that go whole, ascending."""
    counts: Counts
    damage: float
    """Sum of the scores of everything that goes and was there before."""
    exact: bool
    """Whether the target is passed by less than one step."""


def choose(groups: Groups, plan: Plan, scores: Mapping[str, Tensor], pruning: Pruning, fraction: float = 1.0) -> Plan:
    """The next plan on the way to the target: nothing that `plan` removed comes back.

    Args:
        groups: the groups of the original model.
        plan: what stays so far.
        scores: group name -> one score per original unit, higher stays; those of removed units are ignored.
        fraction: how far to go; 1 reaches the target exactly. Below 1 each group goes to the nearest unit, so
            that a layer of few heads does not lose them all at the very end.

    Raises:
        InputError: if the target is out of reach.
    """
    counts = final_counts(groups, *present_units(plan, scores), pruning)
    return lose(groups, plan, counts, scores, pruning, fraction)


def lose(
    groups: Groups, plan: Plan, counts: Counts, scores: Mapping[str, Tensor], pruning: Pruning, fraction: float = 1.0
) -> Plan:
    """The plan in which `counts` of the units are gone, those of the lowest scores; arguments as for `choose`."""
    gone, present = present_units(plan, scores)
    newly = emptied_layers(groups, counts) - set(plan.removed_layers)
    layers = math.floor((len(plan.removed_layers) + len(newly)) * fraction + 0.5) - len(plan.removed_layers)
    now_removed = least_damaging(groups, newly, gone, present, pruning)[: max(layers, 0)]
    keep = {}
    for name, count in counts.items():
        if layer_of(name) in newly:
            continue
        now = max(gone[name], math.floor(count * fraction + 0.5))
        order = torch.argsort(present[name], stable=True)[now - gone[name] :]
        keep[name] = [plan.groups[name].keep[position] for position in order.tolist()]
    return plan.keeping(keep, now_removed)


def present_units(plan: Plan, scores: Mapping[str, Tensor]) -> tuple[Counts, dict[str, Tensor]]:
    """For `final_counts`: units gone, and the scores of those still there, those of layers as they are."""
    gone = {name: group.units - len(group.keep) for name, group in plan.groups.items()}
    present = {name: scores[name][list(group.keep)].double() for name, group in plan.groups.items()}
    return gone, {**scores, **present}


def final_counts(groups: Groups, gone: Counts, scores: Mapping[str, Tensor], pruning: Pruning) -> Counts:
    """Units that each group has lost once the target is reached.

    Args:
        gone: units lost already.
        scores: scores of the units present, any order; of layers (`layers.<number>`) if the criterion gives them.

    Raises:
        InputError: if the target is out of reach; the message says what is within it.
    """
    scores = _ascending(scores)

    def best(demand: _Demand) -> list[Counts]:
        if pruning.shape == "uniform":
            return sorted(_uniform(demand), key=lambda counts: _loss(demand, counts, scores, pruning))[:1]
        return [_global(demand, scores) if pruning.allocation == "global" else _local(demand)]

    # Where layers by themselves overshoot, the fewest of them go.
    ways = _ways(groups, gone, scores, pruning, best)
    return min(ways, key=lambda way: (not way.exact, 0 if way.exact else len(way.layers), way.damage)).counts


def uniform_candidates(groups: Groups, gone: Counts, scores: Mapping[str, Tensor], pruning: Pruning) -> list[Candidate]:
    """All numbers of layers, KV heads and FFN channels that together reach the target in the uniform shape.

    Only exact ones, unless there are none. Arguments and errors as for `final_counts`; `lose` makes a plan of one.
    """
    ways = _ways(groups, gone, _ascending(scores), pruning, _uniform)
    return [way for way in ways if way.exact] or ways


def _ways(
    groups: Groups,
    gone: Counts,
    scores: Mapping[str, Tensor],
    pruning: Pruning,
    allocate: Callable[[_Demand], list[Counts]],
) -> list[Candidate]:
    """For every choice of layers, each way in which `allocate` makes up the rest by widths; `scores` ascend."""
    ways = []
    for layers in layer_choices(groups, gone, scores, pruning):
        demands = _demands(groups, gone, pruning, layers)
        short = [demand for demand in demands if demand.within() < demand.amount]
        if short:
            continue
        lost = {group.name: group.units if group.layer in layers else gone[group.name] for group in groups}
        for parts in itertools.product(*(allocate(demand) for demand in demands if demand.groups)):
            counts = lost | {name: count for part in parts for name, count in part.items()}
            exact = all(demand.surplus(counts) < demand.least_step(pruning.shape) for demand in demands)
            damage = _total_damage(groups, gone, counts, scores)
            ways.append(Candidate(tuple(sorted(layers)), counts, damage, exact))
    if not ways and short:
        raise _out_of_reach(groups, short[0], layers, pruning)
    if not ways:
        raise InputError(
            f"no multiples of {pruning.multiple} channels reach sparsity {pruning.sparsity}; lower pruning.multiple"
        )
    return ways


def _total_damage(groups: Groups, gone: Counts, counts: Counts, scores: Mapping[str, Tensor]) -> float:
    layers = emptied_layers(groups, counts)
    damage = sum(layer_damage(groups, number, scores) for number in layers - emptied_layers(groups, gone))
    for group in groups:
        if group.layer not in layers:
            damage += _damage(scores[group.name], counts[group.name] - gone[group.name])
    return damage


def _demands(groups: Groups, gone: Counts, pruning: Pruning, layers: frozenset[int]) -> list[_Demand]:
    """What widths have to bring once `layers` are gone whole; at least one demand, if only of nothing."""
    spared = layers | protected_layers(groups, pruning)
    free = tuple(g for g in groups if g.layer not in spared and g.kind.rstrip("0123456789") in pruning.kinds)
    limit = {
        g.name: min(g.units - max(1, math.ceil(pruning.floor * g.units)), int(pruning.cap * g.units)) for g in free
    }

    def demand(part: tuple[Group, ...], price: Mapping[str, int], whole: int, wanted: int, by_layers: int) -> _Demand:
        return _Demand(part, price, wanted - by_layers, gone, limit, pruning.multiple, whole, by_layers)

    if pruning.basis != "units":
        whole = groups.block_parameters if pruning.basis == "block" else groups.total_parameters
        wanted = math.ceil(pruning.sparsity * whole - 1e-6)
        by_layers = sum(layer_price(layer, pruning) for layer in groups.layers if layer.number in layers)
        return [demand(free, {group.name: group.cost for group in free}, whole, wanted, by_layers)]
    demands = []
    for kind in sorted({group.kind for group in free}):
        part = tuple(group for group in free if group.kind == kind)
        units = sum(group.units for group in groups if group.kind == kind)
        by_layers = sum(group.units for group in groups if group.kind == kind and group.layer in layers)
        price = dict.fromkeys((group.name for group in part), 1)
        demands.append(demand(part, price, units, round(pruning.sparsity * units), by_layers))
    return demands or [demand((), {}, len(groups.layers), layers_wanted(groups, pruning), len(layers))]


def _out_of_reach(groups: Groups, demand: _Demand, layers: frozenset[int], pruning: Pruning) -> InputError:
    """How far one gets with `layers` gone and as little as may be left in the others."""
    units = sorted(
        {f"{g.units - _most(demand, g)} of {g.units} {UNIT_NAMES.get(g.kind, g.kind)}" for g in demand.groups}
    )
    left = [f"{' and '.join(units)} left in each layer that may be cut"] if units else []
    if layers or not units:
        left.insert(0, f"{len(groups.layers) - len(layers)} of {len(groups.layers)} layers")
    within = (demand.by_layers + demand.within()) / demand.whole
    return InputError(
        f"sparsity {pruning.sparsity} of {pruning.basis} is out of reach: even with only {', and '.join(left)}, "
        f"{within:.3f} is removed; use at most {math.floor(100 * within) / 100}"
    )


def protected_layers(groups: Groups, pruning: Pruning) -> set[int]:
    """Numbers of the layers whose widths the recipe leaves alone; none in the uniform shape."""
    return set() if pruning.shape == "uniform" else outer_layers(groups, pruning)


def _most(demand: _Demand, group: Group) -> int:
    """The largest removal within the limit that leaves an allowed width."""
    limit = demand.limit[group.name]
    return max(
        (r for r in range(limit, max(limit - demand.step(group), -1), -1) if demand.width_ok(group, r) == r), default=0
    )


def _uniform(demand: _Demand) -> list[Counts]:
    """The same widths in every layer: every number of KV heads, then as many channels as the rest takes.

    Those that are exact, or if there are none all that reach the amount.
    """
    heads, channels = demand.of_kind(ffn=False), demand.of_kind(ffn=True)
    for kind in (heads, channels):
        if len({(group.units, demand.price[group.name]) for group in kind}) > 1:
            raise InputError("the uniform shape needs a model whose layers are equally wide; use pruning.shape=free")
    found = []
    for removed in range(
        max((demand.gone[g.name] for g in heads), default=0), 1 + (_most(demand, heads[0]) if heads else 0)
    ):
        counts = dict.fromkeys((group.name for group in heads), removed)
        if channels:
            rest = max(0, demand.amount - demand.brings(counts))
            per_layer = math.ceil(rest / sum(demand.price[group.name] for group in channels))
            per_layer = demand.width_ok(channels[0], max(per_layer, demand.gone[channels[0].name]))
            counts |= dict.fromkeys((group.name for group in channels), per_layer)
        if demand.surplus(counts) >= 0 and all(counts[g.name] <= demand.limit[g.name] for g in demand.groups):
            found.append(counts)
    return [counts for counts in found if demand.surplus(counts) < demand.least_step("uniform")] or found


def _loss(demand: _Demand, counts: Counts, scores: Mapping[str, Tensor], pruning: Pruning) -> float:
    """What decides between uniform widths: damage, or (local) how far heads are from losing the same share as all."""
    if pruning.allocation == "global":
        return sum(_damage(scores[name], count - demand.gone[name]) for name, count in counts.items())
    share = demand.amount / sum(demand.price[group.name] * group.units for group in demand.groups)
    heads = demand.of_kind(ffn=False)
    return abs(counts[heads[0].name] / heads[0].units - share) if heads else 0.0


def _ascending(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: score.sort().values for name, score in scores.items()}


def _damage(ascending: Tensor, count: int) -> float:
    return float(ascending[:count].sum())


def _local(demand: _Demand) -> Counts:
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


def _global(demand: _Demand, scores: Mapping[str, Tensor]) -> Counts:
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
        group.name: float(scores[group.name][counts[group.name] - demand.gone[group.name] :][:1].sum())
        for group in demand.groups
    }
    cheapest_first = sorted(demand.groups, key=lambda g: (demand.price[g.name] > least, next_score[g.name]))
    return _settle(demand, counts, [group.name for group in cheapest_first])


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
