"""LLM-Pruner: first-order Taylor scores from true gradients of the weights (arXiv 2305.11627)."""

import torch
from jaxtyping import Float
from torch import Tensor

from regrow.criteria.evidence import Evidence, Linear


def taylor(evidence: Evidence) -> Float[Tensor, " units"]:
    """`Σ |W ∘ dL/dW|` over everything the unit owns: LLM-Pruner's element-1 (`param_first`)."""
    return torch.stack([_sum_over_units(linear, elementwise=True) for linear in evidence.linears]).sum(0)


def taylor_vector(evidence: Evidence) -> Float[Tensor, " units"]:
    """`Σ_rows |Σ_j W_ij (dL/dW)_ij|` over the unit's rows and columns: LLM-Pruner's vector form."""
    return torch.stack([_sum_over_units(linear, elementwise=False) for linear in evidence.linears]).sum(0)


def _sum_over_units(linear: Linear, elementwise: bool) -> Float[Tensor, " units"]:
    assert linear.weight_grad is not None
    per_position = torch.zeros(linear.weight.shape[linear.axis], device=linear.weight.device)
    for rows in linear.row_blocks():
        product = linear.effective_weight(rows).mul_(linear.weight_grad[rows].float())
        if elementwise:
            product.abs_()
        if linear.axis == 0:
            per_position[rows] = product.sum(1)
        else:
            per_position += product.sum(0)
    return linear.per_unit(per_position.abs_()).cpu()
