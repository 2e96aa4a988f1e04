"""How many units each group loses, and which.

Counts first: a target in parameters (or in units) becomes a number of units per group. Within a group the
lowest scores go. A target is never missed: at least as much is removed as was asked, and less than one of the
smallest steps that the shape allows beyond it (a unit; in the uniform shape, `multiple` channels in every layer).

Whole layers compete with widths by the damage done in all: for every number of layers, those of least damage per
parameter go and widths give the rest; the number with the least damage wins.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regrow.errors import InputError
from regrow.planning.counts import Counts
from regrow.planning.curves import by_curves, measured_damage
from regrow.planning.demand import Demand, demands, kernel_multiple, out_of_reach, settle_counts
from regrow.planning.depth import emptied_layers, layer_choices, layer_damage, least_damaging
from regrow.planning.experts import (
    expert_choices,
    expert_price,
    experts_bring,
    experts_damage,
    fold,
    unfold,
)
from regrow.planning.hidden import with_hidden
from regrow.planning.logarithmic import log_increasing
from regrow.planning.plan import Plan, layer_of
from regrow.planning.sensitivity import Prior
from regrow.settings import Pruning
from regrow.structure.groups import RESIDUAL, Group, Groups


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
    counts = final_counts(groups, *present_units(plan, scores), pruning, prior)
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
    multiples = {group.name: group.multiple for group in groups}
    for name, count in counts.items():
        if name not in gone or (name != RESIDUAL and layer_of(name) in newly):
            continue  # hidden channels of which none may go have no scores
        units, multiple = plan.parts[name].units, multiples.get(name, 1)
        left = -(-(units - math.floor(count * fraction + 0.5)) // multiple) * multiple
        now = max(gone[name], units - left)
        order = torch.argsort(present[name], stable=True)[now - gone[name] :]
        keep[name] = [plan.parts[name].keep[position] for position in order.tolist()]
    return plan.keeping(keep, now_removed)


def present_units(plan: Plan, scores: Mapping[str, Tensor]) -> tuple[Counts, dict[str, Tensor]]:
    """For `final_counts`: units gone, and the scores of those still there, those of layers as they are."""
    known = {name: group for name, group in plan.parts.items() if name in scores or name != RESIDUAL}
    gone = {name: group.removed for name, group in known.items()}
    present = {name: scores[name][list(group.keep)].double() for name, group in known.items()}
    return gone, {**scores, **present}


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
        scores: scores of the units present, any order; of layers (`layers.<number>`) if the criterion gives them.

    Raises:
        InputError: if the target is out of reach; the message says what is within it.
    """
    if "hidden" in pruning.kinds:
        return with_hidden(
            groups, gone, pruning, lambda less, rest: final_counts(less, dict(gone), scores, rest, prior)
        )

    def best(demand: Demand, scores: Mapping[str, Tensor]) -> list[Counts]:
        if pruning.shape == "uniform":
            return sorted(_uniform(demand), key=lambda counts: _loss(demand, counts, scores, pruning, prior))[:1]
        match pruning.allocation:
            case "local":
                return [_local(demand)]
            case "global":
                return [_lowest_first(demand, scores, demand.price)]
            case "pooled":
                return [_lowest_first(demand, scores, dict.fromkeys(demand.price, 1))]
            case "log-increasing":
                return [log_increasing(demand, pruning.first_share)]
            case "by-kind":
                return [_by_kind(demand, scores)]
            case "curves":
                assert prior is not None
                return [by_curves(demand, prior)]

    # Where layers by themselves overshoot, the fewest of them go.
    ways = _ways(groups, gone, scores, pruning, best, prior)
    return min(ways, key=lambda way: (not way.exact, 0 if way.exact else len(way.layers), way.damage)).counts


def uniform_candidates(groups: Groups, gone: Counts, scores: Mapping[str, Tensor], pruning: Pruning) -> list[Candidate]:
    """All numbers of layers, experts, KV heads and FFN channels that together reach the target in the uniform shape.

    Only exact ones, unless there are none. Arguments and errors as for `final_counts`; `lose` makes a plan of one.
    """
    ways = _ways(groups, gone, scores, pruning, lambda demand, _: _uniform(demand))
    return [way for way in ways if way.exact] or ways


def settle(groups: Groups, counts: Counts, pruning: Pruning, prior: Prior | None = None) -> Counts:
    """Counts near some that roughly reach the target, and reach it exactly: channels make up the difference first."""
    nothing = {group.name: 0 for group in groups}
    settled = dict(counts)
    for demand in demands(groups, nothing, pruning, emptied_layers(groups, counts), prior):
        order = [group.name for group in (*demand.of_kind(ffn=True), *demand.of_kind(ffn=False))]
        settled |= settle_counts(demand, {name: counts[name] for name in order}, order)
    return settled


def _ways(
    groups: Groups,
    gone: Counts,
    scores: Mapping[str, Tensor],
    pruning: Pruning,
    allocate: Callable[[Demand, Mapping[str, Tensor]], list[Counts]],
    prior: Prior | None = None,
) -> list[Candidate]:
    """For every choice of layers and experts, each way in which `allocate` makes up the rest by widths.

    `allocate` is given scores that ascend.
    """
    ways = []
    for layers in layer_choices(groups, gone, scores, pruning):
        for experts in expert_choices(groups, gone, pruning, layers, _wanted(groups, pruning, layers)):
            folded, before, given = fold(groups, gone, scores, experts)
            given = _ascending(given)
            asked = demands(folded, before, pruning, layers, prior, experts_bring(groups, experts, layers))
            short = [demand for demand in asked if demand.within() < demand.amount]
            if short:
                continue
            lost = {group.name: group.units if group.layer in layers else before[group.name] for group in folded}
            step = sum(expert_price(groups, group.layer) for group in groups if group.kind == "expert")
            besides = experts_damage(groups, gone, experts, scores)
            for parts in itertools.product(*(allocate(demand, given) for demand in asked if demand.groups)):
                counts = lost | {name: count for part in parts for name, count in part.items()}
                exact = all(demand.surplus(counts) < (demand.least_step(pruning.shape) or step) for demand in asked)
                damage = _total_damage(folded, before, counts, given) + besides
                ways.append(Candidate(tuple(sorted(layers)), unfold(groups, counts, experts), damage, exact))
    if not ways and short:
        tightest = min(short, key=lambda demand: (demand.by_layers + demand.within()) / demand.whole)
        raise out_of_reach(groups, tightest, layers, pruning)
    if not ways:
        multiple = pruning.multiple or max(
            (kernel_multiple(group.units) for group in groups if group.base_kind == "ffn"), default=1
        )
        raise InputError(
            f"no multiples of {multiple} channels reach sparsity {pruning.sparsity}; lower pruning.multiple"
        )
    return ways


def _wanted(groups: Groups, pruning: Pruning, layers: frozenset[int]) -> int:
    """Parameters that experts would have to bring for no width to be cut."""
    (alone,) = demands(replace(groups, groups=()), {}, pruning.model_copy(update={"basis": _basis(pruning)}), layers)
    return alone.amount


def _basis(pruning: Pruning) -> str:
    return "block" if pruning.basis == "units" else pruning.basis


def _total_damage(groups: Groups, gone: Counts, counts: Counts, scores: Mapping[str, Tensor]) -> float:
    layers = emptied_layers(groups, counts)
    damage = sum(layer_damage(groups, number, scores) for number in layers - emptied_layers(groups, gone))
    for group in groups:
        if group.layer not in layers:
            damage += _damage(scores[group.name], counts[group.name] - gone[group.name])
    return damage


def _uniform(demand: Demand) -> list[Counts]:
    """The same widths in every layer: every number of KV heads, then as many channels as the rest takes.

    Those that are exact, or if there are none all that reach the amount.
    """
    heads, channels = demand.of_kind(ffn=False), demand.of_kind(ffn=True)
    for sizes in ({(g.units, demand.price[g.name]) for g in heads}, {g.units for g in channels}):
        if len(sizes) > 1:
            raise InputError("the uniform shape needs a model whose layers are equally wide; use pruning.shape=free")
    coarsest = max(channels, key=demand.step, default=None)
    found = []
    for removed in range(
        max((demand.gone[g.name] for g in heads), default=0), 1 + (demand.most(heads[0]) if heads else 0)
    ):
        if heads and demand.width_ok(heads[0], removed) != removed:
            continue
        counts = dict.fromkeys((group.name for group in heads), removed)
        if coarsest is not None:
            rest = max(0, demand.amount - demand.brings(counts))
            per_layer = math.ceil(rest / sum(demand.price[group.name] for group in channels))
            per_layer = demand.width_ok(coarsest, max(per_layer, *(demand.gone[group.name] for group in channels)))
            counts |= dict.fromkeys((group.name for group in channels), per_layer)
        if demand.surplus(counts) >= 0 and all(counts[g.name] <= demand.limit[g.name] for g in demand.groups):
            found.append(counts)
    return [counts for counts in found if demand.surplus(counts) < demand.least_step("uniform")] or found


def _loss(demand: Demand, counts: Counts, scores: Mapping[str, Tensor], pruning: Pruning, prior: Prior | None) -> float:
    """What decides between uniform widths: damage, or (local) how far heads are from losing their share."""
    if pruning.allocation == "global":
        return sum(_damage(scores[name], count - demand.gone[name]) for name, count in counts.items())
    if prior is not None and pruning.allocation == "curves":
        return measured_damage(demand.groups, counts, prior)
    share = demand.amount / sum(demand.price[group.name] * group.units for group in demand.groups)
    heads = demand.of_kind(ffn=False)
    return abs(counts[heads[0].name] / heads[0].units - share) if heads else 0.0


def _ascending(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: score.sort().values for name, score in scores.items()}


def _damage(ascending: Tensor, count: int) -> float:
    return float(ascending[:count].sum())


def _local(demand: Demand) -> Counts:
    """The same share in every layer: heads to the nearest, channels evenly to fill the rest."""
    heads, channels = demand.of_kind(ffn=False), demand.of_kind(ffn=True)
    share = demand.amount / sum(demand.price[group.name] * group.units for group in demand.groups)
    counts = {g.name: max(min(round(share * g.units), demand.limit[g.name]), demand.gone[g.name]) for g in heads}
    room = sum(demand.price[g.name] * demand.most(g) for g in channels)
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
    return settle_counts(demand, counts, [group.name for group in (*channels, *heads)])


def _lowest_first(demand: Demand, scores: Mapping[str, Tensor], per: Mapping[str, int]) -> Counts:
    """Lowest score divided by `per` first, wherever it is: by the price, the budgeted choice's LP relaxation."""
    counts = {group.name: demand.gone[group.name] for group in demand.groups}
    least = min(demand.price.values())
    rest = demand.amount - demand.brings(counts)
    for group in _by_score(demand.groups, {name: score / per[name] for name, score in scores.items() if name in per}):
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
    return settle_counts(demand, counts, [group.name for group in cheapest_first])


def _by_score(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> Iterator[Group]:
    """The group of each unit, lowest score first; of equal scores, the one that would have lost the smaller share."""
    ranked = sorted(
        (score, number / group.units, index)
        for index, group in enumerate(groups)
        for number, score in enumerate(scores[group.name].tolist(), start=group.units - len(scores[group.name]))
    )
    return (groups[index] for *_, index in ranked)


def _by_kind(demand: Demand, scores: Mapping[str, Tensor]) -> Counts:
    """As many heads and channels as `_local` takes, but of each kind the lowest scores, wherever they are."""
    local = _local(demand)
    counts = {group.name: demand.gone[group.name] for group in demand.groups}
    heads, channels = demand.of_kind(ffn=False), demand.of_kind(ffn=True)
    for kind in (heads, channels):
        rest = sum(local[group.name] - counts[group.name] for group in kind)
        for group in _by_score(kind, scores):
            if rest > 0 and counts[group.name] < demand.limit[group.name]:
                counts[group.name] += 1
                rest -= 1
    return settle_counts(demand, counts, [group.name for group in (*channels, *heads)])
