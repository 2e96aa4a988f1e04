"""What learned masks say of their units."""

from jaxtyping import Float
from torch import Tensor

from regrow.criteria.evidence import Evidence


def learned_mask(evidence: Evidence) -> Float[Tensor, " units"]:
    """Probability that the unit's mask is open, its layer's included; rises with the log-alpha, within (0, 1).

    Sheared-LLaMA (arXiv 2310.06694) keeps the highest scoring units of each substructure.
    """
    assert evidence.mask is not None
    return evidence.mask
