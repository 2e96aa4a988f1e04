"""A comparison as one HTML file that needs no other, and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from regrow.comparison.pictures import loss_over_runs, quality_against_size, quality_against_speed
from regrow.comparison.table import (
    Row,
    cost_table,
    doubts,
    overlap_line,
    quality_table,
    task_table,
)
from regrow.report.picture import to_svg
from regrow.report.words import table

READING = (
    "Mean ± standard deviation over the seeds. Δ is ln(perplexity) − ln(dense perplexity). “Cut only” is the "
    "plan alone: its units gated off in the dense weights. Removed: shares of the units, of the blocks' parameters and "
    "of all parameters. Trainable parameters are those left at the end."
)

COST = "Peak memory is the GPU's where one was used, else the process' above its imports."
SPEED = " A speed-up is the result's speed ÷ the dense model's."


@dataclass(frozen=True)
class Section:
    """A table with its name."""

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""
    """What its columns are, where that is not said above all tables."""


def sections(rows: Sequence[Row]) -> list[Section]:
    """The tables of a comparison."""
    found = [Section(f"Quality: perplexity, {', '.join(rows[0].protocols)}", *quality_table(rows))]
    if rows[0].tasks:
        found.append(Section("Zero-shot tasks", *task_table(rows)))
    note = COST + (SPEED if any(row.speedups("decode") for row in rows) else "")
    return [*found, Section("Cost and speed", *cost_table(rows), note)]


def _measured(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    return {**facts, "overlap": overlap_line(rows)}


def markdown(rows: Sequence[Row], facts: dict[str, Any], failed: dict[str, str]) -> str:
    """All tables, what to doubt, and what it was measured on."""
    parts = [f"# {facts['model']}: {', '.join(dict.fromkeys(row.contender for row in rows))}", READING]
    parts += [f"* {doubt}" for doubt in doubts(rows)]
    parts += [f"* {name} failed: {reason}" for name, reason in failed.items()]
    for section in sections(rows):
        drawn = table(section.head, section.lines, figures=True)
        parts += [f"## {section.title}", *([section.note] if section.note else []), drawn]
    parts += ["## Measured with", *(f"* {key}: {value}" for key, value in _measured(rows, facts).items())]
    return "\n\n".join(parts) + "\n"


def html(rows: Sequence[Row], facts: dict[str, Any], failed: dict[str, str]) -> str:
    """The same with pictures."""
    drawn: dict[str, Figure | None] = {
        "Quality against size": quality_against_size(rows),
        "Quality against measured speed": quality_against_speed(rows),
        "Validation loss over the runs": loss_over_runs(rows),
    }
    template = Environment(
        loader=PackageLoader("regrow.comparison", "."), autoescape=True, undefined=StrictUndefined
    ).get_template("page.html")
    pictures = {name: to_svg(figure) for name, figure in drawn.items() if figure is not None}
    return template.render(
        title=f"{facts['model']}: {', '.join(dict.fromkeys(row.contender for row in rows))}",
        reading=READING,
        doubts=doubts(rows),
        failed=failed,
        sections=sections(rows),
        pictures={name: svg[svg.index("<svg") :] for name, svg in pictures.items()},
        facts=_measured(rows, facts),
    )
