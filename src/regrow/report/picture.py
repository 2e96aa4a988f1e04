"""Pictures as SVG: a canvas whose unit is the point, and files that are either an .svg or a page around one.

Text is drawn as outlines, so that it has the same size wherever the file is opened; it is measured before it is
placed.
"""

import html
import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from regrow.checkpoint.files import write_text
from regrow.errors import InputError

POINTS_PER_INCH = 72
SUFFIXES = (".svg", ".html")

INK, FAINT, PAPER = "#222222", "#8a8a8a", "#ffffff"
WHOLE = "#cfcfcf"
"""What no group owns."""
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours that people with any kind of colour vision can tell apart (Okabe and Ito)."""


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture of so many points; y grows downwards."""
    figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return figure, axes


def text_width(text: str, size: float, bold: bool = False) -> float:
    """How wide a line of text is, in points."""
    if not text:
        return 0.0
    font = FontProperties(weight="bold" if bold else "normal")
    return float(TextPath((0, 0), text, size=size, prop=font).get_extents().x1)


def to_svg(figure: Figure) -> str:
    """The picture as SVG; the same picture gives the same bytes."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "regrow", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def check_picture_name(path: Path) -> None:
    """See whether a picture can have that name.

    Raises:
        InputError: if its suffix is none of ours.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: pictures are written as .svg or .html; give a name that ends in one of them")


def write_picture(path: Path, figure: Figure, title: str) -> None:
    """Write a picture as an .svg, or as an .html that needs no other file.

    Raises:
        InputError: if the suffix is neither.
    """
    check_picture_name(path)
    svg = to_svg(figure)
    if path.suffix.lower() == ".html":
        name, drawing = html.escape(title), svg[svg.index("<svg") :]
        svg = (
            f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{name}</title></head>\n'
            f'<body style="margin:2em;text-align:center">\n<figure role="img" aria-label="{name}">\n{drawing}'
            "</figure>\n</body>\n</html>\n"
        )
    write_text(path, svg)
