"""Tracing, gates and the cut: masked ≡ cut, and a gate's gradient is what it should be."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import build, logits, random_keep, with_lora
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoConfig

from regrow.errors import InputError
from regrow.recovery.losses import language_loss
from regrow.structure.adapters import adapter_parameters, adapters_off, attach_lora, merge_lora
from regrow.structure.biases import add_missing_biases, bias_names
from regrow.structure.channels import Value, narrower, overlap, reshape
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.gates import GateMoments, Gates
from regrow.structure.operators import RULES
from regrow.structure.positions import IndexMap
from regrow.structure.ties import Walk
from regrow.structure.trace import Trace, trace

CLOSE = 1e-4


def closed(gates: Gates, groups, keep) -> Gates:
    for group in groups:
        value = torch.zeros(group.units)
        value[torch.from_numpy(keep[group.name])] = 1.0
        gates.set(group.name, value)
    return gates


@pytest.mark.parametrize("seed", range(3))
def test_masked_is_cut(family: str, seed: int) -> None:
    model = build(family, seed)
    groups = with_lora(model)
    keep = random_keep(groups, seed)
    whole = logits(model)
    with closed(Gates(model, groups.groups), groups, keep):
        masked = logits(model)
    cut(model, groups, keep)
    assert (masked - logits(model)).abs().max() < CLOSE
    if any(len(keep[group.name]) < group.units for group in groups):
        assert (masked - whole).abs().max() > 1e-2, "a mask that changes nothing proves nothing"


def test_open_gates_change_no_bit(family: str) -> None:
    model = build(family)
    groups = with_lora(model)
    before = logits(model)
    with Gates(model, groups.groups):
        assert torch.equal(before, logits(model))


def test_merged_is_adapted(family: str) -> None:
    model = build(family)
    groups = with_lora(model)
    cut(model, groups, random_keep(groups, 5))
    adapted = logits(model)
    with adapters_off(model):
        assert (adapted - logits(model)).abs().max() > 1e-2
    assert torch.equal(adapted, logits(model))
    merge_lora(model)
    assert not adapter_parameters(model)
    assert (adapted - logits(model)).abs().max() < CLOSE


def test_a_merged_model_is_saved_whole(tmp_path) -> None:
    """And not as an adapter, as transformers would do with a model that has one."""
    model = build("llama-gqa")
    with_lora(model)
    merge_lora(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    assert torch.equal(logits(again), logits(model))


def test_groups_count_every_prunable_parameter(family: str) -> None:
    model = build(family)
    groups = find_groups(model)
    counted = sum(group.units * group.cost for group in groups)
    # o_proj's and down_proj's biases lie on the residual stream: no unit takes them along.
    consumers = {s.module for group in groups for s in group.consumers}
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".bias") and n[:-5] in consumers)
    assert counted + biases == groups.block_parameters
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    assert groups.block_parameters == sum(p.numel() for m in linears for p in m.parameters())
    assert groups.total_parameters == sum(p.numel() for p in model.parameters())
    told = groups.to_json()
    assert [each["units"] for each in told["groups"]] == [group.units for group in groups]
    assert (told["residual"]["kind"], told["residual"]["units"]) == ("hidden", model.config.hidden_size)
    assert len(groups.linears) == len(linears)


def test_head_size_is_read_off_the_graph() -> None:
    groups = find_groups(build("qwen3-tied"))
    attention = groups.by_name("layers.0.attention")
    per_unit = {s.module.rpartition(".")[2]: s.index.shape[1] for s in attention.slices}
    assert attention.units == 3
    assert per_unit == {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}


def test_lora_factors_belong_to_their_linear() -> None:
    model = build("llama-gqa")
    groups = with_lora(model)
    for group in groups:
        adapters = {
            (s.module.rpartition(".")[2], s.parameter.split(".lora_")[1][0], s.axis)
            for s in group.slices
            if s.is_adapter
        }
        if group.kind == "attention":
            assert adapters == {("q_proj", "B", 0), ("k_proj", "B", 0), ("v_proj", "B", 0), ("o_proj", "A", 1)}
        else:
            assert adapters == {("gate_proj", "B", 0), ("up_proj", "B", 0), ("down_proj", "A", 1)}
    without = find_groups(build("llama-gqa"))
    assert [(g.name, g.units, g.cost) for g in groups] == [(g.name, g.units, g.cost) for g in without]


def test_groups_after_a_cut_are_what_tracing_finds(family: str) -> None:
    model = build(family)
    groups = with_lora(model)
    left = cut(model, groups, random_keep(groups, 2))
    traced = find_groups(model)
    assert (left.block_parameters, left.total_parameters) == (traced.block_parameters, traced.total_parameters)
    assert left.layers == traced.layers
    for ours, theirs in zip(left, traced, strict=True):
        assert (ours.name, ours.units, ours.cost) == (theirs.name, theirs.units, theirs.cost)
        assert {(s.parameter, s.axis): s.index.tolist() for s in ours.slices} == {
            (s.parameter, s.axis): s.index.tolist() for s in theirs.slices
        }


def test_two_cuts_are_one(family: str) -> None:
    once, twice = build(family), build(family)
    groups = find_groups(once)
    first = random_keep(groups, 3)
    second = {name: units[::2] for name, units in first.items()}
    cut(once, groups, second)
    left = cut(twice, find_groups(twice), first)
    cut(twice, left, {name: np.searchsorted(first[name], units) for name, units in second.items()})
    assert torch.equal(logits(once), logits(twice))


def test_alike_layers_are_traced_once() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    groups = find_groups(model)
    assert len(groups) == 80
    assert [group.units for group in groups if group.kind == "attention"] == [2] * 40
    assert {s.parameter.split(".")[2] for g in groups if g.layer == 39 for s in g.slices} == {"39"}


class Cubed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_a_part_that_cannot_be_traced_stays_whole_and_is_adapted() -> None:
    model = build("llama-gqa")
    for layer in model.model.layers:
        layer.mlp.act_fn = Cubed()
    groups, plain = find_groups(model), find_groups(build("llama-gqa"))
    assert groups.opaque == {f"model.layers.{n}.mlp": "aten.special_bessel_j0" for n in range(len(model.model.layers))}
    assert [group.name for group in groups] == [group.name for group in plain if group.kind == "attention"]
    assert (groups.linears, groups.block_parameters) == (plain.linears, plain.block_parameters)
    assert groups.residual is None, "hidden channels go through it"
    assert groups.to_json()["opaque"] == groups.opaque


def test_batch_and_heads_may_be_one_axis_for_a_while() -> None:
    heads = np.arange(6).reshape(1, 6, 1, 1)
    together = reshape(heads, (2, 6, 7, 4), (12, 7, 4))
    assert together.reshape(-1).tolist() == [*range(6), *range(6)]
    assert np.array_equal(reshape(together, (12, 7, 4), (2, 6, 7, 4)), heads)


def test_where_nothing_can_be_traced_the_reason_is_told() -> None:
    model = build("llama-gqa")
    for layer in model.model.layers:
        layer.mlp.act_fn = Cubed()
        layer.self_attn.o_proj = nn.Sequential(Cubed(), layer.self_attn.o_proj)
    with pytest.raises(
        InputError, match=r"nothing that regrow can prune: model.layers.0.\w+ uses aten.special_bessel_j0"
    ):
        find_groups(model)


def test_layers_that_share_weights_are_refused() -> None:
    model = build("llama-gqa")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(InputError, match=r"share weights \(model.layers.0.mlp.gate_proj.weight is model.layers.1.mlp"):
        find_groups(model)


class Routed(nn.Module):
    """Tokens to two linears, in a row for each: how many there are depends on what they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        rows = x_BTD.flatten(0, 1)
        chosen = rows.sum(-1) > 0
        sizes = torch.stack([chosen.sum(), (~chosen).sum()]).tolist()
        given = [part(some) for part, some in zip(self.parts, rows.split(sizes), strict=True)]
        return torch.cat(given).sum(0) + x_BTD


def test_a_part_whose_sizes_depend_on_values_stays_whole() -> None:
    model = build("llama-gqa")
    for layer in model.model.layers:
        layer.mlp = Routed(model.config.hidden_size)
    groups = find_groups(model)
    assert {group.kind for group in groups} == {"attention"}
    assert list(groups.opaque) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_what_cannot_be_exported_is_told_in_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    class Choosing(nn.Module):
        def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
            return x_BTD if x_BTD.sum() > 0 else -x_BTD

    model = build("llama-gqa")
    model.model.norm = Choosing()
    with pytest.raises(InputError, match="cannot trace LlamaForCausalLM: Could not guard") as caught:
        find_groups(model)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == "", "not the graph besides"


def test_reshape_keeps_what_batch_and_time_do_not_touch() -> None:
    heads = np.arange(6).reshape(1, 1, 6, 1)
    flat = reshape(heads, (2, 7, 6, 4), (2, 7, 24))
    assert flat.shape == (1, 1, 24)
    assert flat[0, 0].tolist() == np.repeat(np.arange(6), 4).tolist()
    assert np.array_equal(reshape(flat, (2, 7, 24), (14, 3, 8)).reshape(-1), np.repeat(np.arange(6), 4))


@pytest.mark.parametrize(
    ("first", "second", "same", "repeats"),
    [
        ((1, 3), (1, 3), True, False),
        ((1, 3), (4, 3), True, True),
        ((4, 3), (1, 3), True, False),
        ((1, 3), (4, 1), False, True),
        ((1, 1), (4, 3), True, True),
        ((4, 3), (1, 1), True, False),
        ((1, 1), (1, 1), True, False),
        ((2, 1, 3), (2, 4, 1), True, True),
    ],
)
def test_when_two_facets_name_the_same(first, second, same: bool, repeats: bool) -> None:
    assert overlap(np.zeros(first, int), np.zeros(second, int)) is same
    assert narrower(np.zeros(first, int), np.zeros(second, int)) is repeats


# --- rules: an operator is what it is made of --------------------------------------------------


class Small(nn.Module):
    """Projections of an embedding, 4 heads of queries and 2 of keys and values, and what `compute` makes of them."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.compute = compute
        with torch.device("meta"):
            self.embedding = nn.Embedding(11, 8)
            self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
            self.o = nn.Linear(12, 8)

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embedding(ids)
        return self.o(self.compute(*(part(x).unflatten(-1, (-1, 3)) for part in (self.q, self.k, self.v))).flatten(2))


def of_heads(fused):
    """Attention over the heads, on `[batch, time, heads, 3]`."""
    return lambda q, k, v: fused(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def spelled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def alike(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (torch.cat([part, part], 1) for part in (k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v)


def traced(compute) -> Trace:
    return trace(Small(compute), "layers")  # type: ignore[arg-type]  # all that a trace asks of a model


def classes_of(found: Trace) -> dict[tuple[str, int], tuple[bool, list[int]]]:
    return {(axis.parameter, axis.axis): (axis.is_input, axis.classes.tolist()) for axis in found.axes}


@pytest.mark.parametrize(
    ("fused", "parts", "heads"),
    [
        (grouped, spelled, [0, 0, 1, 1]),
        (alike, lambda q, k, v: spelled(q, torch.cat([k, k], 1), torch.cat([v, v], 1)), [0, 1, 0, 1]),
    ],
)
def test_fused_attention_is_its_products(fused, parts, heads: list[int]) -> None:
    """Query head by query head, which KV head it goes with."""
    one, other = traced(of_heads(fused)), traced(of_heads(parts))
    assert classes_of(one) == classes_of(other)
    assert one.attention == other.attention
    is_input, columns = classes_of(one)["o.weight", 1]
    assert is_input
    first, second = sorted(one.attention)
    assert columns == np.repeat([(first, second)[number] for number in heads], 3).tolist()


@pytest.mark.parametrize("before", [(), (2,), (2, 3)])
def test_a_product_by_hand(before: tuple[int, ...]) -> None:
    """Rows keep their names, columns too; what is summed over goes together one by one."""
    walk, rank = Walk(), len(before) + 2
    rows, left = walk.channels.new(5).reshape([1] * len(before) + [5, 1]), walk.channels.new(4)
    right, columns = walk.channels.new(4), walk.channels.new(3)
    one = Value((*before, 5, 4), (rows, left.reshape([1] * (rank - 1) + [4])))
    other = Value((4, 3), (right.reshape(4, 1), columns.reshape(1, 3)), is_weight=True)
    found = RULES["aten.matmul"](walk, (one, other), {}, (*before, 5, 3))
    assert [facet.shape for facet in found.facets] == [(*[1] * len(before), 5, 1), (*[1] * (rank - 1), 3)]
    assert [facet.reshape(-1).tolist() for facet in found.facets] == [[0, 1, 2, 3, 4], [13, 14, 15]]
    assert walk.channels.classes().tolist() == [*range(9), *range(5, 9), 13, 14, 15]
    assert (walk.contracted, walk.attended) == ({9, 10, 11, 12}, [])


aten = torch.ops.aten
MOVES = [
    (aten.view.default, ([2, 6, 2, 2],), {}),
    (aten.flatten.using_ints, (1,), {}),
    (aten.unflatten.int, (1, [2, 3]), {}),
    (aten.unsqueeze.default, (1,), {}),
    (aten.transpose.int, (1, 2), {}),
    (aten.transpose.int, (0, -1), {}),
    (aten.permute.default, ([2, 0, 1],), {}),
    (aten.expand.default, ([3, 2, 6, 4],), {}),
    (aten.slice.Tensor, (), {}),
    (aten.slice.Tensor, (1, 2), {}),
    (aten.slice.Tensor, (-1, 1, 4, 2), {}),
    (aten.slice.Tensor, (1, 0, -2), {}),
    (aten.select.int, (1, 4), {}),
    (aten.select.int, (-1, -2), {}),
    (aten.repeat_interleave.self_int, (2, 1), {}),
    (aten.repeat_interleave.self_int, (3,), {"dim": -1}),
    (aten.repeat.default, ([1, 2, 3],), {}),
    (aten.repeat.default, ([2, 1, 1, 2],), {}),
    (aten.split.Tensor, (1,), {}),
    (aten.split.Tensor, (4,), {"dim": 1}),
    (aten.split_with_sizes.default, ([1, 3], -1), {}),
    (aten.chunk.default, (2, 1), {}),
]


@pytest.mark.parametrize(("operator", "args", "kwargs"), MOVES)
@pytest.mark.parametrize("size", [(1, 6, 1), (1, 1, 4), (2, 6, 1), (2, 6, 4)])
def test_names_move_as_elements_do(operator, args, kwargs, size: tuple[int, ...]) -> None:
    """What an operator makes of a tensor of names are the names of what it makes of a tensor."""
    facet, shape = np.arange(np.prod(size)).reshape(size), (2, 6, 4)
    moved = operator(torch.from_numpy(np.broadcast_to(facet, shape).copy()), *args, **kwargs)
    expected = [moved] if isinstance(moved, torch.Tensor) else moved
    shapes = tuple(moved.shape) if isinstance(moved, torch.Tensor) else [tuple(one.shape) for one in moved]
    found = rule_of(operator)(Walk(), (Value(shape, (facet,), True), *args), kwargs, shapes)
    for value, names in zip([found] if isinstance(found, Value) else found, expected, strict=True):
        assert value.is_weight
        assert value.shape == names.shape
        assert np.array_equal(np.broadcast_to(value.facets[0], names.shape), names)
        hangs = [bool((names != names.narrow(axis, 0, 1)).any()) for axis in range(names.ndim)]
        assert [length > 1 for length in value.facets[0].shape] == hangs


def rule_of(operator):
    return RULES[f"aten.{operator._schema.name.partition('::')[2]}"]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_names_that_are_put_side_by_side(dim: int) -> None:
    sizes = [(2, 6, 4), (1, 6, 1), (1, 1, 4)]
    facets = [np.arange(np.prod(size)).reshape(size) + 100 * number for number, size in enumerate(sizes)]
    values = [Value((2, 6, 4), (facet,)) for facet in facets]
    tensors = [torch.from_numpy(np.broadcast_to(facet, (2, 6, 4)).copy()) for facet in facets]
    for operator in (aten.cat.default, aten.stack.default):
        names = operator(tensors, dim)
        args, kwargs = ((values, dim), {}) if dim else ((values,), {})
        found = rule_of(operator)(Walk(), args, kwargs, tuple(names.shape))
        assert np.array_equal(np.broadcast_to(found.facets[0], names.shape), names)
        assert np.array_equal(rule_of(operator)(Walk(), (values,), {"dim": dim}, found.shape).facets, found.facets)
    part = rule_of(aten.cat.default)(Walk(), (values[1:2] * 2, -1), {}, (2, 6, 8))
    assert part.facets[0].shape == (1, 6, 8)


def test_a_piece_without_names_gets_new_ones() -> None:
    walk = Walk()
    named = Value((2, 6, 4), (walk.channels.new(4).reshape(1, 1, 4),))
    found = rule_of(aten.cat.default)(walk, ([named, Value((2, 6, 3))], -1), {}, (2, 6, 7))
    assert found.facets[0].tolist() == [[[0, 1, 2, 3, 4, 5, 6]]]


@pytest.mark.parametrize(("args", "kwargs"), [((2, 1), {}), ((2,), {"dim": -2}), ((2, -2), {})])
def test_of_what_the_highest_were_chosen(args, kwargs) -> None:
    walk = Walk()
    among, others = walk.channels.new(4).reshape(1, 4, 1), walk.channels.new(3).reshape(1, 1, 3)
    top = rule_of(aten.topk.default)
    values, positions = top(walk, (Value((5, 4, 3), (among, others)), *args), kwargs, [(5, 2, 3), (5, 2, 3)])
    assert [(names.tolist(), count) for names, count in walk.offered] == [([0, 1, 2, 3], 2)]
    assert (positions.shape, positions.facets, positions.among.tolist()) == ((5, 2, 3), (), [0, 1, 2, 3])
    assert [facet.tolist() for facet in values.facets] == [[[[4, 5, 6]]]]
    assert walk.channels.classes().tolist() == list(range(7))
    _, last = top(walk, (Value((5, 4, 3), (others, among)), 1), {}, [(5, 4, 1), (5, 4, 1)])
    assert last.among.tolist() == [4, 5, 6]
    _, none = top(walk, (Value((5, 4, 3), (among,)), 1), {}, [(5, 4, 1), (5, 4, 1)])
    assert none.among is None


@pytest.mark.parametrize("args", [(1,), (-2,), ()])
def test_what_is_gathered_by_hand(args: tuple[int, ...]) -> None:
    """Of those that were chosen what they have; of others nothing is known but that all go together."""
    for chosen in (True, False):
        walk = Walk()
        among, others = walk.channels.new(4).reshape(1, 4, 1), walk.channels.new(3).reshape(1, 1, 3)
        index = Value((5, 2, 3), among=among.reshape(-1) if chosen else None)
        given = (Value((5, 4, 3), (among,)), *args, index) if args else (Value((5, 4, 3), (among,)),)
        found = rule_of(aten.gather.default)(walk, given, {} if args else {"dim": 1, "index": index}, (5, 2, 3))
        assert [facet.tolist() for facet in found.facets] == ([] if chosen else [[[[0]]]])
        assert walk.channels.classes().tolist() == ([0, 1, 2, 3, 4, 5, 6] if chosen else [0, 0, 0, 0, 4, 5, 6])
        assert not found.is_weight
        assert others.size == 3


@pytest.mark.parametrize("axis", [1, -2])
def test_where_something_is_written_to_by_hand(axis: int) -> None:
    """To those that were chosen: all stay what they are; to others: all go together."""
    for chosen in (True, False):
        walk = Walk()
        among, others = walk.channels.new(4).reshape(1, 4, 1), walk.channels.new(3).reshape(1, 1, 3)
        index = Value((5, 2, 3), among=among.reshape(-1) if chosen else None)
        found = rule_of(aten.scatter.value)(walk, (Value((5, 4, 3), (among, others)), axis, index, 1.0), {}, (5, 4, 3))
        assert [facet.tolist() for facet in found.facets] == [among.tolist(), others.tolist()]
        assert walk.channels.classes().tolist() == ([0, 1, 2, 3, 4, 5, 6] if chosen else [0, 0, 0, 0, 4, 5, 6])


def test_of_what_another_tensor_is_like_only_the_dtype_counts() -> None:
    walk = Walk()
    one, other = (Value((5, size), (walk.channels.new(size).reshape(1, size),)) for size in (4, 3))
    found = rule_of(aten.type_as.default)(walk, (one, other), {}, (5, 4))
    assert [facet.tolist() for facet in found.facets] == [[[0, 1, 2, 3]]]
    assert walk.channels.classes().tolist() == list(range(7))


def test_reductions_by_hand() -> None:
    """What hangs on the reduced axis alone is gone, what hangs on it and another goes together, the rest stays."""
    for name, args, kept in (("sum", ([1],), (5, 3)), ("amax", ([-2], True), (5, 1, 3))):
        walk = Walk()
        alone, mixed = walk.channels.new(4).reshape(1, 4, 1), walk.channels.new(12).reshape(1, 4, 3)
        apart = walk.channels.new(5).reshape(5, 1, 1)
        value = Value((5, 4, 3), (alone, mixed, apart))
        found = RULES[f"aten.{name}"](walk, (value, *args), {}, kept)
        assert [facet.reshape(-1).tolist() for facet in found.facets] == [[4, 5, 6], [16, 17, 18, 19, 20]]
        assert [facet.ndim for facet in found.facets] == [len(kept)] * 2
        assert walk.channels.classes().tolist() == [0, 1, 2, 3, *[4, 5, 6] * 4, 16, 17, 18, 19, 20]
        averaged = [facet for facet, *_ in walk.averaged]
        assert [facet is wanted for facet, wanted in zip(averaged, (alone, mixed), strict=True)] == [True] * 2


def test_channels_that_a_softmax_normalises_go_together_or_not_at_all() -> None:
    class SoftFFN(torch.nn.Module):
        def __init__(self, ffn: torch.nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = ffn.gate_proj, ffn.up_proj, ffn.down_proj

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.gate_proj(x).softmax(-1) * self.up_proj(x))

    model = build("llama-gqa")
    for layer in model.model.layers:
        layer.mlp = SoftFFN(layer.mlp)
    assert {group.kind: group.units for group in find_groups(model)} == {"attention": 3, "ffn": 1}


def test_heads_are_seen_behind_values_that_are_clipped_in_place() -> None:
    few = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = OlmoConfig(**few, num_attention_heads=4, num_key_value_heads=2, clip_qkv=8.0)
    groups = find_groups(AutoModelForCausalLM.from_config(config))
    assert not groups.opaque
    assert {group.kind: group.units for group in groups} == {"attention": 2, "ffn": 48}


def test_the_highest_along_an_axis_or_of_all() -> None:
    walk = Walk()
    value = Value((5, 4), (walk.channels.new(4).reshape(1, 4), walk.channels.new(5).reshape(5, 1)))
    highest, where = RULES["aten.max"](walk, (value, 1), {}, [(5,), (5,)])
    assert ([facet.tolist() for facet in highest.facets], where.facets) == ([[4, 5, 6, 7, 8]], ())
    assert where.among.tolist() == [0, 1, 2, 3]
    RULES["aten.max"](walk, (Value((5, 4), value.facets[:1]), -1, True), {}, [(5, 1), (5, 1)])
    assert [count for _, count in walk.offered] == [1, 2], "the second highest, the first being out of it"
    assert RULES["aten.max"](walk, (value,), {}, ()).facets == ()
    other = Value((5, 4), (walk.channels.new(4).reshape(1, 4),))
    larger = RULES["aten.max"](walk, (value, other), {}, (5, 4))
    assert len(larger.facets) == 2
    assert walk.channels.classes().tolist()[9:] == [0, 1, 2, 3], "tied, element by element"


class Part(nn.Module):
    """Of a layer: a linear, what `compute` makes of it, and a linear."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.compute = compute
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.compute(self.up(x)))


class Layered(nn.Module):
    """Layers of one part each between an embedding and a head; `between` is done to what goes from one to the next."""

    def __init__(self, *computes, between=lambda x: x) -> None:
        super().__init__()
        self.between = between
        with torch.device("meta"):
            self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
            self.layers = nn.ModuleList([nn.ModuleDict({"part": Part(compute)}) for compute in computes])

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = self.between(x + layer["part"](x))
        return self.head(x)


def test_a_part_with_an_unknown_operator_stays_and_what_goes_in_and_out_too() -> None:
    found = trace(Layered(torch.relu, lambda x: x.cumsum(-1), torch.relu), "layers")  # type: ignore[arg-type]
    assert found.opaque == {"layers.1.part": "aten.cumsum"}
    assert found.linears == {"layers.1.part.up", "layers.1.part.down"}
    fixed = {axis: found.fixed.issuperset(classes) for axis, (_, classes) in classes_of(found).items()}
    channels = {("layers.0.part.up.weight", 0), ("layers.0.part.up.bias", 0), ("layers.0.part.down.weight", 1)}
    channels |= {(name.replace("0", "2"), axis) for name, axis in channels}
    assert {axis for axis, stays in fixed.items() if not stays} == channels | {
        ("embedding.weight", 0),
        ("head.weight", 0),
        ("head.bias", 0),
    }


def test_what_an_opaque_part_gives_has_to_be_hidden_states() -> None:
    class Turned(Part):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).transpose(1, 2)

    model = Layered(torch.relu, lambda x: x.cumsum(-1))
    model.layers[1]["part"].__class__ = Turned
    model.forward = lambda ids, use_cache=False: model.layers[1]["part"](model.embedding(ids)).relu()
    with pytest.raises(InputError, match=r"'layers.1.part' uses operator aten.transpose of shape \[2, 8, 7\]"):
        trace(model, "layers")  # type: ignore[arg-type]


def test_an_unknown_operator_outside_of_all_parts_is_refused() -> None:
    with pytest.raises(InputError, match=r"module 'model' uses operator .*cumsum, for which regrow has no pruning"):
        trace(Layered(torch.relu, between=lambda x: x.cumsum(-1)), "layers")  # type: ignore[arg-type]


def test_names_before_and_after_a_cut_by_hand() -> None:
    """A layer's name is told from one that merely begins alike."""
    names = {
        f"model.layers.{before}": None if before == 2 else f"model.layers.{before - (before > 2)}"
        for before in range(12)
    }
    index_map = IndexMap({}, {}, {}, names)
    for before, after in (("1.mlp", "1.mlp"), ("3", "2"), ("10.mlp.up_proj.weight", "9.mlp.up_proj.weight")):
        assert index_map.name_after(f"model.layers.{before}") == f"model.layers.{after}"
        assert index_map.name_before(f"model.layers.{after}") == f"model.layers.{before}"
    assert index_map.name_after("model.layers.2.mlp") is None
    assert index_map.name_after("model.norm") == index_map.name_before("model.norm") == "model.norm"


def test_only_a_bias_may_be_missing() -> None:
    model = build("llama-gqa")
    add_missing_biases(model, bias_names(model) | {"model.layers.0.mlp.up_proj.bias"})
    assert model.model.layers[0].mlp.up_proj.bias.tolist() == [0.0] * 40
    for name in ("model.layers.0.mlp.other_proj.weight", "model.layers.0.mlp.up_proj.aux"):
        with pytest.raises(AssertionError, match=f"the class has {name}, the model has not"):
            add_missing_biases(model, frozenset({name}))


# --- gate gradients ---------------------------------------------------------------------------


def summed_losses(model, ids: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(input_ids=ids, use_cache=False).logits
    nll = nn.functional.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return nll.sum(1)


def recorded(model, gates: Gates, ids: torch.Tensor, pieces: int = 1) -> dict[str, torch.Tensor]:
    got: dict[str, list[torch.Tensor]] = {}
    for part in ids.chunk(pieces):
        with gates.recording(ids[:, 1:].numel(), lambda name, c: got.setdefault(name, []).append(c)):
            (language_loss(model(input_ids=part, use_cache=False).logits, part) / pieces).backward()
    return {name: torch.cat(parts) for name, parts in got.items()}


def embedding_gradient(model, ids: torch.Tensor) -> torch.Tensor:
    """Of the summed losses: what lies before all layers."""
    model.zero_grad()
    summed_losses(model, ids).sum().backward()
    return model.get_input_embeddings().weight.grad.clone()


def gated_gradient(model, groups, values, ids: torch.Tensor, recording: bool) -> torch.Tensor:
    """`embedding_gradient` with gates at some values, while they are recorded or not."""
    with Gates(model, groups.groups) as gates:
        for name, value in values.items():
            gates.set(name, value)
        with gates.recording(1.0, lambda name, c: None) if recording else nullcontext():
            return embedding_gradient(model, ids)


IDS = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(7))


def test_gate_gradient_is_the_weights_own(family: str) -> None:
    """`c = ⟨W', ∂L/∂W'⟩` on the consumer's columns, W' = W + sBA; per sample."""
    model = build(family).double()
    groups = with_lora(model)
    model.double().train()
    with Gates(model, groups.groups) as gates:
        got = recorded(model, gates, IDS)
    merge_lora(model)
    model.double()
    for sample in range(len(IDS)):
        model.zero_grad()
        summed_losses(model, IDS[sample : sample + 1]).sum().backward()
        for group in groups:
            weight = model.get_submodule(group.consumers[0].module).weight
            columns = (weight * weight.grad).sum(0)
            expected = columns[torch.from_numpy(group.consumers[0].index)].sum(1)
            torch.testing.assert_close(got[group.name][sample].double(), expected.detach(), rtol=2e-4, atol=1e-5)


def test_a_gate_on_flattened_hidden_states_tells_sequences_apart() -> None:
    """A shared expert, say, is given `[batch x time, channels]`."""
    model = build("llama-gqa")
    groups = with_lora(model)
    with Gates(model, groups.groups) as gates:
        expected = recorded(model, gates, IDS)
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, inner=layer.mlp.forward: inner(x.flatten(0, 1)).view_as(x)
    with Gates(model, groups.groups) as gates:
        got = recorded(model, gates, IDS)
    assert got.keys() == expected.keys()
    for name, c_BU in expected.items():
        torch.testing.assert_close(got[name], c_BU, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recording", [False, True])
def test_what_lies_before_a_gate_learns_through_it(recording: bool) -> None:
    """As through the consumer's columns times the gate."""
    model = build("llama-gqa")
    groups = find_groups(model)
    chance = torch.Generator().manual_seed(3)
    values = {group.name: torch.rand(group.units, generator=chance) for group in groups}
    found = gated_gradient(model, groups, values, IDS, recording)
    for group in groups:
        weight, index = model.get_submodule(group.consumers[0].module).weight, group.consumers[0].index
        with torch.no_grad():
            weight[:, index.reshape(-1)] *= values[group.name].repeat_interleave(index.shape[1])
    torch.testing.assert_close(found, embedding_gradient(model, IDS), rtol=1e-4, atol=1e-5)


def test_a_gate_before_every_adapter_has_a_gradient_too() -> None:
    model = build("llama-gqa")
    attach_lora(model, find_groups(model).linears, rank=2, alpha=4, dropout=0.0, targets=["down_proj"])
    groups = find_groups(model)
    with Gates(model, groups.groups) as gates:
        got = recorded(model, gates, IDS)
    assert set(got) == {group.name for group in groups}
    assert all(bool(c.any()) for c in got.values())


@pytest.mark.parametrize("way", ["accumulated", "checkpointed", "scaled", "autocast"])
def test_gate_gradient_does_not_depend_on_how_training_runs(way: str) -> None:
    model = build("llama-gqa")
    groups = with_lora(model)
    model.train()
    with Gates(model, groups.groups) as gates:
        plain = recorded(model, gates, IDS)
        tolerance = 1e-4
        if way == "accumulated":
            other = recorded(model, gates, IDS, pieces=2)
        elif way == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            other = recorded(model, gates, IDS)
        elif way == "scaled":
            other = {}
            with gates.recording(IDS[:, 1:].numel() / 1024, lambda name, c: other.update({name: c})):
                (language_loss(model(input_ids=IDS, use_cache=False).logits, IDS) * 1024).backward()
        else:
            tolerance = 0.1
            with torch.autocast("cpu", torch.bfloat16):
                other = recorded(model, gates, IDS)
    for name, expected in plain.items():
        assert (other[name] - expected).norm() <= tolerance * expected.norm(), name


def test_removing_a_unit_costs_what_its_gate_says_for_a_small_step() -> None:
    model = build("llama-gqa")
    groups = find_groups(model)
    model.double()
    with Gates(model, groups.groups) as gates:
        c = recorded(model, gates, IDS)["layers.1.ffn"].sum(0)
        with torch.no_grad():
            before = summed_losses(model, IDS).sum()
            value = torch.ones(40)
            value[3] = 1 - 1e-3
            gates.set("layers.1.ffn", value)
            after = summed_losses(model, IDS).sum()
    assert float(after - before) == pytest.approx(-1e-3 * float(c[3]), rel=2e-2, abs=1e-6)


def test_fisher_does_not_depend_on_how_sequences_are_batched() -> None:
    c = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    whole, parts = GateMoments.zeros(5), GateMoments.zeros(5)
    whole.add(c)
    for part in c.split(2):
        parts.add(part)
    torch.testing.assert_close(whole.mean_square, parts.mean_square)
    torch.testing.assert_close(whole.mean, c.double().mean(0))
    torch.testing.assert_close(whole.mean_square, c.double().square().mean(0))
