"""What can be cut from a model, in words, and what of it a recipe asks for in vain."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable

from transformers import PretrainedConfig

from regrow.checkpoint.stock import Widths, check_fewer_layers, check_free, hidden_widths, stock_widths
from regrow.errors import InputError
from regrow.planning.demand import UNIT_NAMES, widths_left
from regrow.settings import Pruning
from regrow.structure.groups import Groups
from regrow.structure.per_layer import needs_own_class

NONE = "it has none, or none that a gate could be put on"


def check_offer(config: PretrainedConfig, groups: Groups, pruning: Pruning) -> list[str]:
    """Refuse what cannot be saved in the end, before any work is done.

    Args:
        groups: with widths, see `prunable_groups`.

    Returns:
        What the recipe wants to cut and will have to leave whole, one sentence each.

    Raises:
        InputError: if nothing of what the recipe wants to cut can be; the message says why.
    """
    parts = [f"{name} stays {why}" for name, why in opaque_parts(groups).items()]
    if pruning.shape == "free":
        check_free(config, groups)
        return parts
    offered = {group.base_kind for group in groups if group.widths and len(group.widths) > 1}
    hidden = hidden_widths(config, groups) if "hidden" in pruning.kinds else Widths((), "")
    if len(hidden.counts) > 1:
        offered.add("hidden")
        if hidden.refusal and "attention" in pruning.kinds and "attention" in offered:
            raise InputError(
                f"a {config.model_type!r} model cannot be saved with fewer heads and fewer hidden channels at once "
                f"({hidden.refusal}); take attention or hidden out of pruning.kinds"
            )
    wanted = [kind for kind in pruning.kinds if kind != "layer" and kind not in offered]
    refusals = {kind: widths.refusal for kind, widths in stock_widths(config, groups).items()} if wanted else {}
    refusals["hidden"] = hidden.refusal
    told = [f"{UNIT_NAMES[kind]} stay as they are: {refusals.get(kind, NONE)}" for kind in wanted]
    if len(told) == len(pruning.kinds):
        raise InputError(
            f"a {config.model_type!r} model cannot be saved with less of what pruning.kinds names "
            f"({'; '.join(told + parts)}); try pruning.kinds=[layer]"
        )
    return told + parts


def allowed(groups: Groups, pruning: Pruning) -> list[str]:
    """Among which numbers of units the plan will choose, in a sentence; none where only layers go."""
    kinds = [
        f"{ranges(counts)} of {counts[-1]} {UNIT_NAMES.get(kind, kind)}"
        for kind, counts in sorted(widths_left(groups, pruning).items())
    ]
    where = "each layer by itself" if pruning.shape == "free" else "every layer alike"
    return [f"may stay, in {where}: {'; '.join(kinds)}"] if kinds else []


def choices(config: PretrainedConfig, groups: Groups) -> dict[str, str]:
    """What can be cut from a model and which numbers may be left, in words: what `regrow inspect` shows."""
    told: dict[str, str] = {}
    if needs_own_class(config):
        return {"anything": "no: its layers have widths of their own already"}
    for kind, widths in stock_widths(config, groups).items():
        where = "every layer" if _in_all(groups, kind) else "every layer that has some"
        of = f"{ranges(widths.counts)} of {widths.counts[-1]} in {where}"
        told[f"{UNIT_NAMES.get(kind, kind)}"] = of if not widths.refusal else f"{of} (others: {widths.refusal})"
    told |= opaque_parts(groups)
    hidden = hidden_widths(config, groups)
    of = f"{ranges(hidden.counts)} in all layers alike" if hidden.counts else "as they are"
    told[UNIT_NAMES["hidden"]] = of if not hidden.refusal else f"{of} (others: {hidden.refusal})"
    total = len(groups.layers)
    told["layers"] = _told(lambda: check_fewer_layers(config), f"{ranges(range(1, total + 1))} of {total}")
    told["widths of its own for each layer"] = _told(lambda: check_free(config, groups), "yes (pruning.shape=free)")
    return told


def opaque_parts(groups: Groups) -> dict[str, str]:
    """Parts of layers that tracing cannot see into, those of a name together, and why."""
    uses: dict[str, list[str]] = defaultdict(list)
    for name, operator in groups.opaque.items():
        uses[name.rpartition(".")[2]].append(operator)
    return {
        f"{name} of {len(operators)} of {len(groups.layers)} layers": (
            f"as it is: it uses {' or '.join(dict.fromkeys(operators))}, which has no pruning rule"
        )
        for name, operators in uses.items()
    }


def _in_all(groups: Groups, kind: str) -> bool:
    return {group.layer for group in groups if group.kind == kind} == {layer.number for layer in groups.layers}


def _told(check: Callable[[], None], fine: str) -> str:
    try:
        check()
    except InputError as error:
        return f"no: {error}"
    return fine


def ranges(counts: Iterable[int]) -> str:
    """Numbers for a reader: `1, 2, 4`, `1–40`, `8, 16, …, 64`, `8, 16, …, 64, 70`."""
    counts = list(counts)
    steps = [after - before for before, after in itertools.pairwise(counts)]
    if len(counts) > 3 and steps[0] > 1 and len(set(steps)) == 1:
        return f"{counts[0]}, {counts[1]}, …, {counts[-1]}"
    if len(counts) > 4 and steps[0] > 1 and len(set(steps[:-1])) == 1:
        return f"{ranges(counts[:-1])}, {counts[-1]}"
    runs: list[list[int]] = []
    for count in counts:
        if runs and count == runs[-1][-1] + 1:
            runs[-1][1:] = [count]
        else:
            runs.append([count])
    return ", ".join("–".join(map(str, run)) for run in runs)
