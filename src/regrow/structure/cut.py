"""Cutting: making a choice of units true in the tensors."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from regrow.structure.depth import remove_layers
from regrow.structure.groups import RESIDUAL, Group, Groups, Slice
from regrow.structure.offload import Offloaded
from regrow.structure.quantised import cut_weight, kept_as, weight_shape
from regrow.structure.residual import follow, follow_bare, narrowed
from regrow.structure.take import take

HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads")
"""Under which names an attention, or its config, keeps how many heads it has."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Under which names experts, their router and the modules around them keep how many there are."""

HIDDEN_SIZES = ("hidden_dim", "hidden_size", "input_size")
"""Under which names a module with weights along the residual stream keeps how wide it is."""


@torch.no_grad()
def cut(
    model: PreTrainedModel,
    groups: Groups,
    keep: Mapping[str, NDArray[np.int64]],
    optimizer: torch.optim.Optimizer | None = None,
) -> Groups:
    """Remove units from the model's tensors, in place. A layer of which no group keeps a unit goes whole.

    Parameters keep their identity (an optimizer's references stay valid) and change their shape; moments that
    the optimizer holds for them are cut alike. Gradients are dropped: cut between steps.

    Args:
        groups: the groups as they are now.
        keep: group name (`residual` among them) -> numbers (within the group as it is now) of the units that stay,
            ascending. Groups that are not named stay whole. None for all groups of a layer: the layer goes, the config
            with it. None for the channels of the experts that go; the others' keep the same number in each.

    Returns:
        The groups of the model after the cut.
    """
    if emptied := emptied_layers(groups, keep):
        assert all(len(keep[group.name]) == 0 for group in groups if group.layer in emptied)
        groups = remove_layers(model, groups, emptied, optimizer)
    left: dict[str, Group] = {}
    for group in groups:
        units = keep.get(group.name)
        if units is None or len(units) == group.units:
            left[group.name] = group
            continue
        for piece in group.slices if group.expert is None else ():
            _cut_slice(model, piece, units, optimizer)
        if group.is_fused:
            _tell_head_counts(model, group, len(units))
        if group.kind == "expert":
            _tell_expert_counts(model, group, len(units))
        if len(units):
            left[group.name] = group.keep(units)
    for (name, axis), positions_EK in within_experts(model, groups, keep).items():
        _change(model.get_parameter(name), axis, positions_EK, optimizer)
    return _cut_stream(model, _without(groups, left), keep.get(RESIDUAL), optimizer)


def _without(groups: Groups, left: Mapping[str, Group]) -> Groups:
    """What a model comes to of whose groups, by name, this is left."""
    lost = dict.fromkeys((layer.number for layer in groups.layers), 0)
    hidden = dict(lost)
    for group in groups:
        gone = group.units - (left[group.name].units if group.name in left else 0)
        lost[group.layer] += group.cost * gone
        hidden[group.layer] += group.hidden * gone
    removed, residual = sum(lost.values()), groups.residual
    return replace(
        groups,
        groups=tuple(_renumbered(left.values())),
        layers=tuple(
            replace(
                layer,
                parameters=layer.parameters - lost[layer.number],
                block_parameters=layer.block_parameters - lost[layer.number],
                hidden=layer.hidden - hidden[layer.number],
                block_hidden=layer.block_hidden - hidden[layer.number],
            )
            for layer in groups.layers
        ),
        block_parameters=groups.block_parameters - removed,
        total_parameters=groups.total_parameters - removed,
        residual=residual and replace(residual, cost=residual.cost - sum(hidden.values())),
    )


def _renumbered(groups: Iterable[Group]) -> Iterator[Group]:
    """After experts have gone: channels' groups whose slices say at which position their experts now are."""
    seen: dict[tuple[str, int], int] = defaultdict(int)
    for group in groups:
        slices = []
        for piece in group.slices:
            if piece.expert is not None:
                place = piece.parameter, piece.axis
                piece = replace(piece, expert=seen[place])
                seen[place] += 1
            slices.append(piece)
        yield replace(group, slices=tuple(slices))


def emptied_layers(groups: Groups, keep: Mapping[str, NDArray[np.int64]]) -> set[int]:
    """Numbers of the layers that go whole: those of which a group, but that of an expert's channels, keeps no unit."""
    return {g.layer for g in groups if g.expert is None and g.name in keep and len(keep[g.name]) == 0}


def within_experts(
    model: nn.Module, groups: Iterable[Group], keep: Mapping[str, NDArray[np.int64]]
) -> dict[tuple[str, int], Tensor]:
    """(parameter, axis) -> positions that stay `[experts, positions]` where channels of experts go.

    Args:
        groups: of layers that stay.
    """
    stay: dict[tuple[str, int], list[NDArray[np.int64]]] = defaultdict(list)
    narrowed = set()
    for group in groups:  # experts are in ascending order
        units = keep.get(group.name, np.arange(group.units))
        for piece in group.slices if group.expert is not None and len(units) else ():
            gone = np.delete(piece.index, units, axis=0).reshape(-1)
            size = model.get_parameter(piece.parameter).shape[piece.axis]
            stay[piece.parameter, piece.axis].append(np.delete(np.arange(size), gone))
            narrowed |= {(piece.parameter, piece.axis)} if len(gone) else set()
    return {place: torch.from_numpy(np.stack(stay[place])) for place in sorted(narrowed)}


def _cut_stream(
    model: nn.Module, groups: Groups, units: NDArray[np.int64] | None, optimizer: torch.optim.Optimizer | None
) -> Groups:
    residual = groups.residual
    if residual is None or units is None or len(units) == residual.units:
        return groups
    for piece in residual.slices:
        _cut_slice(model, piece, units, optimizer)
    for piece in residual.slices:  # routers, experts and what is around them reshape by their own
        _tell(model, piece.module, HIDDEN_SIZES, residual.units, len(units))
    for name in residual.bare_norms:
        follow_bare(model.get_submodule(name), len(units))
    return replace(narrowed(groups, residual.units - len(units)), residual=residual.keep(units))


def _cut_slice(
    model: nn.Module, piece: Slice, units: NDArray[np.int64], optimizer: torch.optim.Optimizer | None
) -> None:
    parameter = model.get_parameter(piece.parameter)
    gone = np.delete(piece.index, units, axis=0).reshape(-1)
    stay = np.delete(np.arange(weight_shape(parameter)[piece.axis]), gone)
    positions = torch.from_numpy(stay).to(parameter.device)
    module = model.get_submodule(piece.parameter.rpartition(".")[0])
    if kept_as(parameter):
        cut_weight(module, piece.axis, positions)
    else:
        _change(parameter, piece.axis, positions, optimizer)
    _follow(module)


def _change(parameter: nn.Parameter, axis: int, positions: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Cut a parameter and what an optimizer holds for it; positions as `take` has them."""
    if isinstance(parameter, Offloaded):
        parameter.cut(axis, positions)
        return
    before = parameter.shape
    parameter.grad = None
    if optimizer is not None and parameter in optimizer.state:
        state = optimizer.state[parameter]
        for key, moment in state.items():
            if isinstance(moment, Tensor) and moment.shape == before:
                state[key] = take(moment, axis, positions)
    parameter.data = take(parameter.data, axis, positions)


def _follow(module: nn.Module) -> None:
    """Let a module's own record of its width say what its weight now is."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight_shape(module.weight)
    else:
        follow(module)


def _tell_head_counts(model: nn.Module, group: Group, units: int) -> None:
    """Let an attention that takes q, k and v out of one product know how many heads are left.

    Attentions with a projection for each read the counts off the tensors; a fused one needs them to tell q from k.
    They stand on the module, or on its config, which is shared by all layers: hence one of its own.
    """
    module = model.get_submodule(group.consumers[0].module.rpartition(".")[0])
    config = copy.copy(module.config)
    assert isinstance(config, PretrainedConfig)
    for owner in (module, config):
        for name in HEAD_COUNTS:
            if name in vars(owner):
                setattr(owner, name, vars(owner)[name] * units // group.units)
    module.config = config


def _tell_expert_counts(model: nn.Module, group: Group, units: int) -> None:
    """Let router and experts, and all modules around them, know how many experts are left."""
    for piece in group.slices:
        _tell(model, piece.module, EXPERT_COUNTS, group.units, units)


def _tell(model: nn.Module, name: str, keys: Iterable[str], before: int, now: int) -> None:
    """Let a module, and all around it, know of a count that they keep under one of these names."""
    parts = name.split(".")
    for depth in range(len(parts) + 1):
        record = vars(model.get_submodule(".".join(parts[:depth])))
        record |= {key: now for key in keys if record.get(key) == before}
