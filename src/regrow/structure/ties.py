"""What a walk over a graph learns of channels, and the two steps that nearly all operators are made of.

*Elementwise*: facets that meet in one element are tied. *Reduction*: a facet that depends on a reduced axis and on a
kept one is tied along the reduced axis; one that depends on reduced axes alone is summed away. A matrix product is a
broadcast multiplication followed by a reduction, and a linear layer is a matrix product with a weight.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from regrow.structure.channels import Channels, Facet, Value, align, narrower, overlap, varies


class UnknownOperator(Exception):
    """The walk met an operator that has no rule; the message is the operator's name."""


class Walk:
    """The state of one walk over a graph: channels, and what was learnt of them on the way."""

    def __init__(self) -> None:
        self.channels = Channels()
        self.attended: list[Facet] = []
        """Facets that took part in a product of two activations, that is in attention."""
        self.module = ""
        """The dotted name of the module that computes what is looked at."""
        self.averaged: list[tuple[Facet, tuple[int, ...], str]] = []
        """Facets of activations, the axes along which a norm takes a mean of them, and the norm."""
        self.contracted: set[int] = set()
        """Channels of weights along whose axis a product sums: a consumer's input axis."""
        self.shared: list[tuple[Facet, Facet]] = []
        """A weight's facet and the wider facet it is broadcast over (a per-head norm, say)."""
        self.offered: list[tuple[Facet, int]] = []
        """Facets that some of the highest are taken of, and how many are."""
        self.experts: list[Facet] = []
        """The first axis of weights of which the rows that were chosen compute: one matrix for each expert."""
        self.fixed: list[Facet] = []
        """Facets of buffers that checkpoints hold, and of what goes into opaque parts or comes out of them."""

    def elementwise(self, values: Sequence[Value], shape: tuple[int, ...]) -> Value:
        """Tie every two facets that name the same elements; keep the widest of each such set."""
        kept: list[tuple[Facet, bool]] = []
        for value in values:
            for facet in value.facets:
                facet, is_weight = align(facet, len(shape)), value.is_weight
                rest = []
                for other, other_is_weight in kept:
                    if not overlap(facet, other):
                        rest.append((other, other_is_weight))
                    elif other_is_weight and not is_weight and narrower(other, facet):
                        self.shared.append((other, facet))
                    elif is_weight and not other_is_weight and narrower(facet, other):
                        self.shared.append((facet, other))
                        facet, is_weight = other, other_is_weight
                    else:
                        self.channels.tie(facet, other)
                        if other.size > facet.size:
                            facet = other
                kept = [*rest, (facet, is_weight)]
        # What is computed from weights alone (`1 + weight` in a norm) is a weight still.
        is_weight = bool(kept) and all(value.is_weight for value in values if value.facets)
        return Value(shape, tuple(facet for facet, _ in kept), is_weight)

    def average(self, value: Value, axes: Iterable[int]) -> None:
        """A norm, or some such, computes with a mean of a value along `axes`."""
        along = tuple(axes)
        self.averaged += [(facet, along, self.module) for facet in value.facets if varies(facet, along)]

    def reduce(self, value: Value, axes: Sequence[int], shape: tuple[int, ...], whole: bool = False) -> Value:
        """Sum over `axes`; with `whole`, a facet that depends on them alone stays as one single channel."""
        axes = [axis % len(value.shape) for axis in axes]
        kept_axes = [axis for axis in range(len(value.shape)) if axis not in axes]
        kept = []
        for facet in value.facets:
            first = facet
            for axis in axes:
                first = first.take([0], axis)
            if varies(facet, axes):
                if not varies(facet, kept_axes) and not whole:
                    continue
                self.channels.tie(facet, first)
            kept.append(first.reshape([first.shape[axis] for axis in kept_axes]))
        if len(shape) == len(value.shape):
            kept = [np.expand_dims(facet, tuple(axes)) for facet in kept]
        return Value(shape, tuple(kept))

    def route(self, facet: Facet, among: Facet) -> None:
        """A weight holds one part for each of the channels that a choice was made among."""
        self.channels.tie(facet.reshape(-1), among)
        self.experts.append(among)

    def contract(self, left: Value, right: Value, shape: tuple[int, ...]) -> Value:
        """`left [..., m, k] @ right [..., k, n]`; a product of two activations is attention."""
        attention = not (left.is_weight or right.is_weight)
        rank = max(len(left.shape), len(right.shape)) + 1
        expanded = []
        for value, axis in ((left, -1), (right, -3)):
            own = len(value.shape)
            facets = [align(np.expand_dims(facet, axis % (own + 1)), rank) for facet in value.facets]
            expanded.append(Value((1,) * rank, tuple(facets), value.is_weight))
            for facet in facets:
                if attention:
                    self.attended.append(facet)
                elif value.is_weight and varies(facet, [rank - 2]):
                    self.contracted.update(facet.reshape(-1).tolist())
        product = self.elementwise(expanded, (1,) * rank)
        return self.reduce(product, [rank - 2], shape, whole=attention)
