"""Scores that look at no data: the floor that every other criterion has to beat."""

import torch
from jaxtyping import Float
from torch import Tensor

from regrow.criteria.evidence import Evidence


def magnitude(evidence: Evidence) -> Float[Tensor, " units"]:
    """2-norm of the unit's columns in its consumers (o_proj, down_proj), as in FLAP's magnitude baseline.

    A hidden channel's consumers are all linears that read the residual stream. Of a whole expert, which has no
    consumer: of all its weights.
    """
    total = torch.zeros(evidence.units)
    for linear in evidence.consumers or evidence.linears:
        per_position = torch.zeros(linear.weight.shape[linear.axis], device=linear.weight.device)
        for rows in linear.row_blocks():
            squares = linear.effective_weight(rows).square_()
            if linear.axis == 0:
                per_position[rows] = squares.sum(1)
            else:
                per_position += squares.sum(0)
        total += linear.per_unit(per_position)
    return total.sqrt_()


def random(evidence: Evidence) -> Float[Tensor, " units"]:
    """Uniform in [0, 1), from the run's seed."""
    return torch.rand(evidence.units, generator=evidence.generator)
