"""Gradients by forward passes alone: simultaneous perturbation (SPSA, Spall 1992), replayed from seeds.

`ĝ = mean_k (L(W + ε z_k) − L(W − ε z_k)) / 2ε · z_k`, every entry of z_k standard normal. As in MeZO (arXiv 2305.17333,
alg. 1) no z is kept: it is drawn again from its seed wherever it is needed, one weight at a time. Unlike there no
weight is written to: what the perturbation would add to a linear's output is added to the output. So the weights stay
as they are to the bit, and may be quantised.

It is a noisy estimate: of P parameters perturbed at once, the relative variance of an entry is of the order of P over
the number of perturbations. A backward pass through the gates gives exact derivatives for the memory of activations.

Not covered: computing in bfloat16, whose steps are larger than what ε changes.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from regrow.data.tokens import Batch
from regrow.processes import ALONE, Processes
from regrow.recovery.losses import language_loss
from regrow.structure.adapters import linear_shape

EPSILON = 1e-3
"""Standard deviation of a perturbation, MeZO's."""


class Probes:
    """Perturbations of a model's linears, and the slopes of the loss along them."""

    def __init__(self, model: PreTrainedModel, seed: int, perturbations: int, processes: Processes = ALONE) -> None:
        """No probe has been taken.

        Args:
            perturbations: per batch.
            processes: those that share the batches.
        """
        self.processes = processes
        self.model = model
        self.perturbations = perturbations
        self.linears: Mapping[str, nn.Module] = {}
        """What is perturbed: linears by any stable name."""
        self._chance = torch.Generator().manual_seed(seed)
        self._slopes: dict[int, float] = {}
        """Seed of a direction -> slope along it."""

    @property
    def taken(self) -> bool:
        """Whether there are any."""
        return bool(self._slopes)

    def clear(self) -> None:
        """Forget all slopes."""
        self._slopes = {}

    @torch.no_grad()
    def take(self, batch: Batch) -> None:
        """Measure the slope of a whole batch's mean NLL along new directions; one not finite counts for nothing."""
        part = batch.rows(self.processes.rows(len(batch.ids_BT))).to(self.model.device)
        share = part.tokens / max(batch.tokens, 1)
        training = self.model.training
        self.model.eval()
        for _ in range(self.perturbations):
            seed = int(torch.randint(2**31, (1,), generator=self._chance))
            up, down = self.processes.sum([share * self._loss(part, seed, step) for step in (EPSILON, -EPSILON)])
            if math.isfinite(slope := (up - down) / (2 * EPSILON)):
                self._slopes[seed] = slope
        self.model.train(training)

    def _loss(self, batch: Batch, seed: int, step: float) -> float:
        with self.perturbed(seed, step):
            logits_BTV = self.model(input_ids=batch.ids_BT, use_cache=False).logits
        return float(language_loss(logits_BTV, batch.ids_BT, batch.scored_BT))

    @contextmanager
    def perturbed(self, seed: int, step: float) -> Iterator[None]:
        """Within this context every linear computes with `W + step · z`."""

        def add(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            extra = functional.linear(x.float(), self.direction(name, seed, x.device))
            return output + (step * extra).to(output.dtype)

        handles = [module.register_forward_hook(partial(add, name)) for name, module in self.linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def direction(self, name: str, seed: int, device: torch.device) -> Tensor:
        """`z` of one linear, float32 `[out, in]`; the same on every device."""
        chance = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return torch.randn(linear_shape(self.linears[name]), generator=chance).to(device)

    def gradient(self, name: str) -> Tensor:
        """The estimate for one linear's weight, float32 `[out, in]`."""
        device = next(self.linears[name].parameters()).device
        terms = (slope * self.direction(name, seed, device) for seed, slope in self._slopes.items())
        total = next(terms)
        for term in terms:
            total += term
        return total / len(self._slopes)
