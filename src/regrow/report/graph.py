"""The dependency graph of a decoder layer, drawn: what hangs together, and which group takes what with it.

Beside every weight stand two bars: left for its rows (outputs), right for its columns (inputs), in the colour
of the group that owns them.
"""

from collections.abc import Mapping
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path

from regrow.planning.demand import UNIT_NAMES
from regrow.report.layout import Box, Line, Point, place
from regrow.report.picture import FAINT, INK, PALETTE, PAPER, WHOLE, canvas, text_width
from regrow.structure.graph import LayerGraph, Operator, Weight

LARGE, SIZE, SMALL = 12.0, 9.0, 7.5
"""Of letters, in points, as everything here."""
LINE, PAD, BAR, HEAD = 14.0, 9.0, 5.0, 6.0
MARGIN, ABOVE, INDENT = 24.0, 34.0, 20.0


def draw_graph(graph: LayerGraph) -> Figure:
    """One decoder layer from top to bottom, with a legend."""
    colour = {group.name: PALETTE[n % len(PALETTE)] for n, group in enumerate(graph.groups)}
    boxes, lines = place([_size(operator) for operator in graph.operators], [(e.source, e.target) for e in graph.edges])
    legend = _legend(graph, colour)
    heading = f"{graph.model}, decoder layer {graph.layer}"
    lanes = [line.lane[0] for line in lines.values() if line.lane]
    left, right = min([*lanes, *(box.left for box in boxes)]), max([*lanes, *(box.right for box in boxes)])
    words = [text_width(heading, LARGE, bold=True), *(INDENT + text_width(text, SMALL) for _, text in legend)]
    width, bottom = max(right - left, *words), max(box.bottom for box in boxes)
    figure, axes = canvas(width + 2 * MARGIN, ABOVE + bottom + LINE * (len(legend) + 1) + 2 * MARGIN)
    x, y = MARGIN + (width - (right - left)) / 2 - left, MARGIN + ABOVE

    axes.text(MARGIN, MARGIN + LARGE, heading, fontsize=LARGE, weight="bold", color=INK)
    for edge in graph.edges:
        _draw_line(axes, lines[edge.source, edge.target], (x, y), colour[edge.group] if edge.group else INK)
    for number, (operator, box) in enumerate(zip(graph.operators, boxes, strict=True)):
        around = {edge.group for edge in graph.edges if number in (edge.source, edge.target)}
        inner = next(iter(around)) if len(around) == 1 else None
        _draw_operator(axes, operator, box.moved(x, y), colour, colour[inner] if inner else None)
    for number, (swatches, text) in enumerate(legend):
        top = y + bottom + LINE * (number + 1.5)
        for count, swatch in enumerate(swatches):
            axes.add_patch(Rectangle((MARGIN + 8 * count, top), BAR, SMALL, color=swatch, linewidth=0))
        axes.text(MARGIN + INDENT, top + SMALL - 1, text, fontsize=SMALL, color=INK)
    return figure


def _size(operator: Operator) -> tuple[float, float]:
    lines = [text_width(_describe(weight), SIZE) + 2 * (BAR + 5) for weight in operator.weights]
    width = max([text_width(operator.title, SIZE, bold=True), text_width(_tag(operator), SMALL), *lines])
    return width + 2 * PAD, LINE * (1 + bool(_tag(operator)) + len(operator.weights)) + PAD


def _describe(weight: Weight) -> str:
    return f"{weight.role}  {' × '.join(f'{size:,}' for size in weight.shape)}"


def _tag(operator: Operator) -> str:
    return "one operator: W + s·BA" if operator.composed else ""


def _draw_operator(axes: Axes, operator: Operator, box: Box, colour: Mapping[str, str], inner: str | None) -> None:
    """A box; tinted with the colour of the group that it lies wholly within."""
    corner = (box.left, box.top)
    style = "round,pad=0,rounding_size=5"
    axes.add_patch(FancyBboxPatch(corner, box.width, box.height, style, facecolor=PAPER, edgecolor="none", zorder=2))
    face = to_rgba(inner, 0.15) if inner else "none"
    edge = inner or INK
    axes.add_patch(FancyBboxPatch(corner, box.width, box.height, style, facecolor=face, edgecolor=edge, zorder=2))
    y = box.top + PAD / 2 + LINE * 0.75
    axes.text(box.x, y, operator.title, fontsize=SIZE, weight="bold", color=INK, ha="center", zorder=3)
    if tag := _tag(operator):
        y += LINE
        axes.text(box.x, y, tag, fontsize=SMALL, color=FAINT, ha="center", zorder=3)
    for weight in operator.weights:
        y += LINE
        axes.text(box.x, y, _describe(weight), fontsize=SIZE, color=INK, ha="center", zorder=3)
        _draw_bar(axes, (box.left + PAD, y), [colour[name] for name in weight.rows])
        if len(weight.shape) > 1:
            _draw_bar(axes, (box.right - PAD - BAR, y), [colour[name] for name in weight.columns])


def _draw_bar(axes: Axes, corner: Point, owners: list[str]) -> None:
    height = (LINE - 3) / max(len(owners), 1)
    for number, owner in enumerate(owners or [WHOLE]):
        start = (corner[0], corner[1] - LINE * 0.7 + height * number)
        axes.add_patch(Rectangle(start, BAR, height, facecolor=owner, linewidth=0, zorder=3))


def _draw_line(axes: Axes, line: Line, origin: Point, colour: str) -> None:
    """Straight where it can be, else curves that leave and arrive upright."""
    stops = [line.start, line.end]
    if line.lane:
        x, upper, lower = line.lane
        stops[1:1] = [(x, upper), (x, lower)]
    stops = [(x + origin[0], y + origin[1]) for x, y in stops]
    end = stops[-1]
    stops[-1] = (end[0], end[1] - HEAD / 2)  # no line beside the arrow's point
    vertices, codes = [stops[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(stops):
        if x0 == x1:
            vertices, codes = [*vertices, (x1, y1)], [*codes, Path.LINETO]
        else:
            half = (y0 + y1) / 2
            vertices, codes = [*vertices, (x0, half), (x1, half), (x1, y1)], [*codes, *[Path.CURVE4] * 3]
    axes.add_patch(PathPatch(Path(vertices, codes), facecolor="none", edgecolor=colour, linewidth=1.3, zorder=1))
    head = [end, (end[0] - HEAD / 2, end[1] - HEAD), (end[0] + HEAD / 2, end[1] - HEAD)]
    axes.add_patch(Polygon(head, closed=True, facecolor=colour, edgecolor="none", zorder=2))


def _legend(graph: LayerGraph, colour: Mapping[str, str]) -> list[tuple[list[str], str]]:
    lines = []
    for group in graph.groups:
        name = UNIT_NAMES.get(group.kind, "units")
        if group.kind == "attention":
            name += " with their query heads"
        text = f"{group.kind}: {group.units:,} {name}, {group.cost:,} parameters each"
        lines.append(([colour[group.name]], text))
    lines.append(([WHOLE], "no group's: stays whole (residual stream, LoRA rank, norms)"))
    lines.append(([INK], "lines: the residual stream in black, a group's channels in its colour"))
    lines.append(([FAINT, FAINT], "bars beside a weight: left its rows (outputs), right its columns (inputs)"))
    if any(operator.composed for operator in graph.operators):
        lines.append(([], "W and B lose rows with the group that owns the output, W and A columns with the input's"))
    return lines
