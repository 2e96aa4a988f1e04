"""Experts beside widths: how many go, what they bring, and channels of experts as one width for each layer.

A tensor holds all experts of a layer, so they keep the same number of channels each, though not the same channels. For
allocation they are *folded*: a group whose k-th unit is the k-th worst channel of every expert that stays.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from regrow.errors import InputError
from regrow.planning.counts import Counts, at_least, at_most
from regrow.planning.depth import emptied_layers, outer_layers
from regrow.settings import Pruning
from regrow.structure.groups import Group, Groups


def folded_name(group: Group) -> str:
    """What an expert's group is called once it is folded with those of the layer's other experts."""
    return group.name if group.expert is None else f"layers.{group.layer}.{group.kind}"


def families(groups: Groups) -> dict[str, tuple[Group, ...]]:
    """Groups that lose as many units as one another, by the name they have once folded."""
    found: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        found[folded_name(group)].append(group)
    return {name: tuple(members) for name, members in found.items()}


def fold(
    groups: Groups, gone: Mapping[str, int], scores: Mapping[str, Tensor], experts: Mapping[str, int]
) -> tuple[Groups, Counts, dict[str, Tensor]]:
    """Groups, units gone and scores for the allocation of widths; those of a model without experts as they are.

    Args:
        scores: of the units present, those of an expert's channels empty once it is gone.
        experts: groups of experts -> how many will be gone; the lowest scores go.
    """
    counts = {group.name: gone[group.name] for group in groups if group.expert is None and group.kind != "expert"}
    folded_scores = {name: score for name, score in scores.items() if name not in gone or name in counts}
    found = {group.name: group for group in groups if group.name in counts}
    for name, members in _members(groups, gone, scores, experts).items():
        first = members[0]
        cost = sum(group.cost for group in members)
        found[name] = replace(first, name=name, slices=(), cost=cost, expert=None)
        counts[name] = gone[first.name]
        folded_scores[name] = torch.stack([scores[group.name].sort().values for group in members]).sum(0)
    ordered = sorted(found.values(), key=lambda group: (group.layer, group.kind))
    return replace(groups, groups=tuple(ordered)), counts, folded_scores


def _members(
    groups: Groups, gone: Mapping[str, int], scores: Mapping[str, Tensor], experts: Mapping[str, int]
) -> dict[str, list[Group]]:
    """Folded name -> the groups of the channels of those experts that stay."""
    there: dict[str, list[Group]] = defaultdict(list)
    every: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.expert is not None:
            every[folded_name(group)].append(group)
            if gone[group.name] < group.units:
                there[folded_name(group)].append(group)
    for name, members in every.items():  # of a layer that is gone
        there.setdefault(name, members)
    routed = {group.layer: group.name for group in groups if group.kind == "expert"}
    for name, members in there.items():
        whole = routed.get(members[0].layer)
        more = 0 if whole is None else experts[whole] - gone[whole]
        if whole is not None and 0 < more < len(members):
            worst = set(torch.argsort(scores[whole], stable=True)[:more].tolist())
            there[name] = [group for position, group in enumerate(members) if position not in worst]
    return there


def unfold(groups: Groups, counts: Mapping[str, int], experts: Mapping[str, int]) -> Counts:
    """Units lost by every group, given those of folded ones; every expert, gone or not, loses as many channels."""
    return {
        group.name: experts[group.name] if group.kind == "expert" else counts[folded_name(group)] for group in groups
    }


def emptied_experts(groups: Groups, counts: Mapping[str, int]) -> Counts:
    """The counts once experts that go have lost all their channels: the first in number, for all bring the same."""
    gone = {group.layer: counts[group.name] for group in groups if group.kind == "expert"}
    inside = (group for group in groups if group.expert is not None and group.expert < gone.get(group.layer, 0))
    return {**counts, **{group.name: group.units for group in inside}}


def expert_choices(
    groups: Groups, gone: Mapping[str, int], pruning: Pruning, layers: frozenset[int], wanted: int
) -> Iterator[dict[str, int]]:
    """Groups of experts -> how many are to be gone, the same number more in every layer from one choice to the next.

    Args:
        layers: those that go whole.
        wanted: what experts are to bring; no choice brings more than is needed for it.
    """
    routed = [group for group in groups if group.kind == "expert"]
    now = {group.name: group.units if group.layer in layers else gone[group.name] for group in routed}
    spared = layers if pruning.shape == "uniform" else layers | outer_layers(groups, pruning)
    free = [group for group in routed if group.layer not in spared and "expert" in pruning.kinds]
    if not free:
        yield now
        return
    most = min(expert_limit(group, pruning) for group in free)
    first = max(gone[group.name] for group in free)
    if pruning.basis == "units":
        first = most = max(first, _share_of_experts(max(group.units for group in free), most, pruning))
    for count in range(first, most + 1):
        chosen = now | {group.name: count for group in free}
        if count == first or all(_stays_possible(group, count) for group in free):
            yield chosen
            if pruning.basis != "units" and experts_bring(groups, chosen, layers) >= wanted:
                return


def expert_limit(group: Group, pruning: Pruning) -> int:
    """The most experts that may go: a token still gets as many as it did."""
    left = max(group.least, at_least(pruning.floor, group.units))
    return max(0, min(group.units - left, at_most(pruning.cap, group.units)))


def _share_of_experts(experts: int, most: int, pruning: Pruning) -> int:
    """The sparsity of a layer's experts, counted.

    Raises:
        InputError: if so many may not go.
    """
    wanted = at_least(pruning.sparsity, experts)
    if wanted > most:
        raise InputError(
            f"sparsity {pruning.sparsity} of units is out of reach: at most {most} of {experts} experts may go in each "
            f"layer; use at most {at_most(100 * most / experts, 1) / 100}"
        )
    return wanted


def _stays_possible(group: Group, count: int) -> bool:
    return group.widths is None or group.units - count in group.widths


def expert_price(groups: Groups, layer: int) -> int:
    """Parameters of one whole expert of a layer with its part of the router."""
    channels = sum(g.units * g.cost for g in groups if g.layer == layer and g.expert is not None)
    (whole,) = (group for group in groups if group.layer == layer and group.kind == "expert")
    return whole.cost + channels // whole.units


def experts_bring(groups: Groups, experts: Mapping[str, int], layers: frozenset[int]) -> int:
    """Parameters of the experts that go, apart from those of layers that go whole."""
    routed = (group for group in groups if group.kind == "expert" and group.layer not in layers)
    return sum(count * expert_price(groups, g.layer) for g in routed if (count := experts[g.name]))


def experts_damage(
    groups: Groups, gone: Mapping[str, int], experts: Mapping[str, int], scores: Mapping[str, Tensor]
) -> float:
    """Sum of the scores of the experts that go and were there before."""
    emptied = emptied_layers(groups, {group.name: gone[group.name] for group in groups})
    return sum(
        float(scores[group.name].sort().values[: experts[group.name] - gone[group.name]].sum())
        for group in groups
        if group.kind == "expert" and group.layer not in emptied and experts[group.name] < group.units
    )
