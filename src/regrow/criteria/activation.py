"""Scores from weights and the size of what flows into them: two numbers per input channel, no backward pass needed.

Statistics are over all calibration tokens at once, in the dense model unless selection walks a pruned prefix.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from regrow.criteria.evidence import Evidence, Linear, summed


def wanda(evidence: Evidence) -> Float[Tensor, " units"]:
    """`Σ_{j in unit} mean_i |W_ij| · ‖X_j‖₂` over the columns of the consumers (o_proj, down_proj): Wanda-sp.

    Wanda (arXiv 2306.11695, eq. 1) for structures, as FLAP's repository has it (`WIFN`): norms over all tokens,
    here divided by the root of their number. There layers are scored in turn, on what the already pruned layers before
    them give: that is `compensation.selection=prefix`; without it the prefix is dense. Comparable within a group only.
    """
    return torch.stack([linear.per_unit(_wanda_columns(linear)) for linear in evidence.consumers]).sum(0)


def flap(evidence: Evidence) -> Float[Tensor, " units"]:
    """`mean_{j in unit} z(S_j)`, `S_j = Var(X_j) · ‖W_:j‖²`, in attention `z(S_j²)`: FLAP's WIFV (arXiv 2312.11983).

    `S_j` is the output error that is left when column j goes and the bias takes its mean over (channels uncorrelated).
    z is the distance from the mean of the group's columns, in their standard deviations: hence comparable between
    layers and kinds, for `pruning.allocation=pooled`. Squaring in attention is the released code's, not the paper's.

    The variance is that over tokens. The released code's is not: its running mean is updated in place under the name
    of the old one, so that its update is not Welford's, it sums over tokens, and its first batch counts as zero.
    """
    columns = torch.cat([_fluctuation(linear)[linear.positions] for linear in evidence.consumers], 1)
    if evidence.kind == "attention":
        columns = columns.square()
    mean, deviation = columns.mean(), columns.std() if columns.numel() > 1 else columns.new_zeros(())
    tiny = torch.finfo(columns.dtype).tiny  # columns that do not differ are all average: 0
    return ((columns - mean) / deviation.clamp(min=tiny)).mean(1).cpu()


def wanda_norm(evidence: Evidence) -> Float[Tensor, " units"]:
    """`√Σ (|W_ij| · ‖X_j‖₂)²` over everything the unit owns, each linear with its own inputs: Olica's neurons.

    For an FFN channel the 2-norm of the Wanda scores of its rows of up and gate and its column of down (Olica, arXiv
    2506.08436, as released). The code keeps the lowest 1 % of the neurons and prunes from there on; that is left out.
    In attention the same norm scores whole heads, which Olica does not remove.
    """
    return summed(evidence, lambda linear, rows: _wanda_entries(linear, rows).square_()).sqrt_()


def mini_llm(evidence: Evidence) -> Float[Tensor, " units"]:
    """`Σ |W_ij| · ‖X_j‖₂ · |ĝ_ij|` over all the unit owns: MINI-LLM's feature map sensitivity (arXiv 2407.11681).

    ĝ is the zeroth-order estimate of the gradient (`recovery.probe`), averaged over all batches and
    `pruning.perturbations` before its absolute value is taken. The paper's full text was not at
    hand: the product, and the sum over LLM-Pruner's groups, follow its abstract. Comparable within a group only.
    """
    return summed(evidence, _sensitivity)


def _wanda_columns(linear: Linear) -> Float[Tensor, " in"]:
    assert linear.inputs is not None
    total = linear.per_position(lambda rows: linear.effective_weight(rows).abs_())
    return total / len(linear.weight) * linear.inputs.norm_C


def _fluctuation(linear: Linear) -> Float[Tensor, " in"]:
    assert linear.inputs is not None
    total = linear.per_position(lambda rows: linear.effective_weight(rows).square_())
    return total * linear.inputs.variance_C


def _wanda_entries(linear: Linear, rows: slice) -> Float[Tensor, "rows in"]:
    assert linear.inputs is not None
    return linear.effective_weight(rows).abs_() * linear.inputs.norm_C.float()


def _sensitivity(linear: Linear, rows: slice) -> Float[Tensor, "rows in"]:
    assert linear.estimated_grad is not None
    return _wanda_entries(linear, rows) * linear.estimated_grad[rows].abs()
