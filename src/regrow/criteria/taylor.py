"""LLM-Pruner: Taylor scores from true gradients of the weights (arXiv 2305.11627)."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from regrow.criteria.evidence import Evidence, Linear, summed


def taylor(evidence: Evidence) -> Float[Tensor, " units"]:
    """`Σ |W ∘ dL/dW|` over everything the unit owns: LLM-Pruner's element-1 (`param_first`)."""
    return summed(evidence, lambda linear, rows: _first(linear, rows).abs_())


def taylor_vector(evidence: Evidence) -> Float[Tensor, " units"]:
    """`Σ_rows |Σ_j W_ij (dL/dW)_ij|` over the unit's rows and columns: LLM-Pruner's vector form."""
    return torch.stack([_summed_in_rows(linear) for linear in evidence.linears]).sum(0)


def taylor_second(evidence: Evidence) -> Float[Tensor, " units"]:
    """`Σ |W h W|`, `h = mean_n(g_n²)`, g_n the gradient of sequence n's mean loss: element-2 (`param_second`).

    h is the diagonal of the empirical Fisher information, by which the paper's eq. 5 approximates the Hessian; the ½ of
    the Taylor series is missing here, as in the released code, and changes no order.
    """
    return summed(evidence, _second)


def taylor_mix(evidence: Evidence) -> Float[Tensor, " units"]:
    """`Σ |W ∘ dL/dW − ½ W h W|`, h as for element-2: LLM-Pruner's mix of both orders (`param_mix`, eq. 5).

    dL/dW is of the batch's mean loss. The released code cannot run this for attention: it negates the dictionary that
    holds the gradients. Its element scores all fail with `--channel_wise`, for a chained comparison is always false.
    """
    return summed(evidence, lambda linear, rows: _first(linear, rows).sub_(_second(linear, rows), alpha=0.5).abs_())


def _first(linear: Linear, rows: slice) -> Float[Tensor, "rows in"]:
    assert linear.weight_grad is not None
    return linear.effective_weight(rows).mul_(linear.weight_grad[rows].float())


def _second(linear: Linear, rows: slice) -> Float[Tensor, "rows in"]:
    assert linear.squared_grad is not None
    return linear.effective_weight(rows).square_().mul_(linear.squared_grad[rows])


def _summed_in_rows(linear: Linear) -> Float[Tensor, " units"]:
    return linear.per_unit(linear.per_position(partial(_first, linear)).abs_())
