"""Walk the exported graph of a model and learn which slices of which parameters belong together.

`torch.export` gives an aten graph of a *skeleton*: the model's modules with every tensor on the meta device,
so that nothing is computed and no memory is taken, and with one decoder layer for each distinct shape, so
that eighty layers trace as fast as two. The walk names channels (`channels.py`) and ties them operator by
operator (`operators.py`); a class of tied channels is a candidate for removal.

Not covered: models whose forward pass branches on tensor values, and layers that are not in one `ModuleList`.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from regrow.errors import InputError
from regrow.structure.channels import Facet, Value
from regrow.structure.experts import is_experts
from regrow.structure.operators import RULES, UnknownOperator, Walk
from regrow.structure.quantised import kept_as, quantised_linears, stand_in, weight_shape


@dataclass(frozen=True)
class Axis:
    """One axis of one parameter, cut up by channel class."""

    parameter: str
    axis: int
    is_input: bool
    """Whether a product sums over this axis: the columns of a consumer."""
    classes: Facet
    """The class of each position, shape `[size]`; -1 where removing units never removes the position."""

    def owners(self) -> Iterator[tuple[int, Facet]]:
        """Each class that owns positions of the axis, and which."""
        order = np.argsort(self.classes, kind="stable")
        classes, starts = np.unique(self.classes[order], return_index=True)
        yield from zip(classes.tolist(), np.split(order, starts[1:]), strict=True)


@dataclass(frozen=True)
class Trace:
    """All axes of all parameters of the skeleton, the classes that attention mixes, and those that a norm does."""

    axes: tuple[Axis, ...]
    attention: frozenset[int]
    normed: frozenset[int] = frozenset()
    """Classes of which a norm takes the mean of several: removing one changes what is left of the others."""
    experts: Mapping[int, int] = field(default_factory=dict)
    """Classes that a router chooses among -> how many of them it chooses for a token."""
    fixed: frozenset[int] = frozenset()
    """Classes that own a part of a buffer that checkpoints hold: cuts change parameters only."""


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The dotted name and the list of the decoder layers.

    Raises:
        InputError: if no `ModuleList` has as many members as the config has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise InputError(f"{type(model).__name__} has no list of {count} decoder layers; regrow cannot prune this kind")
    return min(found, key=lambda item: item[0].count("."))


def distinct_layers(layers: Iterable[nn.Module]) -> list[list[int]]:
    """Layer numbers, grouped by the layers' type and parameter shapes; the first of each group stands for it."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        shapes = tuple((name, tuple(weight_shape(p))) for name, p in layer.named_parameters())
        alike[type(layer), shapes].append(number)
    return list(alike.values())


def skeleton(model: PreTrainedModel, keep: Iterable[int]) -> PreTrainedModel:
    """A copy of the model on the meta device that has only the decoder layers numbered in `keep`.

    Quantised linears are plain ones in it.
    """
    path, _ = decoder_layers(model)
    memo: dict[int, Any] = {id(linear): stand_in(linear, model.dtype) for linear in quantised_linears(model)}
    for parameter in model.parameters():
        if kept_as(parameter):
            continue
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    bones: PreTrainedModel = copy.deepcopy(model, memo)
    unhook(bones)
    layers = bones.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    bones.set_submodule(path, nn.ModuleList([layers[number] for number in keep]))
    bones.set_attn_implementation("eager")
    if any(is_experts(module) for module in bones.modules()):
        bones.set_experts_implementation("grouped_mm")  # the same graph whatever the routing
    bones.eval()
    return bones


def unhook(copied: nn.Module) -> None:
    """Take off a copy what it has inherited of hooks, and of forward passes in the place of a module's own."""
    for module in copied.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        vars(module).pop("forward", None)


def export(bones: PreTrainedModel) -> torch.export.ExportedProgram:
    """The aten graph of a skeleton's forward pass.

    Raises:
        InputError: if `torch.export` cannot trace the model.
    """
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(bones, (ids,), {"use_cache": False}, strict=False)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"torch.export cannot trace {type(bones).__name__}: {reason}") from error


def trace(bones: PreTrainedModel) -> Trace:
    """Export a skeleton and walk its graph.

    Raises:
        InputError: if an operator on a prunable tensor has no rule (naming module and operator), or as `export`.
    """
    program = export(bones)
    walk = Walk()
    parameters = program.graph_signature.inputs_to_parameters
    names: dict[str, list[str]] = defaultdict(list)
    for name, parameter in bones.named_parameters(remove_duplicate=False):
        names[str(id(parameter))].append(name)
    facets: dict[str, tuple[Facet, ...]] = {}
    values: dict[torch.fx.Node, Any] = {}
    buffers = program.graph_signature.inputs_to_buffers
    stored = bones.state_dict().keys()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in parameters:
            parameter = parameters[node.name]
            if parameter not in facets:
                fresh = _weight_facets(walk, node.meta["val"].shape)
                for alias in names[str(id(bones.get_parameter(parameter)))]:
                    facets[alias] = fresh
            values[node] = Value(tuple(node.meta["val"].shape), facets[parameter], is_weight=True)
        elif node.op == "placeholder" and buffers.get(node.name) in stored:
            values[node] = Value(
                tuple(node.meta["val"].shape), _weight_facets(walk, node.meta["val"].shape), is_weight=True
            )
            walk.fixed += [facet for facet in values[node].facets if facet.size > 1]
        elif node.op == "call_function":
            values[node] = _apply(walk, node, values)
        elif node.op != "output":
            values[node] = _blank(node.meta.get("val"))
    return _resolve(walk, {parameter: facets[parameter] for parameter in parameters.values()})


def _weight_facets(walk: Walk, shape: torch.Size) -> tuple[Facet, ...]:
    facets = []
    for axis, size in enumerate(shape):
        sizes = [1] * len(shape)
        sizes[axis] = size
        facets.append(walk.channels.new(size).reshape(sizes))
    return tuple(facets)


def _blank(meta: Any, among: Facet | None = None) -> Any:
    if isinstance(meta, torch.Tensor):
        return Value(tuple(meta.shape), among=among)
    if isinstance(meta, list | tuple):
        return [_blank(item, among) for item in meta]
    return meta


def _shapes(meta: Any) -> Any:
    return [tuple(item.shape) for item in meta] if isinstance(meta, list | tuple) else tuple(meta.shape)


def _apply(walk: Walk, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any]) -> Any:
    args = torch.fx.node.map_arg(node.args, lambda n: values[n])
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: values[n])
    if not _carries_facets((args, tuple(kwargs.values()))) or "val" not in node.meta or node.meta["val"] is None:
        return _blank(node.meta.get("val"), _chosen_among((args, tuple(kwargs.values()))))
    name = operator_name(node.target)
    rule = RULES.get(name)
    try:
        if rule is None:
            raise UnknownOperator(name)
        return rule(walk, args, kwargs, _shapes(node.meta["val"]))
    except UnknownOperator as error:
        stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
        raise InputError(
            f"module {stack[-1][0] or 'model'!r} uses operator {error}, for which regrow has no pruning rule; "
            "add one to regrow/structure/operators.py"
        ) from error


def operator_name(target: Any) -> str:
    """The name by which `RULES` knows an operator: `aten.linear`, `_operator.getitem`."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return f"{target.__module__}.{target.__name__}"


def _carries_facets(item: Any) -> bool:
    if isinstance(item, Value):
        return bool(item.facets)
    return isinstance(item, list | tuple) and any(_carries_facets(part) for part in item)


def _chosen_among(item: Any) -> Facet | None:
    """What positions, and what is computed of them alone, were chosen among."""
    if isinstance(item, Value):
        return item.among
    if not isinstance(item, list | tuple):
        return None
    return next((among for part in item if (among := _chosen_among(part)) is not None), None)


def _resolve(walk: Walk, facets: Mapping[str, tuple[Facet, ...]]) -> Trace:
    classes = walk.channels.classes()
    removable = classes.copy()
    for weight, wide in walk.shared:
        # A position shared by several classes stays for as long as any of them does, hence for good.
        axes = tuple(axis for axis in range(wide.ndim) if weight.shape[axis] == 1)
        touched = classes[wide]
        low, high = touched.min(axes, keepdims=True), touched.max(axes, keepdims=True)
        low, high = np.broadcast_to(low, weight.shape), np.broadcast_to(high, weight.shape)
        removable[weight] = np.where(low == high, low, -1)
    attention = {int(c) for facet in walk.attended for c in np.unique(classes[facet])}
    normed: set[int] = set()
    for facet, along in walk.averaged:
        each = classes[facet]
        mixed = each.min(along, keepdims=True) != each.max(along, keepdims=True)
        normed.update(np.unique(each[np.broadcast_to(mixed, each.shape)]).tolist())
    offered = [(set(classes[facet].tolist()), count) for facet, count in walk.offered]
    experts = {
        c: max(count for channels, count in offered if c in channels)
        for facet in walk.experts
        for c in set(classes[facet].tolist())
    }
    found = []
    for parameter, per_axis in facets.items():
        for axis, facet in enumerate(per_axis):
            channels = facet.reshape(-1)
            is_input = int(channels[0]) in walk.contracted
            found.append(Axis(parameter, axis, is_input, removable[channels]))
    fixed = frozenset(int(c) for facet in walk.fixed for c in np.unique(classes[facet]))
    return Trace(tuple(found), frozenset(attention), frozenset(normed), experts, fixed)
