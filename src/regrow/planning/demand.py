"""What a target asks of the widths: which groups may give how much, and what a unit of each brings."""

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from regrow.errors import InputError
from regrow.planning.counts import Counts, at_least, at_most
from regrow.planning.depth import layer_choices, layer_price, layers_wanted, outer_layers
from regrow.planning.experts import expert_choices, expert_limit, experts_bring, fold
from regrow.planning.sensitivity import Prior
from regrow.settings import Pruning
from regrow.structure.groups import Group, Groups

UNIT_NAMES = {
    "attention": "KV heads",
    "ffn": "FFN channels",
    "expert": "experts",
    "hidden": "hidden channels",
}

FINEST = 128
"""Steps in a width, at least, where `pruning.multiple` is left to regrow."""
NARROWEST_STEP, WIDEST_STEP = 8, 64


def kernel_multiple(width: int) -> int:
    """What a width is best a multiple of: 8 to 64 in wide matrices, 1 in narrow ones.

    In bfloat16 a GPU's kernels are several times slower on rows that do not end on 16 bytes, and a little on those that
    do not end on 128 (measured: `benchmarks/results/gpu.md`).
    """
    power = 1 << max(width // FINEST, 1).bit_length() - 1
    return min(power, WIDEST_STEP) if power >= NARROWEST_STEP else 1


@dataclass(frozen=True)
class Demand:
    """A number of parameters (or units, `price` then being 1) to take from some groups."""

    groups: tuple[Group, ...]
    price: Mapping[str, int]
    """What removing one unit of a group brings."""
    amount: int
    gone: Mapping[str, int]
    """Units already removed; they stay so."""
    limit: Mapping[str, int]
    """Most units that may be removed."""
    multiple: int | None
    """Of FFN widths, as the recipe has it."""
    whole: int
    """What the target is a share of."""
    by_layers: int
    """What layers and experts that go whole bring, beside `amount`."""

    def of_kind(self, ffn: bool) -> list[Group]:
        """Its FFN groups, or all others."""
        return [group for group in self.groups if (group.base_kind == "ffn") == ffn]

    def step(self, group: Group) -> int:
        """Units that go at a time."""
        if group.base_kind != "ffn":
            return 1
        return math.lcm(self.multiple or kernel_multiple(group.units), group.multiple)

    def width_ok(self, group: Group, removed: int) -> int:
        """The least removal from `removed` on that leaves a width which is a multiple."""
        if removed == 0:
            return 0
        left = group.units - removed
        left -= left % self.step(group)
        if group.widths is None:
            return group.units - left
        at_most = bisect.bisect_right(group.widths, left)
        return group.units - (group.widths[at_most - 1] if at_most else 0)

    def brings(self, counts: Counts) -> int:
        """What some removals come to."""
        return sum(self.price[name] * count for name, count in counts.items())

    def most(self, group: Group) -> int:
        """The largest removal within the limit that leaves an allowed width."""
        limit = self.limit[group.name]
        return next(r for r in range(limit, -1, -1) if self.width_ok(group, r) == r)

    def within(self) -> int:
        """The most that can be brought."""
        return self.brings({group.name: self.most(group) for group in self.groups})

    def surplus(self, counts: Counts) -> int:
        """What is brought beyond the amount."""
        return self.brings({group.name: counts[group.name] for group in self.groups}) - self.amount

    def least_step(self, shape: str) -> int:
        """What the shape's smallest step brings: a unit; uniform: a channel in every layer, or a head without any."""
        if shape == "free":
            return min((self.price[group.name] * self.step(group) for group in self.groups), default=0)
        return sum(self.price[group.name] * self.step(group) for group in self.of_kind(ffn=True) or self.groups)


def most_removed(groups: Groups, pruning: Pruning, prior: Prior | None = None) -> Counts:
    """The most units that each group may lose while its layer stays; none where the recipe protects."""
    nothing = {group.name: 0 for group in groups}
    asked = demands(groups, nothing, pruning, frozenset(), prior)
    return nothing | {group.name: demand.most(group) for demand in asked for group in demand.groups}


def widths_left(groups: Groups, pruning: Pruning) -> dict[str, list[int]]:
    """Kind -> how many units of a layer's group may stay, ascending, of those groups of which some may go."""
    nothing = {group.name: 0 for group in groups}
    found: dict[str, list[int]] = {}
    for demand in demands(groups, nothing, pruning, frozenset()):
        for group in demand.groups:
            gone = (count for count in range(demand.most(group), -1, -1) if demand.width_ok(group, count) == count)
            found.setdefault(group.kind, [group.units - count for count in gone])
    return found


def reach(groups: Groups, pruning: Pruning, basis: str = "block", prior: Prior | None = None) -> int:
    """Most parameters that the recipe's shape and limits let go, hidden channels apart.

    Args:
        basis: `block`, or `total`.
        prior: what an analysis has found: in the free shape it protects groups.
    """
    nothing = {group.name: 0 for group in groups}
    most = pruning.model_copy(update={"sparsity": 1 - 1e-9, "basis": basis})
    zeros = {group.name: torch.zeros(group.units) for group in groups}
    found = 0
    for layers in layer_choices(groups, nothing, zeros, most):
        for experts in expert_choices(groups, nothing, most, layers, groups.block_parameters):
            folded, gone, _ = fold(groups, nothing, zeros, experts)
            (one,) = demands(folded, gone, most, layers, prior, experts_bring(groups, experts, layers))
            found = max(found, one.by_layers + one.within())
    return found


def demands(
    groups: Groups,
    gone: Counts,
    pruning: Pruning,
    layers: frozenset[int],
    prior: Prior | None = None,
    by_experts: int = 0,
) -> list[Demand]:
    """What widths have to bring once `layers` are gone whole; at least one demand, if only of nothing.

    Args:
        groups: folded, see `planning.experts`.
        by_experts: parameters that experts bring which go from other layers.
    """
    spared = layers | protected_layers(groups, pruning)
    protected = prior.protected if prior is not None and pruning.shape == "free" else frozenset()
    free = tuple(
        g for g in groups if g.layer not in spared and g.name not in protected and g.base_kind in pruning.kinds
    )
    free = tuple(replace(g, widths=None) for g in free) if pruning.shape == "free" else _one_width(free)
    free = tuple(g for g in free if g.widths is None or len(g.widths) > 1)
    limit = {
        g.name: min(g.units - max(1, at_least(pruning.floor, g.units)), at_most(pruning.cap, g.units)) for g in free
    }

    def demand(part: tuple[Group, ...], price: Mapping[str, int], whole: int, wanted: int, by_layers: int) -> Demand:
        return Demand(part, price, wanted - by_layers, gone, limit, pruning.multiple, whole, by_layers)

    if pruning.basis != "units":
        whole = groups.parameters(pruning.basis)
        wanted = at_least(pruning.sparsity, whole)
        by_layers = sum(layer_price(layer, pruning) for layer in groups.layers if layer.number in layers) + by_experts
        return [demand(free, {group.name: group.cost for group in free}, whole, wanted, by_layers)]
    asked = []
    for kind in sorted({group.kind for group in free}):
        part = tuple(group for group in free if group.kind == kind)
        units = sum(group.units for group in groups if group.kind == kind)
        by_layers = sum(group.units for group in groups if group.kind == kind and group.layer in layers)
        price = dict.fromkeys((group.name for group in part), 1)
        asked.append(demand(part, price, units, at_least(pruning.sparsity, units), by_layers))
    bring_layers = "layer" in pruning.kinds or "expert" not in pruning.kinds  # experts are counted on their own
    wanted = layers_wanted(groups, pruning) if bring_layers else 0
    return asked or [demand((), {}, len(groups.layers), wanted, len(layers))]


def _one_width(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Of FFNs of several widths (a shared expert's, the others', dense layers'), those of the one that holds most."""
    held: dict[int, int] = defaultdict(int)
    for group in groups:
        if group.base_kind == "ffn":
            held[group.units] += group.units * group.cost
    width = max(held, key=held.__getitem__, default=0)
    return tuple(group for group in groups if group.base_kind != "ffn" or group.units == width)


def out_of_reach(groups: Groups, demand: Demand, layers: frozenset[int], pruning: Pruning) -> InputError:
    """How far one gets with `layers` gone and as little as may be left in the others."""
    units = sorted({f"{g.units - demand.most(g)} of {g.units} {UNIT_NAMES.get(g.kind, g.kind)}" for g in demand.groups})
    experts = {f"{g.units - expert_limit(g, pruning)} of {g.units} experts" for g in groups if g.kind == "expert"}
    units += sorted(experts) if "expert" in pruning.kinds else []
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


def settle_counts(demand: Demand, counts: Counts, order: Sequence[str]) -> Counts:
    """Make widths multiples and the total exact: remove more, or give back, a step at a time along `order`.

    More goes of what costs least, for as long as there is any: a head for the want of a few channels would bring most
    of the channels back.
    """
    groups = {group.name: group for group in demand.groups}
    for name, group in groups.items():
        counts[name] = min(demand.width_ok(group, counts[name]), demand.most(group))
    while demand.brings(counts) < demand.amount:
        more = {name: demand.width_ok(groups[name], counts[name] + 1) for name in order}
        able = [name for name in order if more[name] <= demand.limit[name]]
        if not able:
            break
        least = min(demand.price[name] for name in able)
        for name in able:
            if demand.price[name] == least and demand.brings(counts) < demand.amount:
                counts[name] = more[name]
    changed = True
    while changed:
        changed = False
        for name in reversed(order):
            less = counts[name] - demand.step(groups[name])
            surplus = demand.brings(counts) - demand.amount
            if surplus >= demand.price[name] * demand.step(groups[name]) and less >= demand.gone[name]:
                counts[name], changed = less, True
    return counts
