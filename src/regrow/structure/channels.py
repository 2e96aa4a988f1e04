"""Channels: integer names for the elements along tensor axes, and which of them must go together.

A *facet* is an integer array that names, for every element of a tensor, the channel it belongs to. It has
the tensor's number of axes and size 1 along every axis on which the name does not depend: the residual stream
`[batch, time, hidden]` has one facet of shape `[1, 1, hidden]`, queries `[batch, heads, time, head_dim]` have
one of shape `[1, heads, 1, head_dim]`. A weight has one facet per axis. Everything in this file is shape
arithmetic on facets; the operators' meaning is in `operators.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Facet = NDArray[np.int64]


@dataclass(frozen=True)
class Value:
    """A traced tensor: its shape, its facets, and whether it is a parameter (perhaps merely rearranged)."""

    shape: tuple[int, ...]
    facets: tuple[Facet, ...] = ()
    is_weight: bool = False
    among: Facet | None = None
    """Of positions (and what is counted of them): the channels that they were chosen among, shape `[size]`."""


class Channels:
    """Hands out channels and remembers which are tied; `classes` resolves the ties."""

    def __init__(self) -> None:
        self.count = 0
        self._ties: list[tuple[Facet, Facet]] = []

    def new(self, size: int) -> Facet:
        """`size` channels that nothing ties yet, shape `[size]`."""
        fresh = np.arange(self.count, self.count + size)
        self.count += size
        return fresh

    def tie(self, first: Facet, second: Facet) -> None:
        """Elements of `first` and `second` at the same (broadcast) place must be removed together."""
        left, right = np.broadcast_arrays(first, second)
        different = left != right
        self._ties.append((left[different], right[different]))

    def classes(self) -> Facet:
        """The smallest channel of each channel's connected component, shape `[count]`."""
        root = np.arange(self.count)
        if not self._ties:
            return root
        left = np.concatenate([tie[0] for tie in self._ties])
        right = np.concatenate([tie[1] for tie in self._ties])
        while True:
            low, high = np.minimum(root[left], root[right]), np.maximum(root[left], root[right])
            if np.array_equal(low, high):
                return root
            np.minimum.at(root, high, low)
            while not np.array_equal(root, root[root]):
                root = root[root]


def varies(facet: Facet, axes: Sequence[int] | None = None) -> bool:
    """Whether the facet's channels depend on any of `axes` (on any axis at all if `axes` is None)."""
    sizes = facet.shape if axes is None else [facet.shape[axis] for axis in axes]
    return any(size > 1 for size in sizes)


def overlap(first: Facet, second: Facet) -> bool:
    """Whether two facets of one tensor name the same thing: they depend on a common axis, or on none."""
    if not varies(first) or not varies(second):
        return True
    return any(a > 1 and b > 1 for a, b in zip(first.shape, second.shape, strict=True))


def narrower(first: Facet, second: Facet) -> bool:
    """Whether `first` repeats along some axis on which `second` differs."""
    return any(a == 1 and b > 1 for a, b in zip(first.shape, second.shape, strict=True))


def align(facet: Facet, rank: int) -> Facet:
    """The facet with leading axes of size 1, as broadcasting adds them."""
    return facet.reshape((1,) * (rank - facet.ndim) + facet.shape)


def reshape(facet: Facet, old: Sequence[int], new: Sequence[int]) -> Facet:
    """The facet of a tensor viewed from shape `old` as shape `new`.

    Axes are matched in the smallest runs that hold the same elements, so that a run on which the facet does
    not depend (batch, time) stays independent.
    """
    broadcast: list[int] = []
    target: list[int] = []
    for (old_from, old_to), (new_from, new_to) in _matching_runs(old, new):
        if varies(facet, range(old_from, old_to)):
            broadcast += old[old_from:old_to]
            target += new[new_from:new_to]
        else:
            broadcast += [1] * (old_to - old_from)
            target += [1] * (new_to - new_from)
    found = np.broadcast_to(facet, broadcast).reshape(target)
    for axis in range(found.ndim):  # batch and heads that have been one axis for a while
        first = found.take([0], axis)
        if (found == first).all():
            found = first
    return found


def _matching_runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    runs = []
    i = j = 0
    while i < len(old) or j < len(new):
        start = (i, j)
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (held := int(np.prod(old[start[0] : i]))) != (wanted := int(np.prod(new[start[1] : j]))):
            if held < wanted:
                i += 1
            else:
                j += 1
        runs.append(((start[0], i), (start[1], j)))
    return runs
