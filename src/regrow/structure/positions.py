"""Index maps between a model and a cut of it: which positions of which parameters stay, and under which names.

`gather` goes from the whole model to the cut one, `scatter` back, with zeros where something was removed; a factor
trained on the cut model becomes one of the whole model that way (LoRAM, arXiv 2502.13533, eq. 6). For every x of the
cut model's shape `gather(scatter(x)) == x`.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from regrow.structure.cut import emptied_layers, within_experts
from regrow.structure.groups import Groups, Slice
from regrow.structure.take import take


@dataclass(frozen=True)
class Kept:
    """What is left of one axis."""

    size: int
    """Of the axis in the whole model."""
    positions: Tensor
    """Those that stay, ascending; int64. Where they differ between experts, a row for each expert that stays."""

    @property
    def left(self) -> int:
        """How many positions stay, in each expert that does."""
        return self.positions.shape[-1]

    def gather(self, tensor: Tensor, axis: int) -> Tensor:
        """The positions that stay, of a tensor that has this axis whole (and only the experts that stay)."""
        return take(tensor, axis, self.positions)

    def scatter(self, tensor: Tensor, axis: int) -> Tensor:
        """A tensor that has the axis whole, zero at the positions that went."""
        assert tensor.shape[axis] == self.left
        shape = list(tensor.shape)
        shape[axis] = self.size
        whole = tensor.new_zeros(shape)
        if self.positions.ndim == 1:
            return whole.index_copy(axis, self.positions, tensor)
        for part, positions, into in zip(tensor, self.positions, whole, strict=True):
            into.index_copy_(axis - 1, positions, part)
        return whole


@dataclass(frozen=True)
class IndexMap:
    """How a cut model's parameters lie in the whole one's. Names are those of a model without adapters."""

    axes: Mapping[tuple[str, int], Kept]
    """(parameter of the whole model, axis) -> what is left; an axis that is not named stays whole."""
    inputs: Mapping[str, Kept]
    """Linear of the whole model -> what is left of its inputs; the same for those that stay whole."""
    outputs: Mapping[str, Kept]
    layers: Mapping[str, str | None]
    """Module name of a decoder layer -> its name in the cut model; None: it went whole."""

    def name_after(self, name: str) -> str | None:
        """What a module or parameter of the whole model is called in the cut one; None if it went with its layer."""
        for before, after in self.layers.items():
            if name == before or name.startswith(f"{before}."):
                return None if after is None else after + name.removeprefix(before)
        return name

    def name_before(self, name: str) -> str:
        """What a module or parameter of the cut model is called in the whole one."""
        for before, after in self.layers.items():
            if after is not None and (name == after or name.startswith(f"{after}.")):
                return before + name.removeprefix(after)
        return name

    def gather(self, parameter: str, tensor: Tensor) -> Tensor:
        """What is left of a parameter, by its name in the whole model."""
        for axis in range(tensor.ndim):
            if (kept := self.axes.get((parameter, axis))) is not None:
                tensor = kept.gather(tensor, axis)
        return tensor


def index_map(model: PreTrainedModel, whole: Groups, keep: Mapping[str, NDArray[np.int64]]) -> IndexMap:
    """The map from a model to its cut.

    Args:
        model: whole, without adapters; on any device, for only its shapes count.
        whole: its groups.
        keep: as for `cut`: group name -> numbers of the units that stay; none: the layer goes.
    """
    emptied = emptied_layers(whole, keep)
    layers: dict[str, str | None] = {}
    stay = [layer for layer in whole.layers if layer.number not in emptied]
    for layer in whole.layers:
        path = layer.name.rpartition(".")[0]
        layers[layer.name] = f"{path}.{stay.index(layer)}" if layer in stay else None

    gone: dict[tuple[str, int], list[NDArray[np.int64]]] = defaultdict(list)
    slices: dict[tuple[str, int], Slice] = {}
    for group in (*whole, *([whole.residual] if whole.residual else [])):
        if (
            group.expert is None
            and group.layer not in emptied
            and len(units := keep.get(group.name, range(group.units))) < group.units
        ):
            for piece in group.slices:
                slices[piece.parameter, piece.axis] = piece
                gone[piece.parameter, piece.axis].append(np.delete(piece.index, units, axis=0).reshape(-1))

    axes: dict[tuple[str, int], Kept] = {}
    inputs: dict[str, Kept] = {}
    outputs: dict[str, Kept] = {}
    for (name, axis), removed in gone.items():
        parameter = model.get_parameter(name)
        size = parameter.shape[axis]
        kept = Kept(size, torch.from_numpy(np.delete(np.arange(size), np.concatenate(removed))))
        axes[name, axis] = kept
        if parameter.ndim == 2:
            piece = slices[name, axis]
            (inputs if piece.is_input else outputs)[piece.module] = kept
    for (name, axis), positions in within_experts(model, (g for g in whole if g.layer not in emptied), keep).items():
        axes[name, axis] = Kept(model.get_parameter(name).shape[axis], positions)
    return IndexMap(axes, inputs, outputs, layers)
