"""A comparison's pictures: quality against size, against measured speed, and the loss over the runs."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from regrow.comparison.table import Row
from regrow.report.picture import FAINT, PALETTE, PAPER

MARKERS = "osD^vPX*"
SIZE = (6.4, 4.0)
"""Inches."""


def quality_against_size(rows: Sequence[Row]) -> Figure:
    """Δ over the result's parameters, a line per contender."""
    return _scatter(rows, lambda row: row.parameters / 1e6, "million parameters")


def quality_against_speed(rows: Sequence[Row]) -> Figure | None:
    """Δ over the measured speed-up of decoding, at the first batch, of the rows that have it; None if none has."""
    measured = [row for row in rows if row.speedups("decode")]
    if not measured:
        return None
    first = next(iter(measured[0].speedups("decode")))
    measured = [row for row in measured if first in row.speedups("decode")]
    return _scatter(measured, lambda row: row.speedups("decode")[first].mean, "decode speed ÷ the dense model's")


def loss_over_runs(rows: Sequence[Row]) -> Figure:
    """Validation loss of each contender's first seed, a picture for each sparsity."""
    asked = sorted({row.asked for row in rows})
    figure = Figure(figsize=(SIZE[0], SIZE[1] * len(asked)), facecolor=PAPER, layout="constrained")
    for number, share in enumerate(asked):
        axes = figure.add_subplot(len(asked), 1, number + 1)
        for colour, marker, label in _styles(rows):
            for row in (row for row in rows if row.asked == share and row.contender == label):
                found = row.runs[0]["history"]["validations"]
                axes.plot(
                    [one["step"] for one in found], [one["loss"] for one in found],
                    color=colour, marker=marker, markersize=3, label=label,
                )  # fmt: skip
        axes.set(xlabel="step", ylabel="validation loss, nats a token", title=f"{share:.0%} asked")
        axes.grid(color=FAINT, alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _scatter(rows: Sequence[Row], x: Callable[[Row], float], label: str) -> Figure:
    figure = Figure(figsize=SIZE, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    protocol = rows[0].protocols[0]
    for colour, marker, name in _styles(rows):
        own = sorted((row for row in rows if row.contender == name), key=x)
        deltas = [row.delta(protocol) for row in own]
        axes.errorbar(
            [x(row) for row in own], [delta.mean for delta in deltas], [delta.deviation or 0.0 for delta in deltas],
            color=colour, marker=marker, capsize=3, label=name,
        )  # fmt: skip
    axes.set(xlabel=label, ylabel=f"ln(perplexity ÷ dense), {protocol}")
    axes.grid(color=FAINT, alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _styles(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Colour, marker and name of each contender."""
    names = list(dict.fromkeys(row.contender for row in rows))
    return [(PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)], name) for n, name in enumerate(names)]
