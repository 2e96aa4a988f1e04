"""Finding the groups of a model by tracing it."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from regrow.errors import InputError
from regrow.structure.adapters import is_linear
from regrow.structure.expert_lora import ADAPTER, adapter_name, lora_of
from regrow.structure.experts import is_experts
from regrow.structure.groups import RESIDUAL, Group, Groups, Layer, Slice, without_lora
from regrow.structure.per_layer import distinct_layers
from regrow.structure.quantised import weight_count, weight_shape
from regrow.structure.trace import Axis, Trace, decoder_layers, replicated, skeleton, trace

MULTIPLE = 8
"""Channels of experts stay in multiples of this: the kernels that compute all experts at once want rows of 16 bytes."""


def find_groups(model: PreTrainedModel) -> Groups:
    """Find the minimally removable structures of a decoder-only language model by tracing it.

    Works on any device, dtype and size (the trace holds no weights), before and after LoRA is attached, before
    and after a cut. LoRA factors belong to the groups of the linear they are wrapped around (or the experts they hang
    below): B is cut with the rows, A with the columns, the rank axis never.

    Raises:
        InputError: if the model cannot be traced, the message names the module and the operator; or if layers share
            weights.
    """
    path, layers = decoder_layers(model)
    _check_own_weights(model, path)
    alike = distinct_layers(layers)
    found = trace(skeleton(model, [numbers[0] for numbers in alike]), path)

    groups = list(_groups(model, found, path, alike))
    opaque = {name: what for part, what in found.opaque.items() for name in replicated(part, path, alike)}
    if not groups:
        reason = "".join(f": {name} uses {what}" for name, what in list(opaque.items())[:1])
        raise InputError(f"{type(model).__name__} has nothing that regrow can prune{reason}")
    residual = _residual(model, found, path, alike)
    groups = [replace(group, hidden=_crossing(model, group, residual)) for group in groups]
    groups = _count_channels_once(sorted(groups, key=lambda group: (group.layer, group.kind)))

    base = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    pieces = [s for group in groups for s in group.slices if not s.is_adapter]
    adapted = {s.module for group in groups if group.kind != "expert" for s in group.slices}
    adapted |= {without_lora(name) for linear in found.linears for name in replicated(linear, path, alike)}
    sliced = {s.module for s in pieces} | {_module_of(name) for name in base if _lies_in(name, opaque)}
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
        opaque=opaque,
        experts=dict(sorted(_weights_of_experts(model, found, path, alike, sliced), key=lambda one: _natural(one[0]))),
    )  # fmt: skip


def _check_own_weights(model: PreTrainedModel, path: str) -> None:
    """Refuse layers that share weights: what one of them loses, the others would."""
    owners: dict[int, str] = {}
    for name, parameter in model.get_submodule(path).named_parameters(prefix=path, remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first.removeprefix(f"{path}.").partition(".")[0] != name.removeprefix(f"{path}.").partition(".")[0]:
            raise InputError(
                f"layers of {type(model).__name__} share weights ({first} is {name}); regrow cannot prune this kind"
            )


def _groups(model: PreTrainedModel, found: Trace, path: str, alike: Sequence[Sequence[int]]) -> Iterator[Group]:
    """Those of every layer, whose places in the residual stream are left to count."""
    outside = _outside(found.axes, path)
    for position, numbers in enumerate(alike):
        prefix = f"{path}.{position}."
        own = [axis for axis in found.axes if axis.parameter.startswith(prefix)]
        for part in _groups_of_layer(own, outside, found):
            for number in numbers:
                moved = tuple(
                    replace(s, parameter=f"{path}.{number}.{s.parameter.removeprefix(prefix)}") for s in part.slices
                )
                moved += tuple(_below_experts(model, moved))
                name, cost = f"layers.{number}.{part.name}", _cost(model, moved)
                group = replace(part, name=name, layer=number, slices=moved, cost=cost)
                if _takes_gates(model, group):
                    yield group


def _outside(axes: Sequence[Axis], path: str) -> set[int]:
    """The classes that no one layer has to itself: the residual stream's, and of keys and values that layers share."""
    places: dict[int, set[str]] = defaultdict(set)
    for axis in axes:
        below = axis.parameter.startswith(f"{path}.")
        place = axis.parameter.removeprefix(f"{path}.").partition(".")[0] if below else ""
        for c in np.unique(axis.classes):
            places[int(c)].add(place)
    return {c for c, where in places.items() if "" in where or len(where) > 1}


def _below_experts(model: PreTrainedModel, slices: Sequence[Slice]) -> Iterator[Slice]:
    """The slices of the adapters of experts that go with those of their weights; the trace knows nothing of them."""
    for piece in slices:
        module, _, last = piece.parameter.rpartition(".")
        if piece.is_adapter or lora_of(model.get_submodule(module), last) is None:
            continue
        factors = {"A": 2} if piece.is_input else {"B": 1}
        for factor, axis in ({"A": 0, "B": 0} if piece.axis == 0 else factors).items():
            name = f"{adapter_name(piece.parameter)}.lora_{factor}.{ADAPTER}.weight"
            yield replace(piece, parameter=name, axis=axis)


def _weights_of_experts(
    model: PreTrainedModel, found: Trace, path: str, alike: Sequence[Sequence[int]], sliced: Collection[str]
) -> Iterator[tuple[str, int]]:
    """The 3D ones, in the model's order within a layer, and how many of them a token goes to.

    Args:
        sliced: modules that groups have a share in.
    """
    for axis in found.axes:
        chosen = found.experts.get(int(axis.classes[0])) if axis.axis == 0 else None
        for name in [] if chosen is None else replicated(axis.parameter, path, alike):
            module = model.get_submodule(_module_of(name))
            if _module_of(name) in sliced and is_experts(module) and model.get_parameter(name).ndim == 3:
                yield name, chosen or 1


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


def _lies_in(name: str, parts: Collection[str]) -> bool:
    return any(name.startswith(f"{part}.") for part in parts)


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

    None where they do not all own alike: there is then no one number that says how wide the stream is. None, too, where
    a mean of them is taken by more than a norm: no other module can be made to take it of fewer.
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

    members = {
        c
        for c, owned in owners.items()
        if c != -1 and c not in found.attention and c not in found.fixed
        if has(owned, False) and has(owned, True, True) and has(owned, True, False)
    }
    stream = [owners[c] for c in members]
    if len({tuple((n, len(p)) for n, p in sorted(owned.items())) for owned in stream}) != 1:
        return None
    stream.sort(key=lambda owned: int(owned[min(owned)][0]))
    slices: dict[tuple[str, int], Slice] = {}
    for n in sorted(stream[0]):
        axis, index = found.axes[n], np.stack([owned[n] for owned in stream])
        for name in replicated(axis.parameter, path, alike):
            name = first.get(id(model.get_parameter(name)), name)
            slices.setdefault((name, axis.axis), Slice(name, axis.axis, axis.is_input, index))
    found_slices = (*slices.values(), *_below_experts(model, tuple(slices.values())))
    norms = {name for at, mixed in found.norms.items() if mixed & members for name in replicated(at, path, alike)}
    bare = tuple(sorted(norms - {s.module for s in found_slices}, key=_natural))
    if any(next(model.get_submodule(name).parameters(), None) is not None for name in bare):
        return None
    return Group(RESIDUAL, -1, "hidden", len(stream), found_slices, _cost(model, found_slices), bare_norms=bare)


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
        normed = any(members[0] in mixed for mixed in found.norms.values())
        if normed and not routed:  # none can go without changing the others: one unit, all of them
            slices = tuple(replace(s, index=s.index.reshape(1, -1)) for s in slices)
        kind = kind if seen[kind] == 1 else f"{kind}{seen[kind]}"
        group = Group(kind, -1, kind, len(slices[0].index), slices, 0)
        if not found.fixed.isdisjoint(members):
            continue  # a router keeps a correction for each of them in a buffer, say
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
