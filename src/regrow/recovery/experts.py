"""The weights of experts and their router as a criterion sees them: one expert's own, or all of a layer's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.criteria.evidence import Linear
from regrow.recovery.measured import base_pieces
from regrow.structure.adapters import is_turned
from regrow.structure.expert_lora import adapter_name, lora_of
from regrow.structure.experts import is_experts
from regrow.structure.groups import Group, Slice


def weight_pieces(model: PreTrainedModel, group: Group) -> list[Slice]:
    """As `base_pieces`, and a group's shares in experts and their router; of hidden channels only those in linears."""
    if group.expert is None and group.kind != "expert":
        return base_pieces(model, group)
    return [piece for piece in group.slices if not piece.is_adapter and _is_weight(model, piece)]


def _is_weight(model: PreTrainedModel, piece: Slice) -> bool:
    """Whether a slice is of a product's weight: all experts' of a layer, or a router's."""
    if is_experts(model.get_submodule(piece.module)):
        return model.get_parameter(piece.parameter).ndim == 3
    return piece.parameter.endswith(".weight")


@dataclass(frozen=True)
class AllExperts(Linear):
    """The weights of all experts, the rows of one below those of another, with adapters, which no two factors hold."""

    now: tuple[Tensor, Tensor] | None = None
    """A `[E, r, in]` and B `[E, out, r]`, if there are any."""
    then: tuple[Tensor, Tensor] | None = None
    """As they were when the current period of an lhspg schedule began; None: zero."""
    is_turned: bool = False
    """Whether rows are an expert's inputs."""

    def effective_weight(self, rows: slice) -> Tensor:
        """See `Linear`."""
        return self.weight[rows].float() + self._added(self.now, rows)

    def start_weight(self, rows: slice) -> Tensor:
        """See `Linear`."""
        return self.weight[rows].float() + self._added(self.then, rows)

    def displacement(self, rows: slice) -> Tensor:
        """See `Linear`."""
        return self._added(self.now, rows) - self._added(self.then, rows)

    def _added(self, factors: tuple[Tensor, Tensor] | None, rows: slice) -> Tensor:
        """`s B A` of some rows."""
        if factors is None:
            return torch.zeros_like(self.weight[rows], dtype=torch.float32)
        experts, found = len(factors[0]), []
        each = len(self.weight) // experts
        for expert in range(rows.start // each, min(-(-rows.stop // each), experts)):
            own = slice(max(rows.start - expert * each, 0), min(rows.stop - expert * each, each))
            a, b = (factor[expert].float() for factor in factors)
            found.append((a.T[own] @ b.T) if self.is_turned else (b[own] @ a))
        return self.scaling * torch.cat(found)


def expert_evidence(
    model: PreTrainedModel,
    piece: Slice,
    weight: Tensor,
    gradient: Tensor | None,
    start: Mapping[str, tuple[Tensor, Tensor]],
) -> Linear:
    """Of all experts' weights in one tensor: one expert's, or (whole experts) all; with their adapters."""
    experts, name = model.get_submodule(piece.module), piece.parameter.rpartition(".")[2]
    lora, begun = lora_of(experts, name), start.get(adapter_name(piece.parameter))
    if piece.expert is None:
        rows = weight.shape[1]
        positions = torch.from_numpy(piece.index)[:, :, None] * rows + torch.arange(rows)
        flat = None if gradient is None else gradient.flatten(0, 1)
        whole = AllExperts(piece.module, weight.flatten(0, 1), 0, positions.flatten(1).to(weight.device), flat)
        if lora is None:
            return whole
        a, b = (factor.detach() for factor in lora.factors)
        return replace(whole, now=(a, b), then=begun, scaling=lora.scaling, is_turned=is_turned(experts))
    axis = 1 if piece.is_input else 0
    own, slope = weight[piece.expert], None if gradient is None else gradient[piece.expert]
    if piece.axis - 1 != axis:  # kept as [in, out]
        own, slope = own.T, None if slope is None else slope.T
    linear = Linear(piece.module, own, axis, torch.from_numpy(piece.index).to(weight.device), slope)
    if lora is None:
        return linear
    (a, b), (start_a, start_b) = lora.factors, begun or (None, None)
    return replace(
        linear,
        lora_a=a.detach()[piece.expert],
        lora_b=b.detach()[piece.expert],
        lora_a_grad=None if a.grad is None else a.grad[piece.expert],
        lora_b_grad=None if b.grad is None else b.grad[piece.expert],
        scaling=lora.scaling,
        start_a=None if start_a is None else start_a[piece.expert],
        start_b=None if start_b is None else start_b[piece.expert],
    )
