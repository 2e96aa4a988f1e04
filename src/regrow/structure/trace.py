"""Walk the exported graph of a model and learn which slices of which parameters belong together.

`torch.export` gives an aten graph of a *skeleton*: the model's modules with every tensor on the meta device,
so that nothing is computed and no memory is taken, and with one decoder layer for each distinct shape, so
that eighty layers trace as fast as two. The walk names channels (`channels.py`) and ties them operator by
operator (`operators.py`, `ties.py`); a class of tied channels is a candidate for removal.

A part of a layer (its attention, its FFN, its mixer) that uses an operator without a rule is *opaque*: it stays as
it is, and so does everything whose channels go in or come out.

Not covered: models whose forward pass branches on tensor values, and layers that are not in one `ModuleList`.
"""

import copy
import io
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from regrow.errors import InputError
from regrow.structure.channels import Facet, Value
from regrow.structure.experts import is_experts
from regrow.structure.operators import RULES
from regrow.structure.per_layer import distinct_layers, rearrange
from regrow.structure.quantised import kept_as, quantised_linears, stand_in
from regrow.structure.ties import UnknownOperator, Walk

UNCHANGED = ("aten.to", "aten.alias")
"""Operators that may return what they are given; the graph then has their result in its place, elsewhere too."""

TOKENS = (2, 7)
"""Sequences and their length, in the graph."""


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
    norms: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Modules -> classes of which they take the mean of several: removing one changes what is left of the others."""
    experts: Mapping[int, int] = field(default_factory=dict)
    """Classes that a router chooses among -> how many of them it chooses for a token."""
    fixed: frozenset[int] = frozenset()
    """Classes that stay: they own a part of a buffer that checkpoints hold (cuts change parameters only), or reach into
    an opaque part."""
    opaque: Mapping[str, str] = field(default_factory=dict)
    """Parts of the layers that stay as they are -> what they use that has no rule."""
    linears: frozenset[str] = frozenset()
    """Modules in opaque parts that are computed as linears."""


class _Unruled(Exception):
    """The walk met an operator without a rule; `args` are it and the dotted name of the module that uses it."""


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
    kept = list(keep)
    bones.set_submodule(path, nn.ModuleList([layers[number] for number in kept]))
    rearrange(bones.config.get_text_config(), [*kept, *(number for number in range(len(layers)) if number not in kept)])
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
    ids = torch.zeros(TOKENS, dtype=torch.long, device="meta")
    try:
        # Without gradients from the start: a block of a model's own without them would be one opaque operator.
        # Without a word: where it fails, it prints the whole graph.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(bones, (ids,), {"use_cache": False}, strict=False)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"torch.export cannot trace {type(bones).__name__}: {reason}") from error


def trace(bones: PreTrainedModel, path: str) -> Trace:
    """Export a skeleton and walk its graph.

    Args:
        bones: the skeleton.
        path: the dotted name of the list of its layers.

    Raises:
        InputError: if an operator on a prunable tensor has no rule and lies in no part of a layer (naming module and
            operator), or as `export`.
    """
    program = export(bones)
    below = path.count(".") + 2
    parts = {name for name, _ in bones.named_modules() if name.startswith(f"{path}.") and name.count(".") == below}
    opaque: dict[str, str] = {}
    while True:
        try:
            return _Tracing(bones, program, opaque).walk()
        except _Unruled as error:
            operator, module = error.args
            part = ".".join(module.split(".")[: below + 1])
            if part not in parts or part in opaque:
                raise InputError(
                    f"module {module or 'model'!r} uses operator {operator}, for which regrow has no pruning rule; "
                    "add one to regrow/structure/operators.py"
                ) from error
            opaque[part] = operator


def used_elsewhere(model: PreTrainedModel) -> frozenset[str]:
    """Parameters of the decoder layers that a module computes with which does not own them.

    Nothing that is hooked onto the owner sees that: convolutions of state-space layers, say, are read by the layer.

    Raises:
        InputError: as `export`.
    """
    path, layers = decoder_layers(model)
    alike = distinct_layers(layers)
    program = export(skeleton(model, [numbers[0] for numbers in alike]))
    names = program.graph_signature.inputs_to_parameters
    found = {
        names[argument.name]
        for node in program.graph.nodes
        for argument in node.all_input_nodes
        if node.op == "call_function" and argument.name in names
        if names[argument.name].rpartition(".")[0] != module_of(node)
    }
    return frozenset(name for each in found for name in replicated(each, path, alike))


def replicated(name: str, path: str, alike: Sequence[Sequence[int]]) -> list[str]:
    """The parameters, or modules, of the whole model that one of a skeleton stands for.

    Args:
        path: of the list of decoder layers.
        alike: as of `distinct_layers`.
    """
    if not name.startswith(f"{path}."):
        return [name]
    position, _, rest = name.removeprefix(f"{path}.").partition(".")
    return [f"{path}.{number}.{rest}" for number in alike[int(position)]]


class _Tracing:
    """One walk over a graph in which some parts are known to be opaque."""

    def __init__(self, bones: PreTrainedModel, program: torch.export.ExportedProgram, opaque: Mapping[str, str]):
        self.bones, self.program, self.opaque = bones, program, dict(opaque)
        self.learnt = Walk()
        self.values: dict[torch.fx.Node, Any] = {}
        self.inside: set[torch.fx.Node] = set()
        """What opaque parts compute of what has channels."""
        self.linears: set[str] = set()
        """See `Trace`."""

    def walk(self) -> Trace:
        """All of the graph, node by node.

        Raises:
            _Unruled: as `apply`.
        """
        walk, bones, signature = self.learnt, self.bones, self.program.graph_signature
        names: dict[str, list[str]] = defaultdict(list)
        for name, parameter in bones.named_parameters(remove_duplicate=False):
            names[str(id(parameter))].append(name)
        facets: dict[str, tuple[Facet, ...]] = {}
        stored = bones.state_dict().keys()
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in signature.inputs_to_parameters:
                parameter = signature.inputs_to_parameters[node.name]
                if parameter not in facets:
                    fresh = _weight_facets(walk, node.meta["val"].shape)
                    for alias in names[str(id(bones.get_parameter(parameter)))]:
                        facets[alias] = fresh
                self.values[node] = Value(tuple(node.meta["val"].shape), facets[parameter], is_weight=True)
            elif node.op == "placeholder" and signature.inputs_to_buffers.get(node.name) in stored:
                shape = node.meta["val"].shape
                self.values[node] = Value(tuple(shape), _weight_facets(walk, shape), is_weight=True)
                walk.fixed += [facet for facet in self.values[node].facets if facet.size > 1]
            elif node.op == "call_function":
                self.values[node] = self.apply(node)
            elif node.op != "output":
                self.values[node] = _blank(node.meta.get("val"))
        parameters = signature.inputs_to_parameters.values()
        found = _resolve(walk, {name: facets[name] for name in parameters})
        return replace(found, opaque=self.opaque, linears=frozenset(self.linears))

    def apply(self, node: torch.fx.Node) -> Any:
        """What an operator makes of its arguments.

        Raises:
            _Unruled: if it has no rule.
        """
        if f"{module_of(node)}.".startswith(tuple(f"{part}." for part in self.opaque)):
            given = [self.values[argument] for argument in node.all_input_nodes]
            if operator_name(node.target) in UNCHANGED and self.inside.isdisjoint(node.all_input_nodes):
                return given[0]
            if _carries_facets(given) or not self.inside.isdisjoint(node.all_input_nodes):
                self.inside.add(node)
                self.keep_whole(given)
                if operator_name(node.target) == "aten.linear":
                    self.linears.add(module_of(node))
            return _blank(node.meta.get("val"))
        args = torch.fx.node.map_arg(node.args, self.outside)
        kwargs = torch.fx.node.map_arg(node.kwargs, self.outside)
        if not _carries_facets((args, tuple(kwargs.values()))) or "val" not in node.meta or node.meta["val"] is None:
            return _blank(node.meta.get("val"), _chosen_among((args, tuple(kwargs.values()))))
        name = operator_name(node.target)
        rule = RULES.get(name)
        try:
            if rule is None:
                raise UnknownOperator(name)
            self.learnt.module = module_of(node)
            return rule(self.learnt, args, kwargs, _shapes(name, node.meta["val"]))
        except UnknownOperator as error:
            raise _Unruled(str(error), module_of(node)) from error

    def keep_whole(self, item: Any) -> None:
        """Let all channels stay of what goes into an opaque part."""
        if isinstance(item, Value):
            self.learnt.fixed += item.facets
        elif isinstance(item, list | tuple):
            for part in item:
                self.keep_whole(part)

    def outside(self, node: torch.fx.Node) -> Any:
        """An argument of a node that is not opaque: what comes out of an opaque part has channels that stay.

        Raises:
            _Unruled: if it is not of the shape `[batch, time, channels]`.
        """
        value = self.values[node]
        if node in self.inside and isinstance(value, Value) and not value.facets:
            if len(value.shape) != 3 or value.shape[:2] != TOKENS:
                raise _Unruled(f"{operator_name(node.target)} of shape {list(value.shape)}", module_of(node))
            facet = self.learnt.channels.new(value.shape[-1]).reshape(1, 1, -1)
            self.learnt.fixed.append(facet)
            value = self.values[node] = Value(value.shape, (facet,))
        return value


def module_of(node: torch.fx.Node) -> str:
    """The dotted name of the innermost module that computes a node; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
    name: str = stack[-1][0]
    return name


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


def _shapes(name: str, meta: Any) -> Any:
    if isinstance(meta, list | tuple):
        return [_shapes(name, item) for item in meta]
    if not all(isinstance(size, int) for size in meta.shape):
        raise UnknownOperator(f"{name} of a size that depends on values")
    return tuple(meta.shape)


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
    norms: dict[str, frozenset[int]] = defaultdict(frozenset)
    for facet, along, module in walk.averaged:
        each = classes[facet]
        mixed = each.min(along, keepdims=True) != each.max(along, keepdims=True)
        norms[module] |= frozenset(np.unique(each[np.broadcast_to(mixed, each.shape)]).tolist())
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
    return Trace(tuple(found), frozenset(attention), norms, experts, fixed)
