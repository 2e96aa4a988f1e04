"""Second moments of what flows into a linear, streamed over batches.

Shapes: C input channels of the linear; `...` any leading axes (batch, time), which are all tokens alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class InputMoments:
    """`Σ x xᵀ` and `Σ x` over tokens, float64."""

    gram_CC: Tensor
    sum_C: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str = "cpu") -> "InputMoments":
        """Nothing seen yet."""
        return cls(
            torch.zeros(channels, channels, dtype=torch.float64, device=device),
            torch.zeros(channels, dtype=torch.float64, device=device),
        )

    def add(self, x: Tensor) -> None:
        """Count the tokens of a batch, shape `[..., C]`."""
        x_TC = x.detach().reshape(-1, x.shape[-1]).double()
        self.gram_CC.addmm_(x_TC.T, x_TC)
        self.sum_C += x_TC.sum(0)
        self.tokens += len(x_TC)

    @property
    def mean_C(self) -> Tensor:
        """`E[x]`."""
        return self.sum_C / self.tokens

    @property
    def second_CC(self) -> Tensor:
        """`E[x xᵀ]`."""
        return self.gram_CC / self.tokens

    @property
    def covariance_CC(self) -> Tensor:
        """`E[x xᵀ] − E[x] E[x]ᵀ`."""
        return self.second_CC - torch.outer(self.mean_C, self.mean_C)
