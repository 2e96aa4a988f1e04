"""The hidden size beside other widths: how much of it goes, and what the others then still have to bring.

The hidden size is one number and crosses everything else, so it is settled first. The rest is planned on the model that
is that much narrower (`regrow.structure.residual.narrowed`), whose costs are those that are left: rows × columns.
"""

import math
from collections.abc import Callable, Mapping

from regrow.errors import InputError
from regrow.planning.counts import Counts, at_least, at_most
from regrow.planning.demand import reach
from regrow.planning.depth import emptied_layers, layer_price
from regrow.planning.experts import emptied_experts
from regrow.settings import Pruning
from regrow.structure.groups import RESIDUAL, Groups
from regrow.structure.residual import block_cost, narrowed

STEP = 8
"""Hidden widths are multiples of this, which kernels like, unless `pruning.multiple` says otherwise."""


def removals(groups: Groups, pruning: Pruning, gone: int = 0) -> list[int]:
    """How many hidden channels may be gone, ascending, given that so many are."""
    residual = groups.residual
    if residual is None:
        return [0]
    units, step = residual.units, pruning.multiple or STEP
    least = max(1, at_least(pruning.floor, units), units - at_most(pruning.cap, units))
    possible = range(1, units + 1) if residual.widths is None else residual.widths
    left = {width for width in possible if width >= least and width % step == 0} | {units}
    return sorted(units - width for width in left if units - width >= gone) or [gone]


def with_hidden(
    groups: Groups, gone: Mapping[str, int], pruning: Pruning, others: Callable[[Groups, Pruning], Counts]
) -> Counts:
    """Units that each group has lost once the target is reached, `residual` among them.

    Where tracing follows no one stream there is no hidden size to settle, and the others bring all.

    Args:
        gone: units lost already.
        others: counts of the other kinds that reach a target in a model that is narrower already.

    Raises:
        InputError: if the target is out of reach; the message says what is within it.
    """
    if groups.residual is None:
        return others(groups, _of_others(pruning))
    options = removals(groups, pruning, gone.get(RESIDUAL, 0))
    wanted = _wanted(groups, pruning)
    if set(pruning.kinds) == {"hidden"}:
        price = 1 if pruning.basis == "units" else _price(groups, pruning)
        enough = [count for count in options if count * price >= wanted]
        if not enough:
            raise _out_of_reach(groups, pruning, options[-1])
        return {**gone, RESIDUAL: enough[0]}
    first = _preferred(groups, pruning, options)
    most = first if pruning.hidden is not None else options[-1]
    for count in (option for option in options if first <= option <= most):
        less, rest = the_rest(groups, pruning, count)
        if pruning.basis == "units" or reach(less, rest, pruning.basis) >= wanted - count * _price(groups, pruning):
            counts = others(less, rest)
            if pruning.hidden is None and pruning.basis != "units":
                options = [option for option in options if option <= count]
                count = _give_back(groups, pruning, counts, options)
            return {**counts, RESIDUAL: count}
    raise _out_of_reach(groups, pruning, most)


def the_rest(groups: Groups, pruning: Pruning, removed: int) -> tuple[Groups, Pruning]:
    """The model without some hidden channels, and what is left to ask of it: the target less what they brought."""
    less = narrowed(groups, removed)
    rest = _of_others(pruning)
    if pruning.basis == "units":
        return less, rest
    amount = _wanted(groups, pruning) - removed * _price(groups, pruning)
    share = (amount - 0.5) / less.parameters(pruning.basis)  # half a parameter off: see `share_of`
    return less, rest.model_copy(update={"sparsity": share})


def _of_others(pruning: Pruning) -> Pruning:
    return pruning.model_copy(update={"kinds": tuple(kind for kind in pruning.kinds if kind != "hidden")})


def reach_with_hidden(groups: Groups, pruning: Pruning, basis: str) -> int:
    """Most parameters (of the blocks, or in total) that the recipe's shape and limits let go, of all its kinds."""
    pruning = pruning.model_copy(update={"basis": basis})
    if "hidden" not in pruning.kinds or groups.residual is None:
        return reach(groups, _of_others(pruning), basis)
    options = removals(groups, pruning)
    alone = set(pruning.kinds) == {"hidden"}
    count = options[-1] if alone or pruning.hidden is None else _preferred(groups, pruning, options)
    less, rest = the_rest(groups, pruning, count)
    return count * _price(groups, pruning) + (0 if alone else reach(less, rest, basis))


def _wanted(groups: Groups, pruning: Pruning) -> int:
    if pruning.basis == "units":
        return 0 if groups.residual is None else at_least(pruning.sparsity, groups.residual.units)
    return at_least(pruning.sparsity, groups.parameters(pruning.basis))


def _price(groups: Groups, pruning: Pruning) -> int:
    """What a hidden channel brings as long as everything else is there."""
    if groups.residual is None:
        return 0
    return groups.residual.cost if pruning.basis == "total" else block_cost(groups)


def _preferred(groups: Groups, pruning: Pruning, options: list[int]) -> int:
    """The removal asked for (never less), or the one nearest to the share that all kinds would lose alike."""
    units = 0 if groups.residual is None else groups.residual.units
    if pruning.hidden is not None or pruning.basis == "units":
        asked = pruning.sparsity if pruning.hidden is None else pruning.hidden
        return next((option for option in options if option >= asked * units - 1e-6), options[-1])
    wanted, low, high = _wanted(groups, pruning), 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _brought(groups, pruning, middle) >= wanted else (middle, high)
    return min(options, key=lambda option: abs(option - high * units))


def _brought(groups: Groups, pruning: Pruning, share: float) -> float:
    """What goes when everything that may go loses the same share."""
    channels = share * (0 if groups.residual is None else groups.residual.units)
    brought = channels * _price(groups, pruning)
    if set(pruning.kinds) == {"layer", "hidden"}:
        layers = sum(layer_price(layer, pruning) for layer in groups.layers)
        return brought + share * (layers - channels * sum(layer.block_hidden for layer in groups.layers))
    for group in groups:
        lost = share if group.base_kind in pruning.kinds else 0.0
        if group.expert is not None and "expert" in pruning.kinds:  # what is left of those experts that stay
            lost = 1 - (1 - lost) * (1 - share)
        brought += lost * group.units * (group.cost - channels * group.hidden)
    return brought


def _give_back(groups: Groups, pruning: Pruning, counts: Counts, options: list[int]) -> int:
    """The fewest hidden channels with which the target is still reached: the others may go in larger steps."""
    gone, counts = emptied_layers(groups, counts), emptied_experts(groups, counts)
    of_layers = sum(layer_price(layer, pruning) for layer in groups.layers if layer.number in gone)
    stay = [group for group in groups if group.layer not in gone]
    of_units = sum(group.cost * counts[group.name] for group in stay)
    lost = [layer for layer in groups.layers if layer.number in gone]
    total = pruning.basis == "total"
    on_channel = _price(groups, pruning) - sum(layer.hidden if total else layer.block_hidden for layer in lost)
    on_channel -= sum(group.hidden * counts[group.name] for group in stay)
    wanted = _wanted(groups, pruning) - of_layers - of_units
    return next(option for option in options if option * on_channel >= wanted)


def _out_of_reach(groups: Groups, pruning: Pruning, removed: int) -> InputError:
    units = 0 if groups.residual is None else groups.residual.units
    if pruning.basis == "units":
        within = removed / max(units, 1)
    else:
        within = reach_with_hidden(groups, pruning, pruning.basis) / groups.parameters(pruning.basis)
    return InputError(
        f"sparsity {pruning.sparsity} of {pruning.basis} is out of reach: with {units - removed} of {units} hidden "
        f"channels left, and as little as may be of the other kinds, {within:.3f} is removed; use at most "
        f"{math.floor(100 * within) / 100}"
    )
