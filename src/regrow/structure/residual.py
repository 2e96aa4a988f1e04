"""The residual stream's width: what a narrower stream leaves of everything else, and masks that compute the same.

A hidden channel crosses every other group. Parameters of a matrix are rows × columns, so what one cut brings depends on
the other: `Group.hidden` and `Layer.hidden` say how much of a cost lies on each hidden channel.

A norm takes a mean over the stream. In a narrower model that is the mean over the channels that are left, and so it is
behind a mask: each norm computes as its own narrow copy, on those channels. Whatever reads the stream without a norm
gets zeros in the others' place. Nothing is between present and gone: a hidden channel does not fade.

Shapes: B batch, T time, D hidden channels, U units (a channel each, unless the model ties several).
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from regrow.structure.adapters import is_linear
from regrow.structure.groups import Group, Groups, Slice


def narrowed(groups: Groups, removed: int) -> Groups:
    """What the groups come to once the stream has lost some channels: costs, not slices."""
    residual = groups.residual
    if residual is None or removed == 0:
        return groups
    layers = tuple(
        replace(
            layer,
            parameters=layer.parameters - removed * layer.hidden,
            block_parameters=layer.block_parameters - removed * layer.block_hidden,
        )
        for layer in groups.layers
    )
    return replace(
        groups,
        groups=tuple(replace(group, cost=group.cost - removed * group.hidden) for group in groups),
        layers=layers,
        block_parameters=sum(layer.block_parameters for layer in layers),
        total_parameters=groups.total_parameters - removed * residual.cost,
        residual=replace(residual, units=residual.units - removed),
    )


def block_cost(groups: Groups) -> int:
    """What a hidden channel brings of the block parameters."""
    return sum(layer.block_hidden for layer in groups.layers)


def is_norm(model: nn.Module, piece: Slice) -> bool:
    """Whether a slice of the stream belongs to a norm: neither a linear, nor an embedding, nor experts."""
    module = model.get_submodule(piece.module)
    return (
        not (is_linear(module) or isinstance(module, nn.Embedding)) and model.get_parameter(piece.parameter).ndim == 1
    )


def writers(model: nn.Module, groups_path: str, residual: Group) -> list[str]:
    """Modules whose output is added to the stream: linears, or, where the weights are experts', the layer's child.

    Args:
        groups_path: dotted name of the list of decoder layers.
    """
    depth = groups_path.count(".") + 3
    found: dict[str, None] = {}
    pieces = [s for s in residual.slices if not s.is_input and not s.is_adapter and s.module.startswith(groups_path)]
    for piece in pieces:
        if model.get_parameter(piece.parameter).ndim > 2:
            found[".".join(piece.module.split(".")[:depth])] = None
    for piece in pieces:
        if is_linear(model.get_submodule(piece.module)):
            parents = (".".join(piece.module.split(".")[:n]) for n in range(1, piece.module.count(".") + 1))
            if not any(parent in found for parent in parents):
                found[piece.module] = None
    return list(found)


def narrow_norm(module: nn.Module, kept: Tensor) -> nn.Module:
    """A norm over only the channels `kept` (positions, ascending)."""
    small = copy.deepcopy(module)
    small._forward_hooks.clear()
    small._forward_pre_hooks.clear()
    for parameter in small.parameters():
        parameter.data = parameter.data[kept.to(parameter.device)]
    follow(small)
    follow_bare(small, len(kept))
    return small


def follow(module: nn.Module) -> None:
    """Let a module's own record of its width say what its weight now is; linears are `cut`'s."""
    match module:
        case nn.Embedding():
            module.embedding_dim = module.weight.shape[1]
        case nn.LayerNorm() | nn.RMSNorm():
            module.normalized_shape = tuple(module.weight.shape)
        case Conv1D():
            module.nx, module.nf = module.weight.shape


def follow_bare(norm: nn.Module, width: int) -> None:
    """Let a norm without weights, if it keeps a record of its width, know what it now is."""
    if "normalized_shape" in vars(norm):
        norm.normalized_shape = (width,)  # type: ignore[assignment]


def mask_hooks(model: nn.Module, residual: Group, values: Callable[[], Tensor]) -> Iterator[RemovableHandle]:
    """Hooks that make a model compute as if the hidden units whose value is 0 were cut.

    Args:
        values: the units' gates as they are now, `[U]`, each 0 or 1.
    """
    mask = _Mask(residual, values)
    norms = [s.module for s in residual.slices if not s.is_adapter and is_norm(model, s)]
    for name in dict.fromkeys((*norms, *residual.bare_norms)):
        yield model.get_submodule(name).register_forward_hook(partial(_narrow, mask))
    consumers = [s.module for s in residual.consumers]  # but a head that is tied: an embedding takes tokens
    for name in (n for n in dict.fromkeys(consumers) if not isinstance(model.get_submodule(n), nn.Embedding)):
        yield model.get_submodule(name).register_forward_pre_hook(partial(_blank, mask))


class _Mask:
    """Which channels are there, and the narrow norms; made anew when the gates change."""

    def __init__(self, residual: Group, values: Callable[[], Tensor]) -> None:
        widest = max(residual.slices, key=lambda piece: piece.index.size)
        self._index = torch.from_numpy(widest.index)
        self._values = values
        self._seen: Tensor | None = None
        self._norms: dict[nn.Module, nn.Module] = {}
        self.kept: Tensor | None = None
        """Positions of the channels that are there; None: all are."""

    def look(self) -> "_Mask":
        value = self._values()
        if value is not self._seen:
            assert bool(((value == 0) | (value == 1)).all()), "hidden channels are there, or not"
            self._seen = value
            self._norms.clear()
            whole = bool((value == 1).all())
            self.kept = None if whole else self._index[value == 1].reshape(-1).sort().values
        return self

    def norm(self, module: nn.Module) -> nn.Module:
        if module not in self._norms:
            assert self.kept is not None
            self._norms[module] = narrow_norm(module, self.kept)
        return self._norms[module]


def _narrow(mask: _Mask, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    positions = mask.look().kept
    if positions is None:
        return output
    kept = positions.to(output.device)
    there = mask.norm(module)(args[0].index_select(-1, kept), *args[1:])
    return torch.zeros_like(output).index_copy(-1, kept, there.to(output.dtype))


def _blank(mask: _Mask, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    positions = mask.look().kept
    if positions is None:
        return args
    there = torch.zeros(args[0].shape[-1], dtype=args[0].dtype, device=args[0].device)
    there[positions.to(there.device)] = 1
    return (args[0] * there, *args[1:])
