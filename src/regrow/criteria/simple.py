"""Scores that look at no data: the floor that every other criterion has to beat."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from regrow.criteria.evidence import Evidence, Linear


def magnitude(evidence: Evidence) -> Float[Tensor, " units"]:
    """2-norm of the unit's columns in its consumers (o_proj, down_proj), as in FLAP's magnitude baseline.

    A hidden channel's consumers are all linears that read the residual stream. Of a whole expert, which has no
    consumer: of all its weights.
    """
    total = torch.zeros(evidence.units)
    for linear in evidence.consumers or evidence.linears:
        total += linear.sum_over_units(partial(_squares, linear))
    return total.sqrt_()


def _squares(linear: Linear, rows: slice) -> Float[Tensor, "rows in"]:
    return linear.effective_weight(rows).square_()


def random(evidence: Evidence) -> Float[Tensor, " units"]:
    """Uniform in [0, 1), from the run's seed."""
    return torch.rand(evidence.units, generator=evidence.generator)
