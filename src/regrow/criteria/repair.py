"""Scores that know what a refit of the consumer can make up for."""

import torch
from jaxtyping import Float
from torch import Tensor

from regrow.compensation.solve import cut_errors, repaired_errors
from regrow.criteria.evidence import Evidence
from regrow.criteria.gate import gate_fisher

DAMPING = 0.01
"""Ridge on the moments, as a share of the mean input energy."""


def obs(evidence: Evidence) -> Float[Tensor, " units"]:
    """`tr(W_u ((H⁻¹)_uu)⁻¹ W_uᵀ)`: the output error that is left when the other units make up for one (optimal brain
    surgeon, Hassibi & Stork 1993, in groups as SlimGPT has it). Comparable within a group only.
    """
    errors_U = _errors(evidence)[1]
    return errors_U.cpu()


def repairable_fisher(evidence: Evidence) -> Float[Tensor, " units"]:
    """`F_u · OBS_u / CUT_u`: the Fisher damage, discounted by the share of the output error that others can repair.

    `F` is `gate_fisher`; `CUT_u = tr(W_u H_uu W_uᵀ)` is the output error of the plain cut and `OBS_u` what is left
    of it after a refit. In nats per sequence, comparable across the model. A group of several consumers is taken
    without a discount.
    """
    damage_U = gate_fisher(evidence)
    if evidence.inputs is None:
        return damage_U
    cut_U, repaired_U = _errors(evidence)
    left_U = torch.where(cut_U > 0, repaired_U / cut_U.clamp(min=torch.finfo(cut_U.dtype).tiny), 1.0)
    return damage_U * left_U.clamp(max=1.0).cpu()


def _errors(evidence: Evidence) -> tuple[Tensor, Tensor]:
    assert evidence.inputs is not None
    (consumer,) = evidence.consumers
    weight_OC = consumer.effective_weight(slice(None))
    return (
        cut_errors(weight_OC, evidence.inputs, consumer.positions),
        repaired_errors(weight_OC, evidence.inputs, consumer.positions, DAMPING),
    )
