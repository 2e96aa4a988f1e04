"""Shares of the sources of text, from how much the model has lost on each.

Everything here is a pure function of float64 numbers, one per source, in one order. `degradation` is Δ_i = the model's
mean NLL on source i, held out, minus what the dense model had there (nats per token).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regrow.settings import MixtureRule

Vector = NDArray[np.float64]

FLOORS: dict[MixtureRule, float] = {"fixed": 0.0, "degradation": 0.3, "sheared": 1e-4, "drpruning": 0.2}
"""Where the recipe names no floor."""

REFERENCE_STARTS = 0.2
"""DRPruning: share of the steps after which the reference begins to move."""

BISECTIONS = 200
"""More than a float64 has bits to settle; bisection ends sooner, when there is nothing left to halve."""


@dataclass(frozen=True)
class Shares:
    """What each source of a stage contributes, as shares that sum to one."""

    initial: tuple[float, ...]
    reference: tuple[float, ...]
    """What the worst case is sought around; only `drpruning` moves it."""
    current: tuple[float, ...]

    @classmethod
    def start(cls, weights: Sequence[float]) -> "Shares":
        """Shares in proportion to positive weights."""
        total = math.fsum(weights)
        shares = tuple(weight / total for weight in weights)
        return cls(shares, shares, shares)


def reweight(
    rule: MixtureRule, shares: Shares, degradation: Sequence[float], floor: float | None = None, progress: float = 0.0
) -> Shares:
    """The shares of the next round.

    Args:
        floor: see the rule's function; None: its own default.
        progress: share of the stage's steps that are done.
    """
    low = FLOORS[rule] if floor is None else floor
    reference = shares.reference
    match rule:
        case "fixed":
            current = shares.current
        case "degradation":
            current = degradation_weights(shares.initial, degradation, low)
        case "sheared":
            current = sheared_weights(shares.current, degradation, low)
        case "drpruning":
            current = drpruning_weights(reference, degradation, low)
            if progress >= REFERENCE_STARTS:
                reference = moved_reference(reference, current, shares.initial)
    return Shares(shares.initial, reference, current)


def degradation_weights(
    initial: Sequence[float], degradation: Sequence[float], floor: float = FLOORS["degradation"]
) -> tuple[float, ...]:
    """`q = (1 - floor) softmax(log p + Δ/τ) + floor p`, with p the initial shares and τ the mean of Δ.

    LoRAShear (arXiv 2310.18356, Alg. 5) says what shall be: degraded sources favoured, the others kept with a balanced
    share. The formula is ours. A source on which the model is no worse than the dense one has Δ = 0, so τ is never
    negative; without any degradation the shares are the initial ones.
    """
    p, gap = np.array(initial), np.maximum(degradation, 0.0)
    mean = gap.mean()
    if mean == 0.0:  # or too small for a number
        return tuple(p.tolist())
    favoured = _softmax(np.log(p) + gap / mean)
    return _plain((1 - floor) * favoured + floor * p)


def sheared_weights(
    current: Sequence[float], degradation: Sequence[float], floor: float = FLOORS["sheared"], rate: float = 1.0
) -> tuple[float, ...]:
    """Dynamic batch loading (Sheared-LLaMA, arXiv 2310.06694, Alg. 1): `w <- softmax(log w + rate · max(Δ, 0))`.

    Then, as its released code does, `w <- (1 - floor) w + floor / n`. The reference loss of a source is what the dense
    model has there; the paper's comes from scaling laws fitted to models of known sizes.
    """
    w = _softmax(np.log(current) + rate * np.maximum(degradation, 0.0))
    return _plain((1 - floor) * w + floor / len(w))


def drpruning_weights(
    reference: Sequence[float], degradation: Sequence[float], floor: float = FLOORS["drpruning"], radius: float = 0.05
) -> tuple[float, ...]:
    """The worst case near the reference (DRPruning, arXiv 2411.14055): the q that maximises `Σ q_i Δ_i`, subject to
    `½ Σ p_i (q_i/p_i - 1)² <= radius` and `q_i >= floor · p_i`.

    With q = p (floor + (1 - floor) s) it is the same problem in s, without a floor and with
    `radius / (1 - floor)²`. There `s_i ∝ max(Δ_i - η, 0)`, and the divergence grows with η: bisection. Δ is here
    the distance from reference losses, which are the dense model's until a law foretells others (`scaling.py`).
    """
    p, gap = np.array(reference), np.array(degradation)
    width = float(np.ptp(gap))
    if width == 0.0:
        return tuple(p.tolist())
    # Neither a shift nor a scale of Δ changes q, and differences of a few rounding errors would drown in the mean.
    gap = (gap - gap.max()) / width
    spread = float(p @ (gap - p @ gap) ** 2)
    room = radius / (1 - floor) ** 2

    def tilted(eta: float) -> Vector:
        above: Vector = np.maximum(gap - eta, 0.0)
        above /= p @ above
        return above

    # As long as no source is clipped the divergence is spread / 2 (mean - η)², hence a bound from below.
    low = min(float(gap.min()), float(p @ gap) - math.sqrt(spread / (2 * room)))
    eta = _last_below(lambda eta: 0.5 * float(p @ (tilted(eta) - 1) ** 2) <= room, low, 0.0)
    return _plain(p * (floor + (1 - floor) * tilted(eta)))


def moved_reference(
    reference: Sequence[float], weights: Sequence[float], initial: Sequence[float], rate: float = 0.1
) -> tuple[float, ...]:
    """DRPruning's reference after one move: `rate` of the way to the weights, within [½, 2] of the initial shares.

    One common factor before the clamp makes the shares sum to one again.
    """
    aim = (1 - rate) * np.array(reference) + rate * np.array(weights)
    lowest, highest = np.array(initial) / 2, np.array(initial) * 2
    # At 2 max(1, highest / aim) every share is at its upper bound, and their sum is two.
    most = 2 * max(1.0, float((highest / aim).max()))
    factor = _last_below(lambda factor: float(np.clip(factor * aim, lowest, highest).sum()) <= 1, 0.0, most)
    return _plain(np.clip(factor * aim, lowest, highest))


def _last_below(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest number in [low, high) for which a condition holds that holds at `low` and once lost stays lost."""
    for _ in range(BISECTIONS):
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _softmax(logits: Vector) -> Vector:
    powers: Vector = np.exp(logits - logits.max())
    powers /= powers.sum()
    return powers


def _plain(weights: Vector) -> tuple[float, ...]:
    return tuple((weights / weights.sum()).tolist())
