"""The search for the largest sparsity that holds a loss, when every answer costs a training."""

import math
from collections.abc import Sequence

import numpy as np

REMAINING = 0.4
"""Share of the damage of a cut that is left after recovery, before any trial has told: of the order of what
LoRA with some hundred steps leaves (in nats)."""
RESOLUTION = 0.01
"""Sparsities closer than this are not told apart."""
MARGIN = 0.1
"""A proposal keeps this share of the bracket away from its ends."""


class Search:
    """Bisection that lets a cheap estimate choose the next point.

    The estimate is the loss of the cut without recovery, known along a curve; of its damage a share remains after
    recovery, which every trial tells anew. A step that did not halve the bracket is followed by a plain halving.
    The largest sparsity itself is never proposed: the bracket's upper end counts as too much.
    """

    def __init__(self, dense: float, limit: float, curve: Sequence[tuple[float, float]]) -> None:
        """Begin with the whole range.

        Args:
            dense: loss of the dense model, nats per token.
            limit: largest loss that holds.
            curve: (sparsity, loss of the cut without recovery), sparsity ascending; the last is the most there is.
        """
        self.dense = dense
        self.limit = limit
        self.low, self.high = 0.0, curve[-1][0]
        finite = [(share, loss) for share, loss in curve if math.isfinite(loss)]
        self._shares = np.array([0.0, *(share for share, _ in finite)])
        damage = np.array([0.0, *(loss - dense for _, loss in finite)])
        self._damage = np.maximum.accumulate(damage)
        self._remaining = REMAINING
        self._halve = False

    def propose(self) -> float | None:
        """The next sparsity to try; None if the bracket is closed."""
        width = self.high - self.low
        if width <= RESOLUTION:
            return None
        if self._halve:
            return self.low + width / 2
        guess = self.high
        if self._remaining > 0:
            guess = float(np.interp((self.limit - self.dense) / self._remaining, self._damage, self._shares))
        return min(max(guess, self.low + MARGIN * width), self.high - MARGIN * width)

    def learn(self, sparsity: float, loss: float) -> bool:
        """Take in what a trial's recovered model reached. Returns whether it holds."""
        width = self.high - self.low
        holds = loss <= self.limit
        if holds:
            self.low = max(self.low, sparsity)
        else:
            self.high = min(self.high, sparsity)
        damage = float(np.interp(sparsity, self._shares, self._damage))
        if damage > 0:
            self._remaining = (loss - self.dense) / damage
        self._halve = self.high - self.low > width / 2
        return holds
