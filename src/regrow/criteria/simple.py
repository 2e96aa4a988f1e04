"""Scores that look at no data: the floor that every other criterion has to beat."""

import torch
from jaxtyping import Float
from torch import Tensor

from regrow.criteria.evidence import Evidence


def magnitude(evidence: Evidence) -> Float[Tensor, " units"]:
    """2-norm of the unit's columns in its consumers (o_proj, down_proj), as in FLAP's magnitude baseline.

    A hidden channel's consumers are all linears that read the residual stream.
    """
    total = torch.zeros(evidence.units)
    for linear in evidence.consumers:
        per_column = torch.zeros(linear.weight.shape[1], device=linear.weight.device)
        for rows in linear.row_blocks():
            per_column += linear.effective_weight(rows).square_().sum(0)
        total += linear.per_unit(per_column).cpu()
    return total.sqrt_()


def random(evidence: Evidence) -> Float[Tensor, " units"]:
    """Uniform in [0, 1), from the run's seed."""
    return torch.rand(evidence.units, generator=evidence.generator)
