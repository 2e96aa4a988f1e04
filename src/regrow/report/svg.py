"""Small charts as inline SVG, drawn to be read on a phone: 400 units wide, letters of 12.

Colours are classes (`c0` …, `ink`, `faint`), which the page's style gives values for light and dark. Everything
returns `Markup`: text is escaped, so that names from files are safe.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH, HEIGHT = 400.0, 246.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 22.0, 36.0
"""Margins around a plot."""
Point = tuple[float, float]
JOINED = Markup("\n")


@dataclass(frozen=True)
class Axis:
    """Values along one direction, and where they lie."""

    low: float
    high: float
    start: float
    """Where `low` lies, in units of the drawing."""
    end: float
    log: bool = False
    percent: bool = False
    whole: bool = False
    """Whether only whole numbers make sense."""

    def at(self, value: float) -> float:
        """Where a value lies."""
        low, high, value = np.log([self.low, self.high, value]) if self.log else (self.low, self.high, value)
        return float(self.start + (self.end - self.start) * (value - low) / (high - low))

    def ticks(self) -> list[tuple[float, str]]:
        """Round values within, with their labels."""
        decades = np.log10(self.high / self.low) if self.log else 0.0
        if decades > 0.7:
            subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0)
            values = LogLocator(base=10, subs=subs, numticks=12).tick_values(self.low, self.high)
            if decades > 8:
                values = values[:: int(np.ceil(decades / 6))]
        else:
            values = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=self.whole).tick_values(self.low, self.high)
        slack = 1e-9 * abs(self.high - self.low)
        inside = [float(value) for value in values if self.low - slack <= value <= self.high + slack]
        return [(value, self._label(value)) for value in inside]

    def _label(self, value: float) -> str:
        if self.percent:
            return f"{value:.0%}" if abs(self.high - self.low) > 0.045 else f"{value:.1%}"
        if abs(value) >= 1e4:
            for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
                if abs(value) >= factor:
                    return f"{value / factor:g}{letter}"
        return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:g}"


def across(values: Iterable[float], *, log: bool = False, percent: bool = False, pad: float = 0.0) -> Axis:
    """An axis from left to right that holds the values; `pad` is the share of their range left free on each side."""
    return _axis(values, LEFT, WIDTH - RIGHT, log, percent, pad)


def upward(
    values: Iterable[float],
    top: float = TOP,
    bottom: float = HEIGHT - BOTTOM,
    *,
    log: bool = False,
    percent: bool = False,
    whole: bool = False,
    pad: float = 0.06,
) -> Axis:
    """An axis from `bottom` up to `top` that holds the values."""
    return _axis(values, bottom, top, log, percent, pad, whole)


def _axis(
    values: Iterable[float], start: float, end: float, log: bool, percent: bool, pad: float, whole: bool = False
) -> Axis:
    given = list(values)
    low, high = min(given), max(given)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1))
    room = (high / low) ** pad if log else (high - low) * pad
    low, high = (low / room, high * room) if log else (low - room, high + room)
    return Axis(low, high, start, end, log, percent, whole)


def frame(x: Axis, y: Axis, x_name: str, y_name: str) -> list[Markup]:
    """Both axes with ticks, faint lines across, and names; an axis without a name has no labels."""
    parts = []
    for value, label in y.ticks():
        height = y.at(value)
        parts.append(_straight(x.start, height, x.end, height, "grid"))
        parts.append(letters(x.start - 6, height + 4, label, "tick end"))
    for value, label in x.ticks() if x_name else ():
        parts.append(_straight(x.at(value), y.start, x.at(value), y.start + 4, "axis"))
        parts.append(letters(x.at(value), y.start + 17, label, "tick middle"))
    parts.append(_straight(x.start, y.start, x.end, y.start, "axis"))
    if x_name:
        parts.append(letters((x.start + x.end) / 2, y.start + 32, x_name, "name middle"))
    parts.append(letters(x.start - 46, y.end - 10, y_name, "name"))
    return parts


def letters(x: float, y: float, text: str, css: str) -> Markup:
    """A line of text."""
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(x, y, css, text)


def _straight(x0: float, y0: float, x1: float, y1: float, css: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x0, y0, x1, y1, css)


def upright(x: Axis, y: Axis, value: float, css: str) -> Markup:
    """A line from bottom to top at a value of `x`."""
    return _straight(x.at(value), y.start, x.at(value), y.end, css)


def level(x: Axis, y: Axis, value: float, css: str) -> Markup:
    """A line from side to side at a value of `y`."""
    return _straight(x.start, y.at(value), x.end, y.at(value), css)


def curve(x: Axis, y: Axis, points: Sequence[Point], css: str) -> Markup:
    """Points joined by straight lines."""
    path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
    return Markup('<polyline points="{}" class="curve {}"/>').format(path, css)


def stairs(x: Axis, y: Axis, points: Sequence[Point], end: float, css: str) -> Markup:
    """Values that hold from their point on until the next one, the last until `end`."""
    steps: list[Point] = []
    for number, (a, b) in enumerate(points):
        steps += [(a, b), (points[number + 1][0] if number + 1 < len(points) else end, b)]
    return curve(x, y, steps, css)


def dot(x: Axis, y: Axis, point: Point, css: str, label: str = "", below: bool = False) -> Markup:
    """A point, with a label on the side where there is room, or below it."""
    a, b = x.at(point[0]), y.at(point[1])
    circle = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4" class="dot {}"/>').format(a, b, css)
    if not label:
        return circle
    if below:
        return circle + letters(min(a, x.end - 12), b + 17, label, "label middle")
    right = a < (x.start + x.end) / 2
    return circle + letters(a + (9 if right else -9), b + 4, label, "label" if right else "label end")


def bar(left: float, top: float, width: float, height: float, css: str) -> Markup:
    """A filled rectangle."""
    shape = '<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" class="bar {}"/>'
    return Markup(shape).format(left, top, width, height, css)


def picture(name: str, told: str, parts: Iterable[Markup], height: float = HEIGHT) -> Markup:
    """The drawing, with its name and what it shows for those who do not see it."""
    head = Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}"><title>{}</title>')
    return JOINED.join([head.format(WIDTH, height, f"{name}. {told}", name), *parts, Markup("</svg>")])
