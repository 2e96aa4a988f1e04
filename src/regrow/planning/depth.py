"""Whole layers beside widths: which may go, in which order, and what they bring."""

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from regrow.planning.counts import at_least, at_most
from regrow.settings import Pruning
from regrow.structure.groups import Groups, Layer


def emptied_layers(groups: Groups, counts: Mapping[str, int]) -> frozenset[int]:
    """Numbers of the layers that have lost everything: a group keeps a unit as long as its layer (or expert) stays."""
    return frozenset(group.layer for group in groups if group.expert is None and counts[group.name] == group.units)


def outer_layers(groups: Groups, pruning: Pruning) -> set[int]:
    """Numbers of the first and last layers that the recipe protects."""
    layers = len(groups.layers)
    return {*range(at_most(pruning.protect_first, layers)), *range(layers - pruning.protect_last, layers)}


def layer_price(layer: Layer, pruning: Pruning) -> int:
    """What removing a layer of the original model brings, in parameters."""
    return layer.parameters if pruning.basis == "total" else layer.block_parameters


def layers_wanted(groups: Groups, pruning: Pruning) -> int:
    """Layers to remove when units of each kind are counted: their own share, which must not overshoot the widths'."""
    rounded = at_least if set(pruning.kinds) == {"layer"} else at_most
    return rounded(pruning.sparsity, len(groups.layers))


def layer_damage(groups: Groups, number: int, scores: Mapping[str, Tensor]) -> float:
    """A layer's own score, or, from a criterion that gives none, the sum of its units' (whole experts aside)."""
    own = scores.get(f"layers.{number}")
    if own is not None:
        return float(own.sum())
    return sum(float(scores[group.name].sum()) for group in groups if group.layer == number and group.kind != "expert")


def least_damaging(
    groups: Groups, numbers: Collection[int], gone: Mapping[str, int], scores: Mapping[str, Tensor], pruning: Pruning
) -> list[int]:
    """Layers by what they do damage per parameter that is still there, least first."""
    left = {layer.number: layer_price(layer, pruning) for layer in groups.layers}
    for group in groups:
        left[group.layer] -= gone[group.name] * group.cost
    return sorted(numbers, key=lambda number: (layer_damage(groups, number, scores) / left[number], number))


def layer_choices(
    groups: Groups, gone: Mapping[str, int], scores: Mapping[str, Tensor], pruning: Pruning
) -> Iterator[frozenset[int]]:
    """Sets of layers to remove whole, each one layer larger than the last.

    All hold the layers that are gone already; the others come in order of their damage per parameter. The last set
    reaches the target by itself, or holds all that may go. When units of each kind are counted there is one set.
    """
    chosen = emptied_layers(groups, gone)
    if "layer" not in pruning.kinds:
        yield chosen
        return
    count = len(groups.layers)
    free = {group.layer for group in groups} - outer_layers(groups, pruning) - chosen
    order = least_damaging(groups, free, gone, scores, pruning)
    most = min(count - max(1, at_least(pruning.floor, count)), at_most(pruning.cap, count))
    order = order[: max(0, most - len(chosen))]
    if pruning.basis == "units":
        yield chosen.union(order[: max(0, layers_wanted(groups, pruning) - len(chosen))])
        return
    prices = {layer.number: layer_price(layer, pruning) for layer in groups.layers}
    whole = groups.parameters(pruning.basis)
    yield chosen
    for number in order:
        if sum(prices[n] for n in chosen) >= pruning.sparsity * whole:
            return
        chosen |= {number}
        yield chosen
