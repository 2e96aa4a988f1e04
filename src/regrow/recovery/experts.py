"""The weights of experts and their router as a criterion sees them: one expert's own, or all of a layer's."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.criteria.evidence import Linear
from regrow.recovery.measured import base_pieces
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


def expert_evidence(
    model: PreTrainedModel,
    piece: Slice,
    weight: Tensor,
    gradient: Tensor | None,
    start: Mapping[str, tuple[Tensor, Tensor]],
) -> Linear:
    """Of all experts' weights in one tensor: one expert's with its adapter, or (whole experts) all, their rows below
    one another, without.
    """
    if piece.expert is None:
        rows = weight.shape[1]
        positions = torch.from_numpy(piece.index)[:, :, None] * rows + torch.arange(rows)
        flat = None if gradient is None else gradient.flatten(0, 1)
        return Linear(piece.module, weight.flatten(0, 1), 0, positions.flatten(1).to(weight.device), flat)
    axis = 1 if piece.is_input else 0
    own, slope = weight[piece.expert], None if gradient is None else gradient[piece.expert]
    if piece.axis - 1 != axis:  # kept as [in, out]
        own, slope = own.T, None if slope is None else slope.T
    linear = Linear(piece.module, own, axis, torch.from_numpy(piece.index).to(weight.device), slope)
    lora = lora_of(model.get_submodule(piece.module), piece.parameter.rpartition(".")[2])
    if lora is None:
        return linear
    (a, b), (start_a, start_b) = lora.factors, start.get(adapter_name(piece.parameter), (None, None))
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
