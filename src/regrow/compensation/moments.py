"""Second moments of what flows into a linear, streamed over batches. One with NaN or infinity in it counts for nothing.

Shapes: C input channels of the linear; `...` any leading axes (batch, time), which are all tokens alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GRAMS = 2 * 2**30
"""Bytes of moments of experts' inputs that are taken at once, or those of one expert."""


def at_once(channels: int) -> int:
    """Of how many experts of so many channels the moments are taken in one pass; at least 1."""
    return max(1, GRAMS // (8 * channels**2))


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
        if not torch.isfinite(x_TC).all():
            return
        self.gram_CC.addmm_(x_TC.T, x_TC)
        self.sum_C += x_TC.sum(0)
        self.tokens += len(x_TC)

    @property
    def mean_C(self) -> Tensor:
        """`E[x]`."""
        return self.sum_C / self.tokens

    @property
    def channels(self) -> "ChannelMoments":
        """Those of each channel by itself."""
        return ChannelMoments(self.sum_C, self.gram_CC.diagonal(), self.tokens)

    def block(self, kept_K: Tensor, centred: bool = False) -> Tensor:
        """Rows and columns of `E[x xᵀ]`, or of `E[x xᵀ] − E[x] E[x]ᵀ`; `[K, K]`. The whole may fill a GPU."""
        second_KK = self.gram_CC[kept_K[:, None], kept_K].div_(self.tokens)
        return second_KK.sub_(torch.outer(self.mean_C[kept_K], self.mean_C[kept_K])) if centred else second_KK

    def times(self, rows_OC: Tensor, centred: bool = False) -> Tensor:
        """`rows @ E[x xᵀ]`, or rows times the covariance; `[O, C]`, float64. The matrix itself is not made."""
        product_OC = (rows_OC @ self.gram_CC).div_(self.tokens)
        return product_OC.sub_(torch.outer(rows_OC @ self.mean_C, self.mean_C)) if centred else product_OC

    def energies_C(self, centred: bool = False) -> Tensor:
        """`E[x²]` of every channel, or its variance; `[C]`."""
        second_C = self.gram_CC.diagonal() / self.tokens
        return second_C - self.mean_C.square() if centred else second_C

    @property
    def second_CC(self) -> Tensor:
        """`E[x xᵀ]`."""
        return self.gram_CC / self.tokens


@dataclass
class ChannelMoments:
    """`Σ x` and `Σ x²` of every channel over tokens, float64: two numbers a channel, whatever the width."""

    sum_C: Tensor
    square_C: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str = "cpu") -> "ChannelMoments":
        """Nothing seen yet."""
        first_C, second_C = torch.zeros(2, channels, dtype=torch.float64, device=device)
        return cls(first_C, second_C)

    def add(self, x: Tensor) -> None:
        """Count the tokens of a batch, shape `[..., C]`."""
        x_TC = x.detach().reshape(-1, x.shape[-1]).double()
        if not torch.isfinite(x_TC).all():
            return
        self.sum_C += x_TC.sum(0)
        self.square_C += x_TC.square().sum(0)
        self.tokens += len(x_TC)

    @property
    def norm_C(self) -> Tensor:
        """`√E[x²]`: the channel's 2-norm over the tokens, divided by the root of their number."""
        return (self.square_C / self.tokens).sqrt()

    @property
    def variance_C(self) -> Tensor:
        """`E[x²] − E[x]²`, over all tokens at once."""
        return (self.square_C / self.tokens - (self.sum_C / self.tokens).square()).clamp(min=0)
