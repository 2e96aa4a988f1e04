"""LoRAPrune: importance from the LoRA factors and their gradients alone (arXiv 2305.18403)."""

import torch
from jaxtyping import Float
from torch import Tensor

from regrow.criteria.evidence import Evidence, Linear


def lora_gradient(
    lora_a: Float[Tensor, "rank in"],
    lora_b: Float[Tensor, "out rank"],
    grad_a: Float[Tensor, "rank in"],
    grad_b: Float[Tensor, "out rank"],
) -> Float[Tensor, "out in"]:
    """The frozen weight's gradient as LoRA sees it: `dB·A + B·dA − dB·dA` (LoRAPrune, eq. 10).

    The change of `BA` in one SGD step of size 1 on the factors. Computed as one product of rank 2r.
    """
    return torch.cat([grad_b, lora_b], 1) @ torch.cat([lora_a - grad_a, grad_a], 0)


def lora(evidence: Evidence) -> Float[Tensor, " units"]:
    """`Σ_m v_m / ‖v_m‖₂` with `v_m = Σ |Ĝ ∘ (W + sBA)|` over the unit's share of linear m.

    As LoRAPrune's released code computes it: absolute values where the paper has squares, every linear's
    vector of unit scores divided by its own 2-norm, `Ĝ` of eq. 10 without the scaling s. The moving average
    (0.9 in the paper, eq. 11) is the caller's. Comparable within a group only.
    """
    total = torch.zeros(evidence.units)
    for linear in evidence.linears:
        values = _sum_over_units(linear, squared=False)
        norm = values.double().norm()  # the squares of what float32 can hold are beyond it
        total += values / norm if norm > 0 else values
    return total


def lora_squared(evidence: Evidence) -> Float[Tensor, " units"]:
    """`Σ (Ĝ ∘ (W + sBA))²` over everything the unit owns: LoRAPrune as its paper prints it (eq. 4 and 10)."""
    return torch.stack([_sum_over_units(linear, squared=True) for linear in evidence.linears]).sum(0)


def _sum_over_units(linear: Linear, squared: bool) -> Float[Tensor, " units"]:
    a, b, grad_a, grad_b = linear.lora_a, linear.lora_b, linear.lora_a_grad, linear.lora_b_grad
    if a is None or b is None or grad_a is None or grad_b is None:
        return torch.zeros(len(linear.positions))

    def entries(rows: slice) -> Float[Tensor, "rows in"]:
        product = lora_gradient(a, b[rows], grad_a, grad_b[rows]).mul_(linear.effective_weight(rows))
        return product.square_() if squared else product.abs_()

    return linear.sum_over_units(entries)
