"""Re-ranking by interaction: units that do the same thing must not all go because each of them could.

Shapes: N sequences, U units of a group, P pool.
"""

import torch
from torch import Tensor


def least_joint_damage(samples_NU: Tensor, count: int, pool: int) -> Tensor:
    """Greedily the `count` units whose joint removal does least damage to second order; their numbers, ascending.

    With `c_n` the gate derivatives of sequence n, removing a set P costs about `½ mean_n (Σ_{u in P} c_nu)²`
    (`½ v F v` with the empirical Fisher matrix F; Kwon et al. 2022, eq. 6, pick masks by it). The diagonal alone,
    which `gate-fisher` is, counts two units that always act together as twice one, where it is four times.

    Args:
        pool: only so many units of the least diagonal damage are considered, at least `count`.
    """
    samples_NU = samples_NU.double()
    fisher_UU = samples_NU.T @ samples_NU / len(samples_NU)
    candidates = torch.argsort(fisher_UU.diagonal(), stable=True)[: max(pool, count)]
    matrix_PP = fisher_UU[candidates][:, candidates]
    increments = matrix_PP.diagonal().clone()
    chosen = torch.zeros(len(candidates), dtype=torch.bool)
    for _ in range(count):
        best = int(torch.where(chosen, torch.inf, increments).argmin())
        chosen[best] = True
        increments += 2 * matrix_PP[best]
    return candidates[chosen].sort().values
