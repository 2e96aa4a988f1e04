"""Sensitivity as a table for the reports: layers from top to bottom, kinds side by side."""

import math
from statistics import fmean
from typing import Any

from regrow.planning.sensitivity import GroupSensitivity, Sensitivity
from regrow.report.words import place

OFF = 0.03
"""A share further than this from the one asked for is told."""


def is_off(share: float, asked: float) -> bool:
    """Whether a number of units is another share than the one asked for to a reader, too."""
    return abs(share - asked) > OFF


def rounded_lines(sensitivity: Sensitivity) -> list[str]:
    """Of kinds with too few units for the shares asked for: what was removed, each number of units once."""
    wanted = sensitivity.conditions.shares
    told: dict[str, dict[str, None]] = {}
    for name, group in sensitivity.groups.items():
        if any(map(is_off, group.shares, wanted)):
            shares = ", ".join(f"{share:.0%}" for share in dict.fromkeys(group.shares))
            told.setdefault(place(name)[1], {})[shares] = None
    return [f"{kind}: {' or '.join(found)}, as it has few units" for kind, found in told.items()]


def heat_of(sensitivity: Sensitivity, protect: float) -> dict[str, Any]:
    """What the page's table and the text's show: kinds, rows of cells with their shades, and what they tell of."""
    protected = sensitivity.protected(protect)
    parts: dict[tuple[int, str], list[str]] = {}
    for name in sensitivity.groups:
        parts.setdefault(place(name), []).append(name)
    means = {at: fmean(sensitivity.groups[name].mean for name in names) for at, names in parts.items()}
    most = max(*means.values(), 1e-9)
    layers: dict[int, dict[str, dict[str, Any]]] = {}
    for (layer, kind), mean in means.items():
        mark = " ●" if set(parts[layer, kind]) & set(protected) else ""
        shade = math.sqrt(max(mean, 0.0) / most)
        layers.setdefault(layer, {})[kind] = {"text": f"{mean:.4f}{mark}", "shade": shade}
    kinds = sorted({kind for cells in layers.values() for kind in cells})
    together = {place(f"layers.0.{kind}")[1]: group for kind, group in sensitivity.together.items()}
    rows = [{"layer": str(n), "cells": [cells.get(kind) for kind in kinds]} for n, cells in sorted(layers.items())]
    return {
        "kinds": kinds,
        "rows": [*rows, {"layer": "all", "cells": [_unshaded(together.get(kind)) for kind in kinds]}],
        "told": _told(sensitivity),
        "protected": bool(protected),
    }


def _unshaded(group: GroupSensitivity | None) -> dict[str, Any] | None:
    """A cell of all layers, which would leave the others pale."""
    return {"text": f"{group.mean:.4f}", "shade": 0.0} if group else None


def _told(sensitivity: Sensitivity) -> str:
    wanted = sensitivity.conditions
    shares = ", ".join(f"{share:.0%}" for share in wanted.shares)
    rounded = "".join(f" ({line})" for line in rounded_lines(sensitivity))
    return (
        f"What pruning each part alone does to the whole model, as the rise of its held-out loss: "
        f"the mean over {shares} of its units removed{rounded}, "
        f"those with the lowest {wanted.criterion} scores; the whole model's loss is {sensitivity.dense_nll:.4f} nats "
        f"per token ({wanted.windows} windows of {wanted.length} tokens). Last, all layers at once."
    )
