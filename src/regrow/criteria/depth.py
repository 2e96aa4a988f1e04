"""Scores of whole layers."""

import torch
from jaxtyping import Float
from torch import Tensor

from regrow.criteria.evidence import Evidence


def block_influence(evidence: Evidence) -> Float[Tensor, " units"]:
    """`BI = 1 - E_t cos(x_t, y_t)`, x entering and y leaving the layer: ShortGPT (arXiv 2403.03853, eq. 1).

    In [0, 2]; a layer that turns the residual stream little is worth little. Comparable between layers.
    """
    assert evidence.similarity is not None
    return torch.tensor([1 - evidence.similarity], dtype=torch.float64)
