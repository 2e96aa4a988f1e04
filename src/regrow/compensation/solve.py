"""Closed forms: which units of a consumer can best be spared, and what the others should then do.

A consumer (o_proj, down_proj) computes `y = W x (+ b)`. When some of its input channels go, the rest is refitted so
that the output changes least over the tokens seen: `min_V E‖W x − V x_k‖²`, k the channels kept. On those tokens
the error is ordered: least squares with a bias ≤ least squares ≤ plain cut, and with a bias ≤ bias alone ≤ cut,
for each has the next one's freedom and more.

Shapes: O outputs, C input channels, K channels kept, U units, P channels per unit.
"""

import math

import torch
from torch import Tensor

from regrow.compensation.moments import InputMoments

OVERSAMPLING = 8
"""Dimensions of a random subspace beyond the rank that is wanted of it."""


def least_squares(weight_OC: Tensor, moments: InputMoments, kept_K: Tensor, damping: float) -> Tensor:
    """`V = (W H[:,k] + λ W_k) (H_kk + λ I)⁻¹`, `H = E[x xᵀ]`, `λ = damping · mean(diag H)`; float64 `[O, K]`.

    The damping pulls towards the weights as they are: an infinite one gives the plain cut.
    """
    return _solve(weight_OC, moments, kept_K, damping, centred=False)


def least_squares_with_bias(
    weight_OC: Tensor, moments: InputMoments, kept_K: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """As `least_squares` with a constant that is free as well: `V` from the covariance, `b = W μ − V μ_k`.

    With infinite damping: FLAP's bias (`bias_only`).
    """
    fitted_OK = _solve(weight_OC, moments, kept_K, damping, centred=True)
    mean_C = moments.mean_C
    return fitted_OK, weight_OC.double() @ mean_C - fitted_OK @ mean_C[kept_K]


def bias_only(weight_OC: Tensor, moments: InputMoments, kept_K: Tensor) -> Tensor:
    """`b = W_p E[x_p]` over the channels p removed (FLAP, arXiv 2312.11983, eq. 5); float64 `[O]`."""
    removed_C = torch.ones(weight_OC.shape[1], dtype=torch.bool, device=weight_OC.device)
    removed_C[kept_K] = False
    return weight_OC[:, removed_C].double() @ moments.mean_C[removed_C]


def _solve(weight_OC: Tensor, moments: InputMoments, kept_K: Tensor, damping: float, centred: bool) -> Tensor:
    """With second moments, or those about the mean."""
    weight_OC = weight_OC.double()
    strength = damping * moments.energies_C(centred).mean().clamp(min=0)
    kept_KK = moments.block(kept_K, centred)
    kept_KK.diagonal().add_(strength)
    factor_KK, ridge = _cholesky(kept_KK)
    del kept_KK  # of wide layers these matrices are what fills a GPU
    target_OK = moments.times(weight_OC, centred)[:, kept_K] + (strength + ridge) * weight_OC[:, kept_K]
    fitted_OK: Tensor = torch.cholesky_solve(target_OK.T, factor_KK).T
    return fitted_OK


def _cholesky(matrix: Tensor) -> tuple[Tensor, float]:
    """The factor of a positive semidefinite matrix with a ridge, and the ridge: the least, by powers of 16, that does.

    Channels that never speak, or always say the same, make a moment matrix singular, and rounding may then make it
    indefinite. The matrix is given up: its diagonal is written to.
    """
    diagonal = matrix.diagonal()
    wanted = max(torch.finfo(matrix.dtype).eps * len(matrix) * float(diagonal.mean()), 1e-300)
    ridge = 0.0
    while True:
        diagonal.add_(wanted - ridge)
        ridge, wanted = wanted, 16 * wanted
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor, ridge
        assert wanted < math.inf, "moments must be finite"


def output_error(
    weight_OC: Tensor, moments: InputMoments, kept_K: Tensor, fitted_OK: Tensor, bias_O: Tensor | None = None
) -> float:
    """`E‖W x − V x_k − b‖²` over the tokens seen."""
    change_OC = weight_OC.double().clone()
    change_OC[:, kept_K] -= fitted_OK.double()
    error = (moments.times(change_OC) * change_OC).sum()
    if bias_O is not None:
        mean_O = change_OC @ moments.mean_C
        error = error - 2 * (bias_O * mean_O).sum() + bias_O.square().sum()
    return float(error)


def cut_errors(weight_OC: Tensor, moments: InputMoments, units_UP: Tensor) -> Tensor:
    """`tr(W_u H_uu W_uᵀ)`: the output error of cutting each unit alone, nothing repaired; float64 `[U]`."""
    weight_UOP = weight_OC.double()[:, units_UP].transpose(0, 1)
    return _quadratic(weight_UOP, _blocks(moments.gram_CC, units_UP) / moments.tokens)


def repaired_errors(weight_OC: Tensor, moments: InputMoments, units_UP: Tensor, damping: float) -> Tensor:
    """`tr(W_u ((H⁻¹)_uu)⁻¹ W_uᵀ)`: what is left of it after the others are refitted (optimal brain surgeon); `[U]`."""
    inverse_CC = _damped_inverse(moments, damping)
    weight_UOP = weight_OC.double()[:, units_UP].transpose(0, 1)
    return _quadratic(weight_UOP, torch.linalg.inv(_blocks(inverse_CC, units_UP)))


def _damped_inverse(moments: InputMoments, damping: float) -> Tensor:
    """`(H + damping · mean(diag H) I)⁻¹` for `H = E[x xᵀ]`; `[C, C]`."""
    return torch.cholesky_inverse(_cholesky(_damped(moments.second_CC, damping))[0])


def _damped(second_CC: Tensor, damping: float) -> Tensor:
    """The matrix itself, its diagonal now the higher."""
    second_CC.diagonal().add_(damping * second_CC.diagonal().mean())
    return second_CC


def _blocks(matrix_CC: Tensor, units_UP: Tensor) -> Tensor:
    return matrix_CC[units_UP[:, :, None], units_UP[:, None, :]]


def _quadratic(weight_UOP: Tensor, block_UPP: Tensor) -> Tensor:
    return ((weight_UOP @ block_UPP) * weight_UOP).sum((1, 2))


def elimination_order(
    weight_OC: Tensor,
    moments: InputMoments,
    units_UP: Tensor,
    damping: float,
    rounds: int = 16,
    stop: int | None = None,
) -> Tensor:
    """Units in the order in which they can be spared, most dispensable first: greedy optimal brain surgeon, `[stop]`.

    In every round the units with the least `repaired_errors` go and the rest is refitted, so that what follows
    knows what has gone before: `W ← W − W_u ((H⁻¹)_uu)⁻¹ (H⁻¹)_u`, `H⁻¹ ← H⁻¹ − (H⁻¹)_u ((H⁻¹)_uu)⁻¹ (H⁻¹)_uᵀ`
    (as ZipLM, SlimGPT and Týr-the-Pruner do).

    Args:
        units_UP: the input channels of each unit.
        rounds: in how many rounds to go; one refit each.
        stop: how many units to put in order; by default all but one.
    """
    weight_OC = weight_OC.double().clone()
    inverse_CC = _damped_inverse(moments, damping)
    stop = len(units_UP) - 1 if stop is None else stop
    left = torch.arange(len(units_UP), device=weight_OC.device)
    order: list[Tensor] = []
    for going in torch.tensor_split(torch.arange(stop), min(rounds, stop) or 1):
        channels_UP = units_UP[left]
        weight_UOP = weight_OC[:, channels_UP].transpose(0, 1)
        errors_U = _quadratic(weight_UOP, torch.linalg.inv(_blocks(inverse_CC, channels_UP)))
        ranked = errors_U.argsort(stable=True)
        gone, left = left[ranked[: len(going)]], left[ranked[len(going) :].sort().values]
        order.append(gone)
        _eliminate(weight_OC, inverse_CC, units_UP[gone].flatten())
    return torch.cat(order)


def _eliminate(weight_OC: Tensor, inverse_CC: Tensor, channels: Tensor) -> None:
    """Remove channels, in place; their rows and columns are left as if they were independent of all others."""
    if not len(channels):
        return
    solved = torch.linalg.solve(inverse_CC[channels][:, channels], inverse_CC[channels])
    weight_OC -= weight_OC[:, channels] @ solved
    inverse_CC -= inverse_CC[:, channels] @ solved
    weight_OC[:, channels] = 0
    inverse_CC[channels] = 0
    inverse_CC[:, channels] = 0
    inverse_CC[channels, channels] = 1


def low_rank(
    change_OK: Tensor, moments: InputMoments, kept_K: Tensor, rank: int, sweeps: int | None = None
) -> tuple[Tensor, Tensor]:
    """`B [O, r]`, `A [r, K]` with `BA` nearest to a change of weights, as the inputs weigh it: `min E‖(Δ − BA) x_k‖²`.

    The best rank-r factors are `Δ R = U S Vᵀ` truncated and `A = … R⁻¹`, with `R Rᵀ = H_kk` (Eckart-Young in the
    metric of the inputs). For bases that cannot be written to: the adapter begins where the refit would have ended.

    Args:
        sweeps: how often a random subspace of some more dimensions is turned towards the factors' (Halko et al.,
            0909.4061, alg. 4.4): nearly as good, and for large weights much cheaper. None: exact.
    """
    root_KK = _cholesky(_damped(moments.block(kept_K), 1e-9))[0]
    weighed_OK = change_OK.double() @ root_KK
    if sweeps is None:
        left, strength, right = torch.linalg.svd(weighed_OK, full_matrices=False)
    else:
        with torch.random.fork_rng([weighed_OK.device] if weighed_OK.is_cuda else []):
            torch.manual_seed(0)  # the same factors for the same weights, in every process
            size = min(rank + OVERSAMPLING, *weighed_OK.shape)
            left, strength, right_KQ = torch.svd_lowrank(weighed_OK, size, sweeps)
        right = right_KQ.T
    scale = strength[:rank].sqrt()
    factor_b = left[:, :rank] * scale
    factor_a = torch.linalg.solve_triangular(root_KK, scale[:, None] * right[:rank], upper=False, left=False)
    return factor_b, factor_a
