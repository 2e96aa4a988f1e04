"""Frozen weights that lie elsewhere and come to the device for one product at a time.

Elsewhere is the host's memory, a file, or the devices of several processes, of which each holds a part.

Where such a weight belongs there is an `Offloaded` parameter: shape, dtype and device are the weight's, the memory is
one number's, and whoever computes with it gets NaN. Hooks on the module that owns it put the weight there before its
forward pass and take it away after. What autograd saves of that pass are the weights themselves; with activation
checkpointing they are brought once more in the backward pass, layer by layer, and a layer's are let go as soon as it
has been run through. So at any time the weights of one layer at most are on the device.

A cut is made on the way: rows and columns that are gone are not brought. So is a merge.

Not covered: writing to such a weight, and gradients of it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.sharding import Held
from regrow.structure.take import take

Place = Literal["cpu", "disk", "shards"]


class Store(Protocol):
    """Where one weight lies."""

    def read(self) -> Tensor:
        """The weight as it is now, on any device."""

    def cut(self, axis: int, positions: Tensor) -> "Store":
        """The same with some positions of an axis only, given as to `take`."""


@dataclass(frozen=True)
class InMemory:
    """A weight in the host's memory; a cut frees what goes."""

    tensor: Tensor

    def read(self) -> Tensor:
        """See `Store`."""
        return self.tensor

    def cut(self, axis: int, positions: Tensor) -> "InMemory":
        """See `Store`."""
        return InMemory(take(self.tensor, axis, positions))


@dataclass(frozen=True)
class InFile:
    """A weight in a file that is never written to; a cut is remembered, and made whenever the weight is read."""

    whole: Callable[[], Tensor]
    """Reads all of it."""
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    """Axis -> positions that are left of it; those of the experts that are left where experts differ."""

    def read(self) -> Tensor:
        """See `Store`."""
        tensor = self.whole()
        for axis, positions in sorted(self.kept.items()):
            tensor = take(tensor, axis, positions)
        return tensor

    def cut(self, axis: int, positions: Tensor) -> "InFile":
        """See `Store`."""
        kept = dict(self.kept)
        if axis == 0:  # where others differ between experts, their rows go with them
            kept = {other: rows[positions] if rows.ndim == 2 else rows for other, rows in kept.items()}
        before = self.kept.get(axis)
        if before is not None:
            positions = before[positions] if before.ndim == 1 else take(before, 1, positions)
        kept[axis] = positions
        return InFile(self.whole, kept)


@dataclass(frozen=True)
class InParts:
    """A weight of which every process holds some rows; all read it at once, and cut it at once."""

    held: Held
    hold: Callable[[Tensor], Held]
    """Parts a tensor."""
    origin: InFile
    """Where it comes from, cut alike."""

    def read(self) -> Tensor:
        """See `Store`."""
        return self.held.read()

    def cut(self, axis: int, positions: Tensor) -> "InParts":
        """See `Store`."""
        whole = self.read()
        left = take(whole, axis, positions)
        return InParts(self.hold(left), self.hold, self.origin.cut(axis, positions))


class Offloaded(nn.Parameter):
    """Stands for a frozen weight that lies elsewhere."""

    store: Store
    merge: Callable[[Tensor], Tensor] | None
    """What is still to be added to the weight, in float32."""

    @classmethod
    def of(cls, store: Store, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> "Offloaded":
        """Stand for the weight in a store.

        Args:
            dtype: of the weight where it is computed with.
            device: the one it is computed on.
        """
        parameter = cls(_nothing(shape, dtype, device), requires_grad=False)
        parameter.store, parameter.merge = store, None
        return parameter

    def bring(self) -> Tensor:
        """The weight, on the device."""
        tensor = self.store.read().to(self.device)
        return (self.merge(tensor) if self.merge else tensor).to(self.dtype)

    def cut(self, axis: int, positions: Tensor) -> None:
        """Keep some positions of an axis, given as to `take`."""
        self.store = self.store.cut(axis, positions.cpu())
        shape = list(self.shape)
        shape[axis] = positions.shape[-1]
        self.data = _nothing(torch.Size(shape), self.dtype, self.device)

    def retype(self, dtype: torch.dtype) -> None:
        """Let the weight be of another dtype where it is computed with."""
        self.data = _nothing(self.shape, dtype, self.device)

    def twin(self, dtype: torch.dtype | None) -> "Offloaded":
        """Another that stands for the same weight; what becomes of one does not touch the other."""
        assert self.merge is None
        return Offloaded.of(self.store, self.shape, dtype or self.dtype, self.device)


def _nothing(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(shape)


class _Brought(nn.Parameter):
    """A weight that is here for now."""

    away: Offloaded
    stays: bool
    """Whether it is here for longer than one forward pass."""


def _bring(module: nn.Module, args: Any, stays: bool = False) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(parameter, Offloaded):
            brought = _Brought(parameter.bring(), requires_grad=False)
            brought.away, brought.stays = parameter, stays
            setattr(module, name, brought)


def _take_away(module: nn.Module, args: Any, output: Any, stays: bool = False) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(parameter, _Brought) and parameter.stays == stays:
            setattr(module, name, returned(parameter))


@contextmanager
def staying(layer: nn.Module) -> Iterator[None]:
    """Within this context a layer's offloaded weights are here, brought once for however many forward passes."""
    try:
        for module in layer.modules():
            _bring(module, (), stays=True)
        yield
    finally:
        for module in layer.modules():
            _take_away(module, (), None, stays=True)


def returned(parameter: nn.Parameter) -> nn.Parameter:
    """What stands in the place of a weight while it is not here; a weight that is always here itself."""
    return parameter.away if isinstance(parameter, _Brought) else parameter


def come_and_go(model: nn.Module) -> None:
    """Let a model's offloaded weights come before, and go after, the forward pass of the module that owns each."""
    for module in model.modules():
        if any(isinstance(parameter, Offloaded) for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_bring)
            # Also when the pass is cut short: a recomputation stops as soon as it has what it wants.
            module.register_forward_hook(_take_away, always_call=True)


def let_go(model: nn.Module) -> None:
    """Give back the parts of weights that processes hold together: from here on they are read from their files."""
    for parameter in model.parameters():
        if isinstance(parameter, Offloaded) and isinstance(parameter.store, InParts):
            parameter.store = parameter.store.origin


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weight of the model lies elsewhere."""
    return any(isinstance(parameter, Offloaded) for parameter in model.parameters())


def convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert a model's parameters in place. Not the buffers: rotary tables stay as precise as a reload makes them.

    Nor what transformers keeps in float32 in such a model, whatever it is loaded in: a router, for example.
    """
    lower = dtype in (torch.float16, torch.bfloat16)
    precise = [re.compile(rf"(^|\.){name}($|\.)") for name in model._keep_in_fp32_modules_strict or () if lower]
    for name, parameter in model.named_parameters():
        kept = torch.float32 if any(each.search(name) for each in precise) else dtype
        if isinstance(parameter, Offloaded):
            parameter.retype(kept)
        else:
            parameter.data = parameter.data.to(kept)
