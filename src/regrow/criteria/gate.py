"""Scores from the derivatives of the gates: no tensor of a weight's shape, comparable across the model.

`c_n` is the derivative of the summed negative log-likelihood of sequence n by a unit's gate; setting the gate
to 0 changes it by about `-c_n` (first order). All scores are in nats per sequence.
"""

from jaxtyping import Float
from torch import Tensor

from regrow.criteria.evidence import Evidence


def gate_fisher(evidence: Evidence) -> Float[Tensor, " units"]:
    """`½ mean_n(c_n²)`: the second-order damage of removal, with the empirical Fisher as curvature.

    The diagonal term of optimal brain damage (LeCun et al. 1989) in the coordinates in which removal is one
    step; it cannot cancel between sequences.
    """
    assert evidence.gate is not None
    return 0.5 * evidence.gate.mean_square


def gate_second_order(evidence: Evidence) -> Float[Tensor, " units"]:
    """`-mean_n(c_n) + ½ mean_n(c_n²)`: first and second order together. May be negative."""
    assert evidence.gate is not None
    return 0.5 * evidence.gate.mean_square - evidence.gate.mean
