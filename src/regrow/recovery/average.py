"""Scores, and gradients, averaged over batches."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from regrow.checkpoint.state import State
from regrow.planning.plan import Plan

SPIKE = 10.0
"""What is measured on a batch counts for at most so many times the average of those before: one on which the loss
leaps would outweigh, in squared gradients, all the others."""


class Average:
    """A moving average with bias correction, or a plain mean, of one score per original unit."""

    def __init__(self, units: Mapping[str, int], decay: float | None, spike: float = math.inf) -> None:
        """Nothing counted yet.

        Args:
            spike: scores whose absolute sum is more than so many times the average's are scaled down to that.
        """
        self.values = {name: torch.zeros(count, dtype=torch.float64) for name, count in units.items()}
        self.decay = decay
        self.spike = spike
        self.count = 0
        self._weight = 0.0

    def add(self, scores: Mapping[str, Tensor], plan: Plan) -> None:
        """Count one score per unit (or layer) that `plan` keeps; removed units keep what they had."""
        parts = plan.parts
        kept = {name: torch.tensor(parts[name].keep if name in parts else [0], dtype=torch.long) for name in scores}
        new = {name: score.double().cpu() for name, score in scores.items()}
        before = sum(float(self.values[name][units].abs().sum()) for name, units in kept.items())
        most = self.spike * before / self._weight if before > 0 else math.inf
        share = min(1.0, most / max(sum(float(score.abs().sum()) for score in new.values()), 1e-300))
        self.count += 1
        decay = 1 - 1 / self.count if self.decay is None else self.decay
        self._weight = decay * self._weight + 1 - decay
        for name, units in kept.items():
            self.values[name][units] = decay * self.values[name][units] + (1 - decay) * share * new[name]

    def state(self) -> State:
        """The averages, uncorrected, and what they weigh."""
        return State({"count": self.count, "weight": self._weight}, dict(self.values))

    def go_on(self, state: State) -> None:
        """Be where `state` was taken."""
        self.count, self._weight = state.values["count"], state.values["weight"]
        self.values = dict(state.tensors)

    @property
    def scores(self) -> dict[str, Tensor]:
        """Bias-corrected averages, one per original unit."""
        return {name: value / max(self._weight, 1e-12) for name, value in self.values.items()}


class MeanGradients:
    """The mean over batches of some parameters' gradients, for what is only scored when all batches are in."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: dict[int, Tensor] = {}
        self.count = 0

    def add(self) -> None:
        """Count the gradients that there are now."""
        self.count += 1
        for number, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                held = self._sums.get(number)
                self._sums[number] = parameter.grad.clone() if held is None else held.add_(parameter.grad)

    def put(self) -> None:
        """Give the parameters the mean for their gradients."""
        for number, held in self._sums.items():
            self._parameters[number].grad = held / self.count
