"""Groups: what can be removed from a model, unit by unit, and what each unit costs."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from regrow.errors import InputError
from regrow.structure.adapters import is_linear
from regrow.structure.experts import is_experts
from regrow.structure.quantised import weight_count, weight_shape
from regrow.structure.trace import Axis, Trace, decoder_layers, distinct_layers, skeleton, trace

MULTIPLE = 8
"""Channels of experts stay in multiples of this: the kernels that compute all experts at once want rows of 16 bytes."""

RESIDUAL = "residual"
"""Name of the group of hidden channels."""


@dataclass(frozen=True)
class Slice:
    """The positions along one axis of one parameter that each unit of a group owns."""

    parameter: str
    """Dotted name of the parameter in the model that was traced."""
    axis: int
    is_input: bool
    """Whether these are columns of a consumer (o_proj, down_proj) rather than rows of a producer."""
    index: NDArray[np.int64]
    """Shape `[units, positions per unit]`."""
    expert: int | None = None
    """Position along axis 0 of the expert whose part of the parameter the positions are in; None: in all of it."""

    @property
    def is_adapter(self) -> bool:
        """Whether the parameter belongs to a LoRA adapter."""
        return ".lora_" in self.parameter

    @property
    def module(self) -> str:
        """Dotted name of the linear (or norm), the same with and without LoRA around it."""
        return self.parameter.rpartition(".")[0].removesuffix(".base_layer").partition(".lora_")[0]

    def keep(self, units: NDArray[np.int64]) -> "Slice":
        """The slice of the same axis once only `units` (numbers within this slice) are left on it."""
        gone = np.delete(self.index, units, axis=0).reshape(-1)
        kept = self.index[units]
        return replace(self, index=kept - np.searchsorted(np.sort(gone), kept))


@dataclass(frozen=True)
class Group:
    """Units of one kind in one layer; a unit is a minimally removable structure."""

    name: str
    """`layers.<number>.<kind>`, of the channels of an expert `layers.<number>.expert<number>.ffn`: a plan's key;
    `residual` for the residual stream."""
    layer: int
    """The layer's `number`; -1 for the residual stream, which goes through all of them."""
    kind: str
    """`attention`: a unit is a KV head with its query heads. `ffn`: a channel. `expert`: an expert with its part of the
    router. `hidden`: a channel of the residual stream."""
    units: int
    slices: tuple[Slice, ...]
    cost: int
    """Parameters that removing one unit removes, adapters not counted; of an expert without those of its channels."""
    hidden: int = 0
    """How many of them lie on each hidden channel: what a hidden channel no longer brings once the unit is gone."""
    widths: Sequence[int] | None = None
    """How many of the units of the whole model may stay in a model of a stock class, ascending; None: any number."""
    expert: int | None = None
    """The number, in the model that was traced, of the expert whose channels these are."""
    multiple: int = 1
    """What the number of units that stay is a multiple of, unless all do."""
    least: int = 1
    """How many stay at least while their layer does."""

    def keep(self, units: NDArray[np.int64]) -> "Group":
        """The group once only `units` are left."""
        return replace(self, units=len(units), slices=tuple(s.keep(units) for s in self.slices))

    def only(self, units: NDArray[np.int64]) -> "Group":
        """Some of the units, nothing being cut: positions stay as they are."""
        return replace(self, units=len(units), slices=tuple(replace(s, index=s.index[units]) for s in self.slices))

    @property
    def is_fused(self) -> bool:
        """Whether q, k and v come from one product: a unit then owns more rows of it than columns of the consumer."""
        widest = max((s.index.shape[1] for s in self.slices if not s.is_input), default=0)
        return self.kind == "attention" and widest > self.consumers[0].index.shape[1]

    @property
    def consumers(self) -> tuple[Slice, ...]:
        """The base weights whose columns the units own: where the gates sit."""
        return tuple(s for s in self.slices if s.is_input and not s.is_adapter)


@dataclass(frozen=True)
class Layer:
    """A decoder layer as a depth unit."""

    name: str
    """Dotted name of its module in the model as it is now."""
    number: int
    """In the model that was traced; a layer keeps it when layers before it are cut."""
    parameters: int
    block_parameters: int
    """Those of its modules that the groups have a share in."""
    hidden: int = 0
    """Of `parameters`, those on each hidden channel."""
    block_hidden: int = 0
    """Of `block_parameters`."""

    @property
    def unit(self) -> str:
        """`layers.<number>`: the depth unit's name, beside the groups' `layers.<number>.<kind>`."""
        return f"layers.{self.number}"


@dataclass(frozen=True)
class Groups(Sequence[Group]):
    """What a model is made of, as far as pruning goes; a sequence of the groups within its layers."""

    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    linears: tuple[str, ...]
    """The prunable linears of the decoder layers: where LoRA goes."""
    block_parameters: int
    """Parameters of all modules that the groups have a share in."""
    total_parameters: int
    residual: Group | None = None
    """The hidden channels, coupled through all layers, embeddings, norms and head: a group that crosses all others, so
    that costs of it and of them multiply rather than add. None if the model has no such stream to narrow."""

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Group, ...]: ...
    def __getitem__(self, index: int | slice) -> Group | tuple[Group, ...]:
        return self.groups[index]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def to_json(self) -> dict[str, object]:
        """Plain data: what `regrow inspect --json` prints."""
        return {
            "total_parameters": self.total_parameters,
            "block_parameters": self.block_parameters,
            "groups": [self._described(group) for group in self],
            "layers": [{"name": layer.name, "parameters": layer.parameters} for layer in self.layers],
            **({} if self.residual is None else {"residual": self._described(self.residual)}),
        }

    def _described(self, group: Group) -> dict[str, object]:
        return {
            "name": group.name,
            "layer": group.layer,
            "kind": group.kind,
            "units": group.units,
            "parameters_per_unit": group.cost,
            "share_of_total": group.units * group.cost / self.total_parameters,
            "slices": [{"parameter": s.parameter, "axis": s.axis, "per_unit": s.index.shape[1]} for s in group.slices],
        }

    def by_name(self, name: str) -> Group:
        """The group of that name."""
        return self._by_name[name]

    def in_experts(self, kinds: Collection[str]) -> bool:
        """Whether any unit of these kinds is an expert, or lies within one."""
        of_experts = (group for group in self if group.expert is not None or group.kind == "expert")
        return any(group.kind.rstrip("0123456789") in kinds for group in of_experts)

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}


def find_groups(model: PreTrainedModel) -> Groups:
    """Find the minimally removable structures of a decoder-only language model by tracing it.

    Works on any device, dtype and size (the trace holds no weights), before and after LoRA is attached, before
    and after a cut. LoRA factors belong to the groups of the linear they are wrapped around: B is cut with the
    rows, A with the columns, the rank axis never.

    Raises:
        InputError: if the model cannot be traced; the message names the module and the operator.
    """
    path, layers = decoder_layers(model)
    alike = distinct_layers(layers)
    found = trace(skeleton(model, [numbers[0] for numbers in alike]))

    inside = [axis for axis in found.axes if axis.parameter.startswith(f"{path}.")]
    outside = {int(c) for axis in found.axes if axis not in inside for c in np.unique(axis.classes)}
    groups = []
    for position, numbers in enumerate(alike):
        prefix = f"{path}.{position}."
        own = [axis for axis in inside if axis.parameter.startswith(prefix)]
        for part in _groups_of_layer(own, outside, found):
            for number in numbers:
                moved = tuple(
                    replace(s, parameter=f"{path}.{number}.{s.parameter.removeprefix(prefix)}") for s in part.slices
                )
                name, cost = f"layers.{number}.{part.name}", _cost(model, moved)
                group = replace(part, name=name, layer=number, slices=moved, cost=cost)
                if _takes_gates(model, group):
                    groups.append(group)
    if not groups:
        raise InputError(f"{type(model).__name__} has nothing that regrow can prune")
    residual = _residual(model, found, path, alike)
    groups = [replace(group, hidden=_crossing(model, group, residual)) for group in groups]
    groups = _count_channels_once(sorted(groups, key=lambda group: (group.layer, group.kind)))

    base = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    pieces = [s for group in groups for s in group.slices if not s.is_adapter]
    sliced = {s.module for s in pieces}
    adapted = {s.module for group in groups if group.kind != "expert" for s in group.slices}
    linears = sorted({name for name in adapted if is_linear(model.get_submodule(name))}, key=_natural)
    block = {name: weight_count(p) for name, p in base.items() if _module_of(name) in sliced}

    def inside_layer(number: int, sizes: Mapping[str, int]) -> int:
        return sum(size for name, size in sizes.items() if name.startswith(f"{path}.{number}."))

    every = {name: weight_count(p) for name, p in base.items()}
    along = [] if residual is None else [s for s in residual.slices if not s.is_adapter]
    on_channel = {s.parameter: _count(model, s) for s in along}
    block_on_channel = {name: count for name, count in on_channel.items() if _module_of(name) in sliced}
    return Groups(
        groups=tuple(groups),
        layers=tuple(
            Layer(
                f"{path}.{i}", i, inside_layer(i, every), inside_layer(i, block),
                inside_layer(i, on_channel), inside_layer(i, block_on_channel),
            )
            for i in range(len(layers))
        ),
        linears=tuple(linears),
        block_parameters=sum(block.values()),
        total_parameters=sum(every.values()),
        residual=residual,
    )  # fmt: skip


def _takes_gates(model: PreTrainedModel, group: Group) -> bool:
    """Whether there is a place for the gates: the input of a linear, or within a module of experts."""
    if group.kind == "expert":
        return any(is_experts(model.get_submodule(s.module)) for s in group.slices)
    if group.expert is not None:
        return all(is_experts(model.get_submodule(s.module)) for s in group.consumers)
    return all(is_linear(model.get_submodule(s.module)) for s in group.consumers)


def _count_channels_once(groups: Sequence[Group]) -> list[Group]:
    """Take what the channels' own groups count off the costs of experts."""
    found = []
    for group in groups:
        if group.kind == "expert":
            inside = [g for g in groups if g.layer == group.layer and g.expert is not None]
            cost, hidden = sum(g.units * g.cost for g in inside), sum(g.units * g.hidden for g in inside)
            group = replace(group, cost=group.cost - cost // group.units, hidden=group.hidden - hidden // group.units)
        found.append(group)
    return found


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0].removesuffix(".base_layer")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _cost(model: PreTrainedModel, slices: Sequence[Slice]) -> int:
    return sum(_count(model, piece) for piece in slices if not piece.is_adapter)


def _count(model: PreTrainedModel, piece: Slice) -> int:
    """Numbers of a parameter that one unit owns."""
    parameter = model.get_parameter(piece.parameter)
    shape = weight_shape(parameter)
    among = shape[piece.axis] * (1 if piece.expert is None else shape[0])
    return int(piece.index.shape[1]) * weight_count(parameter) // among


def _crossing(model: PreTrainedModel, group: Group, residual: Group | None) -> int:
    """Numbers that lie both in a unit of a group and on a hidden channel."""
    along = {} if residual is None else {s.parameter: s for s in residual.slices if not s.is_adapter}
    crossed = [(s, along[s.parameter]) for s in group.slices if s.parameter in along]
    count = 0
    for s, other in crossed:
        if other.axis != s.axis:
            size = weight_shape(model.get_parameter(s.parameter))[other.axis]
            count += _count(model, s) * int(other.index.shape[1]) // size
    return count


def _residual(model: PreTrainedModel, found: Trace, path: str, alike: Sequence[Sequence[int]]) -> Group | None:
    """The classes that the layers both read and write, and that reach outside of them.

    None where they do not all own alike: there is then no one number that says how wide the stream is.
    """
    first = {id(parameter): name for name, parameter in reversed(list(model.named_parameters(remove_duplicate=False)))}
    owners: dict[int, dict[int, NDArray[np.int64]]] = defaultdict(dict)
    for number, axis in enumerate(found.axes):
        for c, positions in axis.owners():
            owners[c][number] = positions

    def has(owned: Mapping[int, object], inside: bool, is_input: bool | None = None) -> bool:
        axes = [found.axes[n] for n in owned if ".lora_" not in found.axes[n].parameter]
        return any(
            axis.parameter.startswith(f"{path}.") == inside and is_input in (None, axis.is_input) for axis in axes
        )

    stream = [
        owned
        for c, owned in owners.items()
        if c != -1 and c not in found.attention
        if has(owned, False) and has(owned, True, True) and has(owned, True, False)
    ]
    if len({tuple((n, len(p)) for n, p in sorted(owned.items())) for owned in stream}) != 1:
        return None
    stream.sort(key=lambda owned: int(owned[min(owned)][0]))
    slices: dict[tuple[str, int], Slice] = {}
    for n in sorted(stream[0]):
        axis, index = found.axes[n], np.stack([owned[n] for owned in stream])
        for name in _replicated(axis.parameter, path, alike):
            name = first.get(id(model.get_parameter(name)), name)
            slices.setdefault((name, axis.axis), Slice(name, axis.axis, axis.is_input, index))
    found_slices = tuple(slices.values())
    return Group(RESIDUAL, -1, "hidden", len(stream), found_slices, _cost(model, found_slices))


def _replicated(parameter: str, path: str, alike: Sequence[Sequence[int]]) -> list[str]:
    """The parameters of the whole model that one of the skeleton stands for."""
    if not parameter.startswith(f"{path}."):
        return [parameter]
    position, _, rest = parameter.removeprefix(f"{path}.").partition(".")
    return [f"{path}.{number}.{rest}" for number in alike[int(position)]]


def _groups_of_layer(axes: Sequence[Axis], outside: set[int], found: Trace) -> Iterator[Group]:
    """Put the classes that own the same number of positions on the same axes into one group.

    Names, layer and costs are left to fill in. Channels of experts, which the trace cannot tell apart, are a group for
    each expert.
    """
    owners: dict[int, dict[int, NDArray[np.int64]]] = defaultdict(dict)
    for number, axis in enumerate(axes):
        for c, positions in axis.owners():
            owners[c][number] = positions

    alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for c, owned in owners.items():
        if c == -1 or c in outside:
            continue
        base = [number for number in owned if ".lora_" not in axes[number].parameter]
        both = any(axes[n].is_input for n in base) and any(not axes[n].is_input for n in base)
        if both or c in found.experts:
            alike[tuple((n, len(p)) for n, p in sorted(owned.items()))].append(c)

    slabs = {
        axis.parameter: len(axis.classes)
        for axis in axes
        if axis.axis == 0 and all(c in found.experts for c in axis.classes.tolist())
    }
    seen: dict[str, int] = defaultdict(int)
    for signature, members in alike.items():
        routed = members[0] in found.experts
        first = next(n for n, _ in signature if axes[n].is_input or routed)
        members.sort(key=lambda c: int(owners[c][first][0]))
        kind = "expert" if routed else "attention" if members[0] in found.attention else "ffn"
        seen[kind] += 1
        slices = tuple(
            Slice(axes[n].parameter, axes[n].axis, axes[n].is_input, np.stack([owners[c][n] for c in members]))
            for n, _ in signature
        )
        if members[0] in found.normed and not routed:  # none can go without changing the others: one unit, all of them
            slices = tuple(replace(s, index=s.index.reshape(1, -1)) for s in slices)
        kind = kind if seen[kind] == 1 else f"{kind}{seen[kind]}"
        group = Group(kind, -1, kind, len(slices[0].index), slices, 0)
        if routed and slices[0].index.shape[1] == 1:
            yield replace(group, least=found.experts[members[0]])
        elif routed:
            continue  # the router chooses groups of experts first, say: none can go without others
        elif all(s.parameter in slabs for s in slices):
            for expert in range(slabs[slices[0].parameter]):
                own = tuple(replace(s, expert=expert) for s in slices)
                yield replace(group, name=f"expert{expert}.{kind}", slices=own, expert=expert, multiple=MULTIPLE)
        else:
            yield group
