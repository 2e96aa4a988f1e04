"""What a source's loss will have come to at the end: a law fitted to how it has fallen so far (DRPruning)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

MOST = 2.0
"""The largest exponent that is tried."""


@dataclass(frozen=True)
class LossLaw:
    """`L(n, s) = a n^-b s^c + e`, all four >= 0 (DRPruning, arXiv 2411.14055): nats per token.

    n is how many sequences of the source have been trained on, s the share of the model that has been removed.
    """

    a: float
    b: float
    c: float
    e: float

    def __call__(self, sequences: float, removed: float) -> float:
        """The loss after so many sequences, with so much removed; both above zero."""
        return float(self.a * sequences**-self.b * removed**self.c + self.e)


def fit_loss_law(sequences: Sequence[float], removed: Sequence[float], losses: Sequence[float]) -> LossLaw:
    """The law nearest to the points (least squares), `a` and `e` in closed form for each of a grid of exponents.

    The released code minimises a Huber loss from 36 starts instead, and averages what the best three foretell. Where
    as much was removed at all points nothing can be said of `c`: it is 0.

    Args:
        sequences: above zero, as `removed`; one per point.
        losses: nats per token.
    """
    n_P, s_P, y_P = np.array(sequences, float), np.array(removed, float), np.array(losses, float)
    b_X = np.linspace(0.0, MOST, 201)
    c_Y = np.linspace(0.0, MOST, 81) if len(set(removed)) > 1 else np.zeros(1)
    b_G, c_G = (axis.reshape(-1) for axis in np.meshgrid(b_X, c_Y))
    x_GP = n_P ** -b_G[:, None] * s_P ** c_G[:, None]
    x_GP /= x_GP.max(1, keepdims=True)  # far from zero, however large the numbers
    a_G, e_G = _lines(x_GP, y_P)
    best = int((((a_G[:, None] * x_GP + e_G[:, None]) - y_P) ** 2).sum(1).argmin())
    b, c = float(b_G[best]), float(c_G[best])
    return LossLaw(float(a_G[best] / (n_P**-b * s_P**c).max()), b, c, float(e_G[best]))


def _lines(x_GP: Vector, y_P: Vector) -> tuple[Vector, Vector]:
    """Slope and height, neither below zero, of the line nearest to `y` over each row of `x`."""
    x_G, y = x_GP.mean(1), y_P.mean()
    spread_G = ((x_GP - x_G[:, None]) ** 2).mean(1)
    along_G = ((x_GP - x_G[:, None]) * (y_P - y)).mean(1)
    slope_G = np.maximum(np.divide(along_G, spread_G, out=np.zeros_like(along_G), where=spread_G > 0), 0.0)
    height_G = y - slope_G * x_G
    through_zero_G = (x_GP @ y_P) / (x_GP**2).sum(1)
    return np.where(height_G < 0, through_zero_G, slope_G), np.maximum(height_G, 0.0)
