"""Where a model's knowledge sits: the sensitivity of every group as a table and as a heat map."""

from collections.abc import Collection

from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

from regrow.planning.sensitivity import Sensitivity
from regrow.report.picture import INK, PAPER, canvas, text_width

MARK = "●"
LARGE, SIZE, SMALL = 12.0, 8.5, 7.5
"""Of letters, in points, as everything here."""
ROW, CELL, MARGIN, LEFT, ABOVE = 16.0, 92.0, 24.0, 52.0, 62.0
SCALE_STEPS, SCALE_HEIGHT = 60, 10.0


def show_sensitivity(sensitivity: Sensitivity, protected: Collection[str], console: Console) -> None:
    """One row per group, and per kind with all layers pruned at once: what each share costs."""
    shares = [f"−{share:.0%}" for share in sensitivity.conditions.shares]
    title = "rise of the held-out loss, nats per token, by the share removed"
    table = Table("layer", "kind", "units", *shares, "mean", "", title=title)
    rows = {**sensitivity.groups, **{f"layers.all.{kind}": group for kind, group in sensitivity.together.items()}}
    for name, group in rows.items():
        _, layer, kind = name.split(".")
        deltas = [f"{delta:+.3f}" for delta in group.deltas]
        mark = "protected" if name in protected else ""
        table.add_row(layer, kind, str(group.units), *deltas, f"{group.mean:+.3f}", mark)
    console.print(table)
    wanted = sensitivity.conditions
    console.print(
        f"held-out loss of the whole model {sensitivity.dense_nll:.4f} nats per token "
        f"({wanted.windows} windows of {wanted.length} tokens); units chosen by {wanted.criterion}",
        soft_wrap=True,
        highlight=False,
    )


def draw_sensitivity(sensitivity: Sensitivity, protected: Collection[str]) -> Figure:
    """Layers from top to bottom, kinds side by side; the colour, and the figure in each cell, is the mean rise."""
    cells = {(int(name.split(".")[1]), name.split(".")[2]): name for name in sensitivity.groups}
    layers, kinds = sorted({layer for layer, _ in cells}), sorted({kind for _, kind in cells})
    means = [group.mean for group in sensitivity.groups.values()]
    low, high = min(0.0, *means), max(*means, 1e-9)
    norm, colours = PowerNorm(0.5, vmin=low, vmax=high), colormaps["YlGnBu"]
    shares = ", ".join(f"{share:.0%}" for share in sensitivity.conditions.shares)
    head = "Sensitivity"
    notes = [f"rise of the held-out loss, nats per token, mean over {shares} removed", f"{MARK} protected"]
    width = max(LEFT + CELL * len(kinds), *(text_width(note, SMALL) for note in notes))
    below = 3.2 * ROW
    figure, axes = canvas(width + 2 * MARGIN, 2 * MARGIN + ABOVE + ROW * len(layers) + below)
    axes.text(MARGIN, MARGIN + LARGE, head, fontsize=LARGE, weight="bold", color=INK)
    axes.text(MARGIN, MARGIN + LARGE + ROW, notes[0], fontsize=SMALL, color=INK)
    axes.text(MARGIN, MARGIN + LARGE + 1.8 * ROW, notes[1], fontsize=SMALL, color=INK)

    left, top = MARGIN + LEFT, MARGIN + ABOVE
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

    y = top + ROW * (len(layers) + 0.8)
    step = CELL * len(kinds) / SCALE_STEPS
    for number in range(SCALE_STEPS):
        value = low + (high - low) * number / (SCALE_STEPS - 1)
        corner = (left + step * number, y)
        axes.add_patch(Rectangle(corner, step * 1.05, SCALE_HEIGHT, facecolor=colours(norm(value)), linewidth=0))
    for x, value, side in ((left, low, "left"), (left + CELL * len(kinds), high, "right")):
        axes.text(x, y + SCALE_HEIGHT + 11, f"{value:.4f}", fontsize=SMALL, color=INK, ha=side)
    return figure
