"""Numbers of units, and shares of them as whole numbers: what floats round away is not a unit."""

import math

Counts = dict[str, int]
"""Group name -> units removed of the original ones; all of them in a layer that goes whole."""

ROUNDING = 1e-6
"""A share of a number may be so far above or below the whole number that it stands for: 0.29 * 100 is below 29."""


def at_least(share: float, of: int) -> int:
    """The least whole number that is no less than a share of a number."""
    return math.ceil(share * of - ROUNDING)


def at_most(share: float, of: int) -> int:
    """The largest whole number that is no more than a share of a number."""
    return math.floor(share * of + ROUNDING)
