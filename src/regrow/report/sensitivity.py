"""Where a model's knowledge sits: the sensitivity of every group as a table and as a heat map."""

from collections.abc import Collection

from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

from regrow.planning.sensitivity import Sensitivity
from regrow.report.heat import is_off, rounded_lines
from regrow.report.picture import INK, PAPER, canvas, text_width

MARK = "●"
LARGE, SIZE, SMALL = 12.0, 8.5, 7.5
"""Of letters, in points, as everything here."""
ROW, CELL, MARGIN, LEFT, ABOVE, NOTE = 16.0, 92.0, 24.0, 52.0, 36.4, 12.8
SCALE_STEPS, SCALE_HEIGHT = 60, 10.0


def show_sensitivity(sensitivity: Sensitivity, protected: Collection[str], console: Console) -> None:
    """One row per group, and per kind with all layers pruned at once: what each share costs."""
    wanted = sensitivity.conditions
    shares = [f"−{share:.0%}" for share in wanted.shares]
    title = "rise of the held-out loss, nats per token, by the share removed"
    table = Table("layer", "kind", "units", *shares, "mean", *([""] if protected else []), title=title)
    rows = {**sensitivity.groups, **{f"layers.all.{kind}": group for kind, group in sensitivity.together.items()}}
    for name, group in rows.items():
        _, layer, kind = name.split(".")
        deltas = [
            f"{delta:+.3f}" + (f" (−{share:.0%})" if is_off(share, asked) else "")
            for delta, share, asked in zip(group.deltas, group.shares, wanted.shares, strict=False)
        ]
        mark = ["protected" if name in protected else ""] if protected else []
        table.add_row(layer, kind, str(group.units), *deltas, f"{group.mean:+.3f}", *mark)
    console.print(table)
    if rounded_lines(sensitivity):
        console.print("in brackets what was removed where units are too few for that share", highlight=False)
    console.print(
        f"held-out loss of the whole model {sensitivity.dense_nll:.4f} nats per token "
        f"({wanted.windows} windows of {wanted.length} tokens); units chosen by {wanted.criterion}",
        soft_wrap=True,
        highlight=False,
    )


def draw_sensitivity(sensitivity: Sensitivity, protected: Collection[str]) -> Figure:
    """Layers from top to bottom, kinds side by side; the colour, and the figure in each cell, is the mean rise.

    Below them all layers at once, without a colour: the others would be pale beside it.
    """
    cells = {(int(name.split(".")[1]), name.split(".")[2]): name for name in sensitivity.groups}
    layers, kinds = sorted({layer for layer, _ in cells}), sorted({kind for _, kind in cells})
    means = [group.mean for group in sensitivity.groups.values()]
    low, high = min(0.0, *means), max(*means, 1e-9)
    norm, colours = PowerNorm(0.5, vmin=low, vmax=high), colormaps["YlGnBu"]
    shares = ", ".join(f"{share:.0%}" for share in sensitivity.conditions.shares)
    head = "Sensitivity"
    notes = [f"rise of the held-out loss, nats per token, mean over {shares} removed", *rounded_lines(sensitivity)]
    notes += [f"{MARK} protected"] if protected else []
    width = max(LEFT + CELL * len(kinds), *(text_width(note, SMALL) for note in notes))
    above, below = ABOVE + NOTE * len(notes), 4.2 * ROW
    figure, axes = canvas(width + 2 * MARGIN, 2 * MARGIN + above + ROW * len(layers) + below)
    axes.text(MARGIN, MARGIN + LARGE, head, fontsize=LARGE, weight="bold", color=INK)
    for number, note in enumerate(notes):
        axes.text(MARGIN, MARGIN + LARGE + ROW + NOTE * number, note, fontsize=SMALL, color=INK)

    left, top = MARGIN + LEFT, MARGIN + above
    for column, kind in enumerate(kinds):
        axes.text(left + CELL * (column + 0.5), top - 4, kind, fontsize=SIZE, weight="bold", color=INK, ha="center")
    for row, layer in enumerate(layers):
        y = top + ROW * (row + 0.7)
        axes.text(left - 6, y, f"layer {layer}", fontsize=SIZE, color=INK, ha="right")
        for column, kind in enumerate(kinds):
            if (name := cells.get((layer, kind))) is None:
                continue
            mean = sensitivity.groups[name].mean
            corner = (left + CELL * column, top + ROW * row)
            shade = colours(norm(mean))
            axes.add_patch(Rectangle(corner, CELL, ROW, facecolor=shade, edgecolor=PAPER, linewidth=1.0))
            ink = PAPER if 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.55 else INK
            text = f"{mean:.4f}" + (f" {MARK}" if name in protected else "")
            axes.text(corner[0] + CELL / 2, y, text, fontsize=SIZE, color=ink, ha="center")

    y = top + ROW * (len(layers) + 0.7)
    axes.text(left - 6, y, "all layers", fontsize=SIZE, color=INK, ha="right")
    for column, kind in enumerate(kinds):
        if kind in sensitivity.together:
            mean = sensitivity.together[kind].mean
            axes.text(left + CELL * (column + 0.5), y, f"{mean:.4f}", fontsize=SIZE, color=INK, ha="center")

    y = top + ROW * (len(layers) + 1.8)
    step = CELL * len(kinds) / SCALE_STEPS
    for number in range(SCALE_STEPS):
        value = low + (high - low) * number / (SCALE_STEPS - 1)
        corner = (left + step * number, y)
        axes.add_patch(Rectangle(corner, step * 1.05, SCALE_HEIGHT, facecolor=colours(norm(value)), linewidth=0))
    for x, value, side in ((left, low, "left"), (left + CELL * len(kinds), high, "right")):
        axes.text(x, y + SCALE_HEIGHT + 11, f"{value:.4f}", fontsize=SMALL, color=INK, ha=side)
    return figure
