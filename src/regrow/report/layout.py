"""Where the boxes of a layered drawing go, and how the lines between them run.

Boxes stand in rows, each below everything it depends on; a line that passes rows runs in a lane that no box of
those rows touches. Lengths are points, y grows downwards.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

GAP_X, GAP_Y, LANE = 26.0, 34.0, 16.0
Link = tuple[int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle by its middle and its upper edge."""

    x: float
    top: float
    width: float
    height: float

    def moved(self, x: float, y: float) -> "Box":
        """The box somewhere else."""
        return replace(self, x=self.x + x, top=self.top + y)

    @property
    def left(self) -> float:
        """X of the left edge."""
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        """X of the right edge."""
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        """Y of the lower edge."""
        return self.top + self.height


@dataclass(frozen=True)
class Line:
    """From the lower edge of one box to the upper edge of another, along a vertical lane in between if there is one."""

    start: Point
    end: Point
    lane: tuple[float, float, float] | None = None
    """x, and y from and to."""


def place(sizes: Sequence[tuple[float, float]], links: Sequence[Link]) -> tuple[list[Box], dict[Link, Line]]:
    """Boxes for numbered items of the given widths and heights, and lines for the links between them.

    Args:
        links: (from, to) with from < to.
    """
    row_of = _rows(len(sizes), links)
    rows: dict[int, list[int]] = defaultdict(list)
    for item, row in enumerate(row_of):
        rows[row].append(item)
    boxes: dict[int, Box] = {}
    top = 0.0
    for row in range(len(rows)):
        items = rows[row]
        wanted = [_mean([boxes[a].x for a, b in links if b == item]) for item in items]
        height = max(sizes[item][1] for item in items)
        for item, x in zip(items, _spread(wanted, [sizes[item][0] for item in items]), strict=True):
            boxes[item] = Box(x, top + (height - sizes[item][1]) / 2, *sizes[item])
        top += height + GAP_Y
    placed = [boxes[item] for item in range(len(sizes))]
    return placed, _route(placed, links, row_of, rows)


def _rows(count: int, links: Iterable[Link]) -> list[int]:
    """The length of the longest way to each item."""
    row = [0] * count
    for a, b in sorted(links, key=lambda link: link[1]):
        row[b] = max(row[b], row[a] + 1)
    return row


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _spread(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """The places nearest to those wanted (least squares) at which items in a row do not touch.

    Pool adjacent violators: with the widths taken off, the places must not descend.
    """
    taken = [sum(widths[:n]) + widths[n] / 2 + GAP_X * n for n in range(len(widths))]
    pools: list[list[float]] = []
    for want, offset in zip(wanted, taken, strict=True):
        pools.append([want - offset])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    free = [_mean(pool) for pool in pools for _ in pool]
    return [place + offset for place, offset in zip(free, taken, strict=True)]


def _route(
    boxes: Sequence[Box], links: Sequence[Link], row_of: Sequence[int], rows: Mapping[int, Sequence[int]]
) -> dict[Link, Line]:
    lanes: dict[Link, float] = {}
    for a, b in sorted(links, key=lambda link: row_of[link[1]] - row_of[link[0]]):
        passed = [boxes[item] for row in range(row_of[a] + 1, row_of[b]) for item in rows[row]]
        if passed:
            between = (row_of[a], row_of[b])
            busy = [
                x for (c, d), x in lanes.items() if row_of[c] < between[1] and between[0] < row_of[d]
            ]  # lanes that run beside this one
            lanes[a, b] = _lane(boxes[a].x, boxes[b].x, passed, busy)
    outs, ins = defaultdict(list), defaultdict(list)
    for a, b in links:
        outs[a].append((lanes.get((a, b), boxes[b].x), (a, b)))
        ins[b].append((lanes.get((a, b), boxes[a].x), (a, b)))
    starts = _ports(boxes, outs)
    ends = _ports(boxes, ins)
    lines = {}
    for a, b in links:
        if (a, b) not in lanes and len(outs[a]) == 1:
            starts[a, b] = min(max(ends[a, b], boxes[a].left + LANE), boxes[a].right - LANE)
        elif (a, b) not in lanes and len(ins[b]) == 1:
            ends[a, b] = min(max(starts[a, b], boxes[b].left + LANE), boxes[b].right - LANE)
        start, end = (starts[a, b], boxes[a].bottom), (ends[a, b], boxes[b].top)
        lane = None
        if (a, b) in lanes:
            upper = min(boxes[item].top for item in rows[row_of[a] + 1])
            lower = max(boxes[item].bottom for item in rows[row_of[b] - 1])
            lane = (lanes[a, b], upper, lower)
        lines[a, b] = Line(start, end, lane)
    return lines


def _lane(source: float, target: float, passed: Sequence[Box], busy: Sequence[float]) -> float:
    """An x that is free all the way: straight down, straight into the target, or outside of everything passed."""
    for x in (source, target):
        if all(x < box.left - LANE / 2 or x > box.right + LANE / 2 for box in passed) and x not in busy:
            return x
    x = min(box.left for box in passed) - LANE
    while any(abs(x - other) < LANE for other in busy):
        x -= LANE
    return x


def _ports(boxes: Sequence[Box], lines: Mapping[int, list[tuple[float, Link]]]) -> dict[Link, float]:
    """Where on a box's edge each of its lines begins or ends, in the order in which they come."""
    ports = {}
    for item, coming in lines.items():
        step = min(LANE, boxes[item].width / (len(coming) + 1))
        for number, (_, link) in enumerate(sorted(coming)):
            ports[link] = boxes[item].x + (number - (len(coming) - 1) / 2) * step
    return ports
