"""What a criterion may look at: the tensors of one group, and what was measured of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regrow.compensation.moments import ChannelMoments, InputMoments
from regrow.structure.gates import GateMoments

ROWS_AT_ONCE = 256
"""Scores that need a weight-shaped intermediate compute it for this many rows at a time on a CPU, in its caches."""
ENTRIES_AT_ONCE = 2**26
"""An accelerator takes so many entries, and more rows: launching a kernel costs it as much as a small one does."""


@dataclass(frozen=True)
class Linear:
    """One base weight that a group has a share in, with the LoRA factors around it."""

    name: str
    weight: Float[Tensor, "out in"]
    axis: int
    """0: the units own rows of `weight` (q, k, v, gate, up). 1: they own columns (o, down)."""
    positions: Int[Tensor, "units per_unit"]
    """The rows or columns that each unit owns."""
    weight_grad: Float[Tensor, "out in"] | None = None
    lora_a: Float[Tensor, "rank in"] | None = None
    lora_b: Float[Tensor, "out rank"] | None = None
    lora_a_grad: Float[Tensor, "rank in"] | None = None
    lora_b_grad: Float[Tensor, "out rank"] | None = None
    scaling: float = 0.0
    """The adapter's s = alpha / rank."""
    start_a: Float[Tensor, "rank in"] | None = None
    """`lora_a` as it was when the current period of an lhspg schedule began."""
    start_b: Float[Tensor, "out rank"] | None = None
    inputs: ChannelMoments | None = None
    """Of each of its input channels, if the criterion needs them."""
    squared_grad: Float[Tensor, "out in"] | None = None
    """Mean over sequences of the squared gradient of each one's mean loss, if the criterion needs it."""
    estimated_grad: Float[Tensor, "out in"] | None = None
    """What forward passes alone tell of the gradient, if the criterion needs it."""

    def row_blocks(self) -> Iterator[slice]:
        """Slices of rows that cover the weight, `ROWS_AT_ONCE` at a time or `ENTRIES_AT_ONCE`."""
        rows, columns = self.weight.shape
        many = ROWS_AT_ONCE if self.weight.is_cpu else max(ENTRIES_AT_ONCE // columns, 1)
        for start in range(0, rows, many):
            yield slice(start, start + many)

    def effective_weight(self, rows: slice) -> Float[Tensor, "rows in"]:
        """`W + s B A` of some rows, float32: what the layer computes with. A copy: criteria work on it in place."""
        weight = self.weight[rows].to(torch.float32, copy=True)
        if self.lora_a is None or self.lora_b is None:
            return weight
        return torch.addmm(weight, self.lora_b[rows].float(), self.lora_a.float(), alpha=self.scaling)

    def start_weight(self, rows: slice) -> Float[Tensor, "rows in"]:
        """`W + s B₀A₀` of some rows, float32: the effective weight when the period began; `W` if none has."""
        weight = self.weight[rows].float()
        if self.start_a is None or self.start_b is None:
            return weight
        return torch.addmm(weight, self.start_b[rows].float(), self.start_a.float(), alpha=self.scaling)

    def displacement(self, rows: slice) -> Float[Tensor, "rows in"]:
        """`s (BA − B₀A₀)` of some rows, float32: what LoRA has added since; zeros without an adapter."""
        a, b = self.lora_a, self.lora_b
        if a is None or b is None:
            return torch.zeros_like(self.weight[rows], dtype=torch.float32)
        if self.start_a is not None and self.start_b is not None:
            a, b = torch.cat([a, self.start_a], 0), torch.cat([b, -self.start_b], 1)
        return self.scaling * (b[rows].float() @ a.float())

    def sum_over_units(self, entries: Callable[[slice], Float[Tensor, "rows in"]]) -> Float[Tensor, " units"]:
        """Sum a value per entry of the weight, given some rows at a time, over all that each unit owns; on the CPU."""
        return self.per_unit(self.per_position(entries))

    def per_position(self, entries: Callable[[slice], Float[Tensor, "rows in"]]) -> Float[Tensor, " positions"]:
        """The same over each row (axis 0) or column (axis 1), where the weight is."""
        total = torch.zeros(self.weight.shape[self.axis], device=self.weight.device)
        for rows in self.row_blocks():
            values = entries(rows)
            if self.axis == 0:
                total[rows] = values.sum(1)
            else:
                total += values.sum(0)
        return total

    def per_unit(self, per_position: Float[Tensor, " positions"]) -> Float[Tensor, " units"]:
        """Sum a value per row (axis 0) or column (axis 1) over each unit's positions; on the CPU, as gates' moments."""
        return per_position[self.positions].sum(1).cpu()


@dataclass(frozen=True)
class Evidence:
    """One group, as a criterion sees it. Scores are comparable within a group unless a criterion says more.

    A whole layer comes as a group of one unit, without linears.
    """

    name: str
    kind: str
    """`attention`, `ffn` (also of one expert), `expert`, `hidden` (the residual stream), or `layer` (a whole one)."""
    units: int
    linears: Sequence[Linear]
    gate: GateMoments | None = None
    """Moments of the gate derivatives since the last scoring, if the criterion needs them."""
    generator: torch.Generator = field(default_factory=torch.Generator)
    """The run's own source of chance."""
    similarity: float | None = None
    """Mean over tokens of the cosine between what enters the layer and what leaves it, if the criterion needs it."""
    inputs: InputMoments | None = None
    """Of the consumer's input, if the criterion needs them and there is one consumer."""
    mask: Float[Tensor, " units"] | None = None
    """How likely the learned mask of each unit is open, and its layer's with it, if the criterion needs it."""

    @cached_property
    def consumers(self) -> tuple[Linear, ...]:
        """The linears of which the units own columns."""
        return tuple(linear for linear in self.linears if linear.axis == 1)


def summed(evidence: Evidence, entries: Callable[[Linear, slice], Float[Tensor, "rows in"]]) -> Float[Tensor, " units"]:
    """Sum a value per entry, given some rows of a linear at a time, over everything that each unit owns."""
    return torch.stack([linear.sum_over_units(partial(entries, linear)) for linear in evidence.linears]).sum(0)
