"""The hard concrete distribution (Louizos et al., arXiv 1712.01312): gates that chance draws, and that can be learned.

    s = σ((ln u − ln(1 − u) + a) / β),   u uniform in (0, 1)
    z = min(1, max(0, l + (h − l) s))

A gate z lies between 0 and 1 and is exactly either with some probability, of which its log-alpha a says how much. l, h,
β and the limits of a are those of Sheared-LLaMA (arXiv 2310.06694), in its text or its code.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LOW, HIGH = -0.1, 1.1
"""l and h: s is stretched to between them before it is clamped."""
TEMPERATURE = 2 / 3
"""β."""
LARGEST = math.log(100)
"""Log-alphas stay within ± this; the code starts them at 5, which is above."""
SHARPNESS = 0.8
"""Takes part in the deterministic gate, as in the code."""


def sample(log_alpha: Float[Tensor, " units"], uniform: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Gates for uniform numbers in [0, 1); differentiable by the log-alphas where they are between 0 and 1."""
    u = uniform.clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / TEMPERATURE)
    return (LOW + (HIGH - LOW) * s).clamp(0, 1)


def open_probability(log_alpha: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """`P(z > 0) = σ(a − β ln(−l/h))`."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def deterministic(log_alpha: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """The gates of one group without chance: as many as are expected to be closed are, those of the lowest log-alphas.

    The others are `σ(0.8 a / β)`.
    """
    gates = torch.sigmoid(SHARPNESS * log_alpha / TEMPERATURE)
    closed = round(len(log_alpha) - float(open_probability(log_alpha).sum()))
    gates[log_alpha.argsort(stable=True)[:closed]] = 0.0
    return gates
