"""Picking positions along an axis, the same everywhere or others for each expert."""

import torch
from torch import Tensor


def take(tensor: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Some positions of an axis, in their order.

    Args:
        positions: `[N]`; or, of a tensor whose first axis is the experts, `[E, N]`, a row for each of them.
    """
    positions = positions.to(tensor.device)
    if positions.ndim == 1:
        return tensor.index_select(axis, positions)
    return torch.stack([part.index_select(axis - 1, each) for part, each in zip(tensor, positions, strict=True)])
