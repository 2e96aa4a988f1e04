"""The dependency graph of one decoder layer: its operators, what flows between them, and which group owns what.

This is what LoRAShear (arXiv 2310.18356, §2.1) builds before it prunes. A linear with LoRA around it is one
*composed* operator of W, A and B, whose weights do not belong to one group: the rows of W and B go with the
group that owns the output, the columns of W and A with the group that produces the input.

Operators are the modules that the exported graph names. What a module computes outside of its submodules is
joined into as few operators as leave the graph without cycles: attention is one, each residual add is another.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import Node
from transformers import PreTrainedModel

from regrow.errors import InputError
from regrow.structure.adapters import lora_layers
from regrow.structure.groups import Group, Groups
from regrow.structure.trace import decoder_layers, export, operator_name, skeleton

REARRANGING = (
    "view reshape _unsafe_view flatten unflatten unsqueeze squeeze transpose t swapaxes numpy_T permute expand "
    "broadcast_to slice select repeat_interleave contiguous clone alias detach to _to_copy type_as float dropout "
    "lift_fresh_copy split split_with_sizes chunk getitem"
)
"""Operators that move, repeat or cast elements without computing: they are not drawn."""

PRODUCTS = "matmul bmm mm scaled_dot_product_attention"

ORDER = "WBAb"
"""First letters of the weights' roles, in the order in which they are listed."""


@dataclass(frozen=True)
class Weight:
    """A parameter of an operator, and the groups that own positions on its axes."""

    role: str
    """`W`, `A`, `B`, `bias`."""
    shape: tuple[int, ...]
    """Rows (outputs) first, then columns (inputs)."""
    rows: tuple[str, ...]
    """Names of the groups whose units own rows (the output axis); none: the axis stays whole."""
    columns: tuple[str, ...]
    """The same of the columns (the input axis)."""


@dataclass(frozen=True)
class Operator:
    """A node: a module, or what a module computes outside of its submodules."""

    title: str
    module: str
    """Dotted name within the layer; empty for the layer itself."""
    composed: bool
    """Whether it is a linear with LoRA around it."""
    weights: tuple[Weight, ...] = ()


@dataclass(frozen=True)
class Edge:
    """An activation, from one operator to another."""

    source: int
    """Position in `LayerGraph.operators`, as `target`."""
    target: int
    group: str | None
    """The group whose units are the activation's channels; None: the residual stream."""


@dataclass(frozen=True)
class LayerGraph:
    """One decoder layer; the first operator is where the hidden states come in, the last where they leave."""

    model: str
    """The model's class."""
    layer: int
    operators: tuple[Operator, ...]
    """In the order in which they are computed."""
    edges: tuple[Edge, ...]
    groups: tuple[Group, ...]


@dataclass
class _Draft:
    """An operator in the making."""

    module: str
    glue: bool
    """Whether it lies outside of all submodules, and so may be joined with its like."""
    computes: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    """Dotted names within the layer."""
    attends: bool = False


Links = set[tuple[int, int]]


def layer_graph(model: PreTrainedModel, groups: Groups, layer: int = 0) -> LayerGraph:
    """The dependency graph of one decoder layer, by tracing; weights are not touched.

    Args:
        model: on any device, the meta device included; with LoRA attached its linears are composed operators.
        groups: of the model as it is now.
        layer: which one, from 0.

    Raises:
        InputError: if there is no such layer, or the model cannot be traced.
    """
    path, layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise InputError(f"there is no layer {layer}: the model has layers 0 to {len(layers) - 1}")
    bones = skeleton(model, [layer])
    block = bones.get_submodule(f"{path}.0")
    parts, links = _join(*_read(export(bones), f"{path}.0", block))
    own = tuple(g for g in groups if g.layer == layer and g.expert in (None, 0))  # one expert stands for all
    operators = tuple(_finish(members, block, own, f"{path}.{layer}.") for members in parts)
    edges = _coloured(operators, sorted(links), own)
    return LayerGraph(type(model).__name__, layer, operators, edges, own)


def _read(program: torch.export.ExportedProgram, path: str, block: nn.Module) -> tuple[list[_Draft], Links]:
    """Draft operators, in the order of the graph, and the activations between them.

    Only what descends from a parameter is followed: positions and masks are no part of what hangs together.
    """
    composed = set(lora_layers(block))
    drafts = [_Draft("", glue=False)]  # the hidden states that enter
    number_of: dict[str, int] = {}
    made_by: dict[Node, int] = {}
    parameter_of: dict[Node, str] = {}
    links: Links = set()
    out = None
    for node in program.graph.nodes:
        if node.name in program.graph_signature.inputs_to_parameters:
            parameter_of[node] = program.graph_signature.inputs_to_parameters[node.name]
        if node.op != "call_function":
            continue
        activations = [made_by[n] for n in node.all_input_nodes if n in made_by]
        parameters = [parameter_of[n] for n in node.all_input_nodes if n in parameter_of]
        if not activations and not parameters:
            continue
        name = operator_name(node.target).partition(".")[2]
        if name == "_assert_tensor_metadata":
            continue
        if name in REARRANGING.split():
            if activations:
                made_by[node] = activations[0]
            else:
                parameter_of[node] = parameters[0]
            continue
        place = _place(node, path, block, composed)
        if place is None:
            if out is None and any(activations):
                out = _Draft("", glue=False)
                links.update((n, -1) for n in activations)
            made_by[node] = 0 if out is None else -1
            continue
        key, module, glue = place
        if key not in number_of or glue:
            number_of[key] = len(drafts)
            drafts.append(_Draft(module, glue))
        number = made_by[node] = number_of[key]
        drafts[number].computes.append(name)
        drafts[number].parameters += [p.removeprefix(f"{path}.") for p in parameters if p.startswith(f"{path}.")]
        drafts[number].attends |= name in PRODUCTS.split() and len(activations) > 1
        links.update((n, number) for n in activations if n != number)
    assert out is not None
    drafts.append(out)
    last = len(drafts) - 1
    return drafts, {(a, last if b == -1 else b) for a, b in links if a != -1}


def _place(node: Node, path: str, block: nn.Module, composed: set[str]) -> tuple[str, str, bool] | None:
    """Where in the layer a node is computed: the call, the module, whether outside of all submodules.

    None if it is outside of the layer.
    """
    stack = [(key, name) for key, (name, _) in (node.meta.get("nn_module_stack") or {}).items()]
    inside = [(key, name[len(path) :].strip(".")) for key, name in stack if f"{name}.".startswith(f"{path}.")]
    for key, name in inside:
        if name in composed or not list(block.get_submodule(name).children()):
            return key, name, False
    return (*inside[-1], True) if inside else None


def _join(drafts: list[_Draft], links: Links) -> tuple[list[list[_Draft]], Links]:
    """Contract links within one module, as long as that makes no cycle.

    Returns:
        The drafts of each operator, in the order of the graph, and the links between operators.
    """
    owner = list(range(len(drafts)))
    while (pair := _joinable(drafts, links, owner)) is not None:
        owner = [pair[0] if o == pair[1] else o for o in owner]
    members: dict[int, list[int]] = defaultdict(list)
    for number, o in enumerate(owner):
        members[o].append(number)
    waiting, ordered = sorted(members.values(), key=lambda numbers: numbers[-1]), []
    before = {(owner[a], owner[b]) for a, b in links if owner[a] != owner[b]}
    while waiting:  # what is computed in several parts may begin before and end after what comes in between
        open_ones = {owner[numbers[0]] for numbers in waiting}
        ready = next(n for n in waiting if not any(b == owner[n[0]] and a in open_ones for a, b in before))
        waiting.remove(ready)
        ordered.append(ready)
    new = {n: position for position, numbers in enumerate(ordered) for n in numbers}
    parts = [[drafts[n] for n in numbers] for numbers in ordered]
    return parts, {(new[a], new[b]) for a, b in links if new[a] != new[b]}


def _joinable(drafts: list[_Draft], links: Links, owner: list[int]) -> tuple[int, int] | None:
    now = {(owner[a], owner[b]) for a, b in links if owner[a] != owner[b]}
    for a, b in sorted(now):
        alike = drafts[a].glue and drafts[b].glue and drafts[a].module == drafts[b].module
        if alike and b not in _reachable(now - {(a, b)}, [a]):
            return a, b
    return None


def _reachable(links: Iterable[tuple[int, int]], start: Iterable[int]) -> set[int]:
    """Everything that links lead to from `start`, itself included only where a cycle leads back."""
    following = defaultdict(list)
    for a, b in links:
        following[a].append(b)
    found: set[int] = set()
    ahead = list(start)
    while ahead:
        fresh = [b for b in following[ahead.pop()] if b not in found]
        found.update(fresh)
        ahead += fresh
    return found


def _finish(members: list[_Draft], block: nn.Module, groups: tuple[Group, ...], path: str) -> Operator:
    module = members[0].module
    computes = [name for draft in members for name in draft.computes]
    composed = module in lora_layers(block)
    if not computes:
        title = "hidden states"
    elif not members[0].glue:
        title = module.rpartition(".")[2]
    elif any(draft.attends for draft in members):
        title = "attention"
    elif module == "" and set(computes) == {"add"}:
        title = "residual add"
    else:
        title = " · ".join(dict.fromkeys(computes))
    weights = sorted(
        (_weight(name, block, groups, f"{path}{name}") for draft in members for name in draft.parameters),
        key=lambda weight: f"{ORDER}{weight.role}".find(weight.role[0]),
    )
    return Operator(title, module, composed, tuple(dict.fromkeys(weights)))


def _weight(name: str, block: nn.Module, groups: tuple[Group, ...], full_name: str) -> Weight:
    factor = name.partition(".lora_")[2][:1]
    role = factor or {"weight": "W", "bias": "bias"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
    owned = [(group.name, piece) for group in groups for piece in group.slices if piece.parameter == full_name]
    shape = tuple(block.get_parameter(name).shape)
    turned = len(shape) == 2 and any(piece.is_input == (piece.axis == 0) for _, piece in owned)  # a Conv1D
    return Weight(
        role,
        shape[::-1] if turned else shape,
        rows=tuple(group for group, piece in owned if not piece.is_input),
        columns=tuple(group for group, piece in owned if piece.is_input),
    )


def _coloured(
    operators: tuple[Operator, ...], links: list[tuple[int, int]], groups: tuple[Group, ...]
) -> tuple[Edge, ...]:
    """An activation is a group's if it lies on a way from the group's rows to its columns."""
    group_of: dict[tuple[int, int], str] = {}
    for group in groups:
        makers = {n for n, operator in enumerate(operators) if any(group.name in w.rows for w in operator.weights)}
        takers = {n for n, operator in enumerate(operators) if any(group.name in w.columns for w in operator.weights)}
        below = makers | _reachable([(a, b) for a, b in links if a not in takers], makers)
        above = takers | _reachable([(b, a) for a, b in links], takers)
        group_of |= {(a, b): group.name for a, b in links if a in below - takers and b in above}
    return tuple(Edge(a, b, group_of.get((a, b))) for a, b in links)
