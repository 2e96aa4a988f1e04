"""Mixtures of experts: channels inside experts and whole experts, from the gates to the checkpoint."""

import copy
import json
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import QUICK, make_tokenizer, plan_of, with_lora
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_stream import in_memory, on_base, streamed
from test_structure import embedding_gradient, gated_gradient, recorded, summed_losses
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter
from zoo import CLOSE, build, logits_of

import regrow
from regrow.checkpoint.load import load_model
from regrow.checkpoint.offloaded import load_offloaded
from regrow.checkpoint.peft_folder import Adapter
from regrow.checkpoint.save import needs_remote_code
from regrow.checkpoint.source import Source
from regrow.checkpoint.stock import check_free, prunable_groups
from regrow.checkpoint.tensors import StoredTensors
from regrow.compensation.moments import InputMoments
from regrow.compensation.solve import least_squares
from regrow.criteria.registry import find_criterion
from regrow.errors import InputError
from regrow.planning.allocation import choose
from regrow.planning.experts import expert_choices, expert_price, fold, unfold
from regrow.planning.plan import Plan
from regrow.preflight import check_experts
from regrow.progress import Silent
from regrow.recipe import load_recipe
from regrow.recovery.compensate import Compensator
from regrow.recovery.learner import attach
from regrow.recovery.scoring import copy_factors, gather_evidence
from regrow.recovery.teacher import copy_without_adapters
from regrow.report.graph import draw_graph
from regrow.run import prune
from regrow.settings import Compensation, Lora, Pruning
from regrow.structure.adapters import adapter_names, adapter_parameters, adapters_off, lora_layers, merge_lora
from regrow.structure.cut import cut
from regrow.structure.experts import ADAPTED
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.graph import layer_graph
from regrow.structure.groups import RESIDUAL, Groups
from regrow.structure.offload import Offloaded
from regrow.structure.positions import index_map
from regrow.structure.residual import block_cost

IDS = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(7))


def thinned(groups: Groups, experts: int, channels: int, seed: int = 0) -> dict[str, np.ndarray]:
    """So many experts in every layer, and so many channels in each, which ones at random; everything else."""
    chance = np.random.default_rng(seed)
    keep: dict[str, np.ndarray] = {}
    for group in groups:
        count = experts if group.kind == "expert" else group.units
        if group.expert is not None:
            gone = group.expert not in keep.get(f"layers.{group.layer}.expert", range(1000))
            count = 0 if gone else channels
        keep[group.name] = np.sort(chance.choice(group.units, count, replace=False))
    return keep


CASES = {"channels": (4, 8), "experts": (3, 16), "all": (2, 8)}


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("Mixtral", "channels"),
        ("OLMoE", "experts"),
        ("Mixtral", "all"),
        ("Qwen3-MoE", "all"),
        ("gpt-oss", "all"),
        ("GLM-4 MoE", "channels"),
        ("Qwen2-MoE", "all"),
        ("ERNIE 4.5 MoE", "all"),
    ],
)
def test_masked_is_cut(family: str, case: str) -> None:
    experts, channels = CASES[case]
    model = build(family)
    groups = find_groups(model)
    if case == "experts":
        channels = groups.by_name("layers.0.expert0.ffn").units
    keep = thinned(groups, experts, channels)
    if case == "all":
        keep[RESIDUAL] = np.sort(np.random.default_rng(1).choice(64, 40, replace=False))
    whole = logits_of(model)
    with Gates(model, groups.groups, residual=groups.residual) as gates:
        assert torch.equal(whole, logits_of(model)), "open gates change no bit"
        for name, units in keep.items():
            gates.keep(name, units.tolist())
        masked = logits_of(model)
    assert torch.equal(whole, logits_of(model)), "gates leave the model as it was"
    left = cut(model, groups, keep)
    assert (masked - logits_of(model)).abs().max() < CLOSE
    assert (masked - whole).abs().max() > 1e-2, "a mask that changes nothing proves nothing"

    plan, traced = plan_of(groups, keep), find_groups(model)
    assert left.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert groups.total_parameters - plan.removed_parameters == left.total_parameters == traced.total_parameters
    assert left.block_parameters == traced.block_parameters
    assert left.layers == traced.layers
    for ours, theirs in zip(left, traced, strict=True):
        assert (ours.units, ours.cost, ours.hidden) == (theirs.units, theirs.cost, theirs.hidden)
        for one, other in zip(ours.slices, theirs.slices, strict=True):
            assert (one.parameter, one.axis, one.expert) == (other.parameter, other.axis, other.expert)
            assert np.array_equal(one.index, other.index)


def test_every_parameter_of_experts_and_router_is_a_units() -> None:
    model = build("Mixtral")
    groups = find_groups(model)
    held = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    assert sum(group.units * group.cost for group in groups if group.kind in ("ffn", "expert")) == held
    assert groups.by_name("layers.0.expert").least == 2, "a token goes to two experts"
    assert not any(".mlp." in name for name in groups.linears), "no adapters there"


@pytest.mark.parametrize(
    ("family", "channel", "expert"), [("Mixtral", (3, 0, 3), (1, 0, 1)), ("gpt-oss", (3, 2, 3), (2, 1, 2))]
)
def test_what_a_unit_costs_by_hand(family: str, channel: tuple[int, ...], expert: tuple[int, ...]) -> None:
    """So many times the hidden size, so many beside that, so many on each hidden channel.

    A channel has two rows of `gate_up_proj` and a column of `down_proj`, the expert a row of the router; and biases.
    """
    groups = find_groups(build(family))
    wide = groups.residual.units
    for name, (times, beside, hidden) in (("layers.0.expert2.ffn", channel), ("layers.1.expert", expert)):
        group = groups.by_name(name)
        assert (group.cost, group.hidden) == (times * wide + beside, hidden)


def test_two_cuts_are_one() -> None:
    once, twice = build("Qwen3-MoE"), build("Qwen3-MoE")
    groups = find_groups(once)
    first = plan_of(groups, thinned(groups, 3, 16))
    keep = {name: group.keep for name, group in first.groups.items()}
    narrower = {name: units[:8] for name, units in keep.items() if name.endswith("ffn")}
    final = first.keeping(narrower | {f"layers.{n}.expert": keep[f"layers.{n}.expert"][1:] for n in range(3)})
    cut(once, groups, final.positions_within(Plan.whole(groups)))
    left = cut(twice, groups, first.positions_within(Plan.whole(groups)))
    left = cut(twice, left, final.positions_within(first))
    assert torch.equal(logits_of(once), logits_of(twice))
    assert left.total_parameters == groups.total_parameters - final.removed_parameters


def test_a_layer_of_experts_can_be_drawn() -> None:
    model = build("Qwen3-MoE")
    groups = find_groups(model)
    graph = layer_graph(model, groups)
    (slab,) = (w for operator in graph.operators for w in operator.weights if w.role == "down_proj")
    assert (slab.rows, slab.columns) == (("layers.0.expert",), ("layers.0.expert0.ffn",)), "one expert stands for all"
    draw_graph(graph)


# --- gates -----------------------------------------------------------------------------------------


def derivatives(model: PreTrainedModel, groups: Groups, pieces: int = 1) -> dict[str, torch.Tensor]:
    with Gates(model, groups.groups) as gates:
        return recorded(model, gates, IDS, pieces)


@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss"])
def test_gate_gradient_is_the_weights_own(family: str) -> None:
    """`c = ⟨W[e], ∂L/∂W[e]⟩` on the channel's columns, per sequence; an expert's is its slope by finite difference."""
    model = build(family).double()
    model.set_experts_implementation("eager")  # the fused kernels have no float64
    groups = find_groups(model)
    got = derivatives(model, groups)
    for sample in range(len(IDS)):
        model.zero_grad()
        summed_losses(model, IDS[sample : sample + 1]).sum().backward()
        for group in (group for group in groups if group.expert is not None):
            (consumer,) = group.consumers
            weight = model.get_parameter(consumer.parameter)
            product = (weight * weight.grad)[consumer.expert]
            expected = product.sum(0 if consumer.axis == 2 else 1)[torch.from_numpy(consumer.index[:, 0])]
            torch.testing.assert_close(got[group.name][sample].double(), expected.detach(), rtol=2e-4, atol=1e-5)
    slopes, step = [], 1e-3
    for sign in (1, -1):
        with Gates(model, groups.groups) as gates, torch.no_grad():
            gates.set("layers.1.expert", torch.tensor([1.0, 1 + sign * step, 1.0, 1.0]))
            slopes.append(summed_losses(model, IDS) / (2 * step * sign))
    torch.testing.assert_close(
        got["layers.1.expert"][:, 1].double(), sum(slopes), rtol=1e-2, atol=3e-3
    )  # norms are float32


@pytest.mark.parametrize("recording", [False, True])
def test_what_lies_before_an_experts_gates_learns_through_them(recording: bool) -> None:
    """As through `down_proj` times the gates of its expert and of its columns."""
    model = build("Mixtral")
    groups = find_groups(model)
    chance = torch.Generator().manual_seed(3)
    values = {g.name: 0.5 + torch.rand(g.units, generator=chance) for g in groups if g.kind != "attention"}
    found = gated_gradient(model, groups, values, IDS, recording)
    for group in (group for group in groups if group.expert is not None):
        (consumer,) = group.consumers
        with torch.no_grad():
            scale = values[group.name] * values[f"layers.{group.layer}.expert"][consumer.expert]
            model.get_parameter(consumer.parameter)[consumer.expert][:, consumer.index[:, 0]] *= scale
    torch.testing.assert_close(found, embedding_gradient(model, IDS), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["split", "checkpointed"])
def test_derivatives_do_not_depend_on_how_sequences_are_batched(way: str) -> None:
    model = build("Qwen3-MoE")
    groups = zoo.with_lora(model)
    model.train()
    plain = derivatives(model, groups)
    if way == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    other = derivatives(model, groups, 1 if way == "checkpointed" else 4)
    assert set(plain) == {group.name for group in groups}, "experts that no token went to are told of, too"
    for name, expected in plain.items():
        torch.testing.assert_close(other[name], expected, rtol=1e-3, atol=1e-4)


def test_a_closed_expert_is_closed_to_the_router() -> None:
    """Near 0 the expert still takes a place among the chosen; at 0 another has it."""
    model = build("Mixtral")
    groups = find_groups(model)
    seen = []
    for gate in (1e-6, 0.0):
        with Gates(model, groups.groups) as gates:
            gates.set("layers.0.expert", torch.tensor([1.0, gate, 1.0, 1.0]))
            seen.append(logits_of(model))
    assert (seen[0] - seen[1]).abs().max() > 1e-2


# --- planning --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral() -> Groups:
    return prunable_groups(build("Mixtral"))


def some_scores(groups: Groups) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {g.name: torch.rand(g.units, generator=chance) * (30 if g.kind == "expert" else 1) for g in groups}


@pytest.mark.parametrize("kinds", [("attention", "ffn"), ("expert",), ("attention", "ffn", "expert", "layer")])
@pytest.mark.parametrize("shape", ["uniform", "free"])
def test_the_target_is_reached_to_one_step(kinds: tuple[str, ...], shape: str, mixtral: Groups) -> None:
    groups = mixtral
    pruning = Pruning(sparsity=0.3, kinds=kinds, shape=shape, allocation="global")
    scores = some_scores(groups)
    plan = choose(groups, Plan.whole(groups), scores, pruning)
    staying = [layer.number for layer in groups.layers if layer.number not in plan.removed_layers]
    each = {n: [g for name, g in plan.groups.items() if name.startswith(f"layers.{n}.")] for n in staying}
    widths = {n: {len(g.keep) for g in each[n] if g.units == 40 and g.keep} for n in staying}
    assert all(len(width) == 1 and width.pop() % 8 == 0 for width in map(set, widths.values())), "one for all experts"
    assert shape == "free" or len(set(map(str, widths.values()))) == 1
    experts = {len(plan.groups[f"layers.{n}.expert"].keep) for n in staying}
    assert len(experts) == 1
    step = sum(expert_price(groups, n) for n in staying)
    if "ffn" in kinds:
        step = 8 * 192 * experts.pop() * (1 if shape == "free" else len(staying))
    assert 0 <= plan.removed_block_parameters - 0.3 * groups.block_parameters < step + 1
    halfway = choose(groups, Plan.whole(groups), scores, pruning, fraction=0.5)
    then = choose(groups, halfway, scores, pruning)
    assert then.removed_block_parameters >= 0.3 * groups.block_parameters
    assert all(len(g.keep) % 8 == 0 for name, g in halfway.groups.items() if name.endswith("ffn"))


@pytest.mark.parametrize("kinds", [("hidden", "expert"), ("attention", "ffn", "expert", "hidden")])
def test_experts_and_hidden_channels_reach_a_target_together(kinds: tuple[str, ...], mixtral: Groups) -> None:
    model, groups, whole = build("Mixtral"), mixtral, Plan.whole(mixtral)
    scores = some_scores(groups) | {RESIDUAL: torch.arange(64.0)}
    plan = choose(groups, whole, scores, Pruning(sparsity=0.4, kinds=kinds))
    assert plan.narrows
    assert len(plan.groups["layers.0.expert"].keep) < 4
    left = cut(model, groups, plan.positions_within(whole))
    assert left.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert left.total_parameters == groups.total_parameters - plan.removed_parameters
    assert left.block_parameters == groups.block_parameters - plan.removed_block_parameters
    step = 8 * max(block_cost(left), sum(group.cost for group in left if group.expert is not None))
    assert 0 <= plan.removed_block_parameters - 0.4 * groups.block_parameters < step


def test_how_many_experts_go_by_hand(mixtral: Groups) -> None:
    """Counted: their share, rounded up; else one more in every layer until it is enough. Two of four have to stay."""
    nothing = {group.name: 0 for group in mixtral}

    def offered(wanted: int, **settings: object) -> list[set[int]]:
        pruning = Pruning(kinds=("expert", "ffn"), **settings)
        return [set(each.values()) for each in expert_choices(mixtral, nothing, pruning, frozenset(), wanted)]

    for sparsity, count in ((0.1, 1), (0.25, 1), (0.3, 2), (0.5, 2)):
        assert offered(10**9, basis="units", sparsity=sparsity) == [{count}]
    with pytest.raises(InputError, match=r"at most 2 of 4 experts may go in each layer; use at most 0\.5"):
        offered(10**9, basis="units", sparsity=0.51)
    one = len(mixtral.layers) * expert_price(mixtral, 0)
    assert [len(offered(wanted)) - 1 for wanted in (0, 1, one, one + 1, 9 * one)] == [0, 1, 1, 2, 2]
    assert offered(9 * one) == [{0}, {1}, {2}]
    assert expert_price(mixtral, 0) == mixtral.residual.units * (1 + 3 * mixtral.by_name("layers.0.expert0.ffn").units)
    assert offered(9 * one, cap=0.3) == [{0}, {1}]
    assert offered(9 * one, floor=0.6) == [{0}, {1}]


def test_experts_are_counted_whatever_share_of_the_layers_that_would_be() -> None:
    """Of so many layers a third is a whole one, which may not go."""
    config = build("Mixtral").config
    config.num_hidden_layers = 4
    groups = find_groups(AutoModelForCausalLM.from_config(config))
    pruning = Pruning(kinds=("expert",), basis="units", sparsity=0.4)
    plan = choose(groups, Plan.whole(groups), some_scores(groups), pruning)
    assert [len(plan.groups[f"layers.{n}.expert"].keep) for n in range(4)] == [2] * 4


def test_folded_channels_are_the_worst_of_every_expert_that_stays() -> None:
    groups = find_groups(build("Qwen3-MoE"))
    nothing = {group.name: 0 for group in groups}
    scores = {g.name: torch.arange(g.units) * 1.0 + (g.expert or 0) for g in groups}
    experts = {f"layers.{n}.expert": 1 for n in range(3)}
    folded, gone, worst = fold(groups, nothing, scores, experts)
    assert [group.name for group in folded] == [f"layers.{n}.{kind}" for n in range(3) for kind in ("attention", "ffn")]
    assert folded.by_name("layers.0.ffn").cost == 3 * 192
    assert worst["layers.0.ffn"][:2].tolist() == [1 + 2 + 3, 2 + 3 + 4], "expert 0 has the lowest score"
    counts = unfold(groups, gone | {"layers.0.ffn": 8}, experts)
    assert (counts["layers.0.expert"], counts["layers.0.expert2.ffn"], counts["layers.1.expert2.ffn"]) == (1, 8, 0)


def test_fewer_experts_than_a_token_needs_are_out_of_reach(mixtral: Groups) -> None:
    with pytest.raises(InputError, match="2 of 4 experts"):
        choose(mixtral, Plan.whole(mixtral), some_scores(mixtral), Pruning(sparsity=0.6, kinds=("expert",)))


def test_a_plan_empties_the_channels_of_experts_that_go(mixtral: Groups) -> None:
    plan = Plan.whole(mixtral).keeping({"layers.1.expert": [0, 2, 3]})
    assert plan.groups["layers.1.expert1.ffn"].keep == ()
    assert plan.removed_parameters == expert_price(mixtral, 1) == 40 * 192 + 64
    broken = plan.to_json()
    broken["groups"]["layers.1.expert1.ffn"]["keep"] = [0]
    with pytest.raises(InputError, match="expert"):
        Plan.parse(json.dumps(broken))


# --- criteria --------------------------------------------------------------------------------------


def test_magnitude_sees_experts() -> None:
    model = build("gpt-oss")
    groups = find_groups(model)
    magnitude = find_criterion("magnitude").score
    seen = {g.name: magnitude(gather_evidence(model, g, None, torch.Generator())) for g in groups if g.layer == 0}
    experts = model.model.layers[0].mlp.experts
    assert torch.allclose(seen["layers.0.expert2.ffn"], experts.down_proj[2].norm(dim=1))
    router = model.model.layers[0].mlp.router.weight
    squares = (
        experts.down_proj.square().sum((1, 2)) + experts.gate_up_proj.square().sum((1, 2)) + router.square().sum(1)
    )
    assert torch.allclose(seen["layers.0.expert"], squares.sqrt())


@pytest.mark.parametrize("name", ["obs", "wanda", "flap", "mini-llm", "taylor-second"])
def test_criteria_that_look_at_linears_are_refused(name: str, mixtral: Groups) -> None:
    with pytest.raises(InputError, match="experts, which have no linears"):
        find_criterion(name).check_experts(mixtral, ("attention", "ffn"))
    find_criterion(name).check_experts(mixtral, ("attention", "hidden"))


def test_criteria_that_look_at_adapters_see_channels_of_experts_that_have_some(mixtral: Groups) -> None:
    check_experts(load_recipe("loraprune"), mixtral)
    with pytest.raises(InputError, match="whole experts, of which adapters tell nothing"):
        check_experts(load_recipe("loraprune", {"pruning.kinds": ["ffn", "expert"]}), mixtral)
    for none in ({"lora.expert_rank": 0}, {"lora.targets": ["q_proj"]}):
        with pytest.raises(InputError, match="experts, which have no adapters: set"):
            check_experts(load_recipe("loraprune", none), mixtral)
        check_experts(load_recipe("magnitude", none), mixtral)


@pytest.mark.parametrize("family", ["Qwen3-MoE", "gpt-oss"])
def test_offloaded_experts_compute_the_same_to_the_bit_and_are_cut_on_the_way(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    resident = load_model(str(tmp_path))
    away = [load_offloaded(str(tmp_path), torch.device("cpu"), place) for place in ("cpu", "disk")]
    models = [resident, *away]
    for model in models:
        torch.manual_seed(5)
        groups = with_lora(model)
    elsewhere = {name for name, p in away[0].named_parameters() if isinstance(p, Offloaded)}
    assert {*groups.experts} <= elsewhere
    first = plan_of(groups, thinned(groups, 4, 16 if family == "Qwen3-MoE" else 32))
    narrower = {name: group.keep[:8] for name, group in first.groups.items() if name.endswith("ffn")}
    experts = {f"layers.{n}.expert": first.groups[f"layers.{n}.expert"].keep[1:] for n in range(len(groups.layers))}
    final = first.keeping(narrower | experts)
    evidence = [gather_evidence(m, groups.by_name("layers.1.expert2.ffn"), None, torch.Generator()) for m in models]
    assert all(torch.equal(evidence[0].linears[0].weight, each.linears[0].weight) for each in evidence[1:])
    for before, after in ((Plan.whole(groups), first), (first, final)):
        keep = after.positions_within(before)
        masked = []
        for model in models:
            now = find_groups(model)
            with Gates(model, now.groups, residual=now.residual) as gates:
                for name, units in keep.items():
                    gates.keep(name, units.tolist())
                masked.append(logits_of(model))
            cut(model, now, keep)
        assert all(torch.equal(masked[0], each) for each in masked[1:])
        assert all(torch.equal(logits_of(resident), logits_of(model)) for model in away)
        assert (logits_of(resident) - masked[0]).abs().max() < CLOSE
    assert {name for name, p in away[1].named_parameters() if isinstance(p, Offloaded)} == elsewhere
    for model in models:
        merge_lora(model)
    assert all(torch.equal(logits_of(resident), logits_of(model)) for model in away)


# --- adapters --------------------------------------------------------------------------------------


def adapted_weight(experts: torch.nn.Module, name: str) -> torch.Tensor:
    """`W + s B A` of every expert, by hand, in the shape in which the module keeps W."""
    a, b = (factor.detach() for factor in experts.lora.adapters[name].factors)
    delta = torch.stack([2 * each_b @ each_a for each_a, each_b in zip(a, b, strict=True)])
    weight = experts.get_parameter(name).detach()
    return weight + (delta if delta.shape == weight.shape else delta.transpose(1, 2))


@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss"])
def test_every_expert_computes_with_its_own_adapter(family: str) -> None:
    dense, model = build(family), build(family)
    whole = logits_of(dense)
    with_lora(model, fill=False)
    assert (logits_of(model) - whole).abs().max() < CLOSE, "B is zero at first"
    model = build(family)
    groups = with_lora(model)
    assert model.config._experts_implementation == ADAPTED
    for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            theirs.mlp.experts.get_parameter(name).data = adapted_weight(ours.mlp.experts, name)
    for name, layer in lora_layers(model).items():
        weight = dense.get_submodule(name).weight.data
        weight += layer.get_delta_weight("default")
    expected, got = logits_of(dense), logits_of(model)
    assert (got - expected).abs().max() < CLOSE < (got - whole).abs().max() / 10
    with Gates(model, groups.groups, residual=groups.residual):
        assert torch.equal(got, logits_of(model)), "open gates change no bit"
    with adapters_off(model):
        assert torch.equal(logits_of(model), whole), "and so is every teacher the dense model, to the bit"
    assert torch.equal(logits_of(copy_without_adapters(model, None)), whole)
    assert torch.equal(logits_of(model), got), "the copy has left the model as it was"
    merge_lora(model)
    assert (logits_of(model) - expected).abs().max() < CLOSE
    assert not any(".lora" in name for name, _ in model.named_parameters())
    assert model.config._experts_implementation == dense.config._experts_implementation


def test_what_is_trained_of_experts_is_their_factors_alone() -> None:
    model = build("Mixtral")
    with_lora(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(adapter_names(model))
    inside = {f"{product}.lora_{factor}" for product in ("gate_up_proj", "down_proj") for factor in "AB"}
    assert {
        name.partition(".lora.")[2].removesuffix(".default.weight") for name in trained if ".experts." in name
    } == inside


def test_the_rank_of_an_expert_by_hand(mixtral: Groups) -> None:
    weights = [f"model.layers.{n}.mlp.experts.{name}" for n in range(3) for name in ("down_proj", "gate_up_proj")]
    assert mixtral.experts == dict.fromkeys(weights, 2), "a token goes to two experts"
    assert mixtral.expert_ranks(Lora(rank=9)) == dict.fromkeys(weights, 4)
    assert mixtral.expert_ranks(Lora(rank=1)) == dict.fromkeys(weights, 1)
    assert mixtral.expert_ranks(Lora(expert_rank=3, targets=("down_proj",))) == dict.fromkeys(weights[::2], 3)
    assert mixtral.expert_ranks(Lora(expert_rank=0)) == {}


@pytest.mark.parametrize("family", ["Qwen3-MoE", "gpt-oss"])
def test_adapters_and_what_an_optimizer_holds_for_them_are_cut_with_their_experts(family: str) -> None:
    """Against a model that was cut first, and its adapters after."""
    model = build(family)
    groups = with_lora(model)
    keep = thinned(groups, 3, 8) | {RESIDUAL: np.arange(3, 43)}
    dense = merged(model)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.0, weight_decay=0.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    with Gates(model, groups.groups, residual=groups.residual) as gates:
        for name, units in keep.items():
            gates.keep(name, units.tolist())
        masked = logits_of(model)
    left = cut(model, groups, keep, optimizer)
    assert (logits_of(model) - masked).abs().max() < CLOSE
    for parameter in adapter_parameters(model):
        moment = optimizer.state[parameter]["exp_avg"]
        assert moment.shape == parameter.shape
    assert [group.slices[0].parameter for group in left] == [g.slices[0].parameter for g in find_groups(model)]
    cut(dense, find_groups(dense), keep)
    assert (logits_of(merged(model)) - logits_of(dense)).abs().max() < CLOSE


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with its adapters in its weights."""
    other = copy.deepcopy(model)
    merge_lora(other)
    return other


@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss"])
def test_adapters_tell_of_an_experts_channels_what_a_linear_of_its_own_would(family: str) -> None:
    """LoRAPrune's score (eq. 10), in float64, of the channels of one expert."""
    model = build(family)
    groups = with_lora(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    group = groups.by_name("layers.1.expert2.ffn")
    evidence = gather_evidence(model, group, None, torch.Generator())
    experts = model.model.layers[1].mlp.experts
    total = torch.zeros(group.units, dtype=torch.float64)
    for piece in (s for s in group.slices if not s.is_adapter and s.parameter.endswith("proj")):
        name = piece.parameter.rpartition(".")[2]
        (a, b), (grad_a, grad_b) = (
            [t[2].double() for t in pair]
            for pair in (experts.lora.adapters[name].factors, [f.grad for f in experts.lora.adapters[name].factors])
        )
        weight = adapted_weight(experts, name)[2].double()
        weight = weight if weight.shape == (len(b), a.shape[1]) else weight.T
        product = ((grad_b @ a + b @ grad_a - grad_b @ grad_a) * weight).abs().detach()
        sums = product.sum(0) if piece.is_input else product.sum(1)
        values = sums[torch.from_numpy(piece.index)].sum(1)
        total += values / values.norm()
    assert torch.allclose(find_criterion("lora").score(evidence).double(), total, rtol=1e-4)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss"])
def test_whole_experts_are_seen_with_what_their_adapters_have_done(
    family: str, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRAShear's cosine, in float64, over all that an expert owns; rows in blocks that end within experts."""
    monkeypatch.setattr("regrow.criteria.evidence.ROWS_AT_ONCE", 23)
    model = build(family)
    groups = with_lora(model)
    start = copy_factors(model) if begun else {}
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(0.2 * torch.randn_like(parameter))
    group = groups.by_name("layers.1.expert")
    evidence = gather_evidence(model, group, None, torch.Generator(), start)
    layer = model.model.layers[1].mlp
    router = next(s.parameter for s in group.slices if s.parameter.endswith("weight") and "lora" not in s.parameter)
    squares = model.get_parameter(router).detach().double().square().sum(1)
    moved, shared = torch.zeros(4).double(), torch.zeros(4).double()
    for name in ("gate_up_proj", "down_proj"):
        now = adapted_weight(layer.experts, name).double() - layer.experts.get_parameter(name).detach().double()
        then = torch.zeros_like(now)
        if begun:
            a, b = (factor.double() for factor in start[f"model.layers.1.mlp.experts.lora.{name}"])
            then = 2 * b @ a
            then = then.mT if layer.experts.is_transposed else then
        x, d = layer.experts.get_parameter(name).detach().double() + then, now - then
        squares = squares + x.square().sum((1, 2))
        moved = moved + d.square().sum((1, 2))
        shared = shared + (x * d).sum((1, 2))
    expected = 1 + shared / (squares.sqrt() * moved.sqrt())
    assert torch.allclose(find_criterion("lhspg-cosine").score(evidence).double(), expected, atol=1e-5)


@pytest.mark.parametrize("products", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("up_proj", "down_proj")])
@pytest.mark.parametrize("family", ["Qwen3-MoE", "GLM-4 MoE", "gpt-oss"])
def test_peft_computes_with_experts_adapters_and_they_are_carried_to_the_full_model(
    family: str, products: tuple[str, ...], tmp_path: Path
) -> None:
    whole, small = build(family), build(family)
    groups = find_groups(whole)
    keep = thinned(groups, 3, 8) | {RESIDUAL: np.arange(3, 43)}
    positions = index_map(whole, groups, keep)
    cut(small, groups, keep)
    base, found = copy.deepcopy(small), find_groups(small)
    there = {name.rpartition(".")[2] for name in (*found.linears, *found.experts)}
    lora = Lora(rank=6, alpha=12, dropout=0.0, expert_rank=2, targets=("q_proj", *(p for p in products if p in there)))
    torch.manual_seed(3)
    attach(small, found, lora)
    with torch.no_grad():
        for factor in adapter_parameters(small):
            factor.copy_(0.1 * torch.randn_like(factor))
    expected = logits_of(small)
    trained = {name: p.detach() for name, p in small.named_parameters() if ".lora_" in name}
    adapter = Adapter.of_run(trained, lora, "base", mixture=True)
    adapter.write(tmp_path / "small")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        plain = PeftModel.from_pretrained(base, tmp_path / "small").eval()
    assert (logits_of(plain) - expected).abs().max() < CLOSE
    again = Adapter.read(tmp_path / "small")
    assert again.factors.keys() == adapter.factors.keys()
    assert all(torch.equal(again.factors[key], factor) for key, factor in adapter.factors.items())

    adapter.scatter(positions, whole, "whole").write(tmp_path / "full")
    full = PeftModel.from_pretrained(whole, tmp_path / "full").merge_and_unload()
    with Gates(full, groups.groups, residual=groups.residual) as gates:
        for name, units in keep.items():
            gates.keep(name, units.tolist())
        assert (logits_of(full) - expected).abs().max() < CLOSE
    assert (logits_of(full) - expected).abs().max() > 1e-2


# --- compensation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", ["base", "adapter"])
@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss"])
def test_a_refit_makes_the_best_of_the_tokens_that_come_to_an_expert(
    family: str, carrier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weighted by the router; against moments taken by hand. And the layer is nearer to what it was than merely cut."""
    monkeypatch.setattr("regrow.compensation.moments.GRAMS", 8 * 40**2 * 2)  # two experts at a time
    model = build(family)
    groups = with_lora(model, rank=40, fill=False)
    keep = {n: u for n, u in thinned(groups, 4, 8).items() if n.startswith("layers.0.") and n.endswith(".ffn")}
    experts, seen = model.model.layers[0].mlp.experts, []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    outputs = []
    layer = model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: outputs.append(output))
    whole = copy.deepcopy(experts.down_proj)
    with Gates(model, groups.groups, residual=groups.residual) as gates:
        for chosen in (None, "plain", "refit"):
            gates.open()
            if chosen == "refit":
                settings = Compensation(method="least-squares", selection="criterion", carrier=carrier)
                done = Compensator(model, gates, settings).run(groups, keep, [IDS], Silent())
                assert done.repaired.keys() == keep.keys()
                assert all(share > 0 for share in done.repaired.values())
            for name, units in keep.items() if chosen else ():
                gates.keep(name, units.tolist())
            outputs.clear()
            model(input_ids=IDS)
            outputs[0] = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
            if chosen is None:
                dense = outputs[0]
            elif chosen == "plain":
                plain = (outputs[0] - dense).square().sum()
            else:
                assert (outputs[0] - dense).square().sum() < plain
    handle.remove()
    layer.remove()
    x, index, weight = seen[0]
    for expert in range(4):
        up = x @ (experts.gate_up_proj[expert] if experts.is_transposed else experts.gate_up_proj[expert].T)
        up = up + (experts.gate_up_proj_bias[expert] if experts.has_bias else 0)
        moments = InputMoments.zeros(up.shape[1] // 2)
        moments.add((experts._apply_gate(up) * (weight * (index == expert)).sum(1, keepdim=True)).detach())
        kept = torch.from_numpy(keep[f"layers.0.expert{expert}.ffn"])
        before, after = (w[expert].detach() for w in (whole, experts.down_proj))
        if carrier == "adapter":
            assert torch.equal(before, after)
            a, b = (factor[expert].detach() for factor in experts.lora.adapters["down_proj"].factors)
            after = after + (6 / 40) * (b @ a if not experts.is_transposed else (b @ a).T)
        before, after = (w.T if experts.is_transposed else w for w in (before, after))
        fitted = least_squares(before, moments, kept, Compensation().damping)
        assert (after[:, kept] - fitted).abs().max() < 1e-3 * fitted.abs().max()


def test_experts_without_adapters_are_not_refitted_where_adapters_carry_the_refit(mixtral: Groups) -> None:
    model = build("Mixtral")
    attach(model, mixtral, Lora(expert_rank=0))
    with Gates(model, mixtral.groups) as gates:
        for carrier, treated in (("base", True), ("adapter", False)):
            compensator = Compensator(model, gates, Compensation(method="least-squares", carrier=carrier))
            assert compensator.treats(mixtral.by_name("layers.0.expert1.ffn")) == treated
            assert compensator.treats(mixtral.by_name("layers.0.attention"))


def test_the_default_recipe_refits_experts_and_leaves_what_it_says(
    mixture: Path, tmp_path: Path, text: Path, lean: None
) -> None:
    """From the files alone comes what the run has saved, refitted experts and adapters included."""
    overrides = QUICK | {
        "lora.rank": 4, "search.evaluations": 2, "search.windows": 4, "search.judge_windows": 4,
        "compensation.windows": 4, "pruning.calibration_batches": 2,
    }  # fmt: skip
    result = prune(str(mixture), tmp_path / "out", data=str(text), sparsity=0.3, steps=4, overrides=overrides)
    assert result.results["verification"]["passed"]
    assert 0 < result.results["training"]["compensation"]["repaired"] < 1
    left = load_file(result.folder / "adapters.safetensors")
    assert {name for name in left if name.endswith("experts.down_proj")} == {
        f"model.layers.{n}.mlp.experts.down_proj" for n in range(3)
    }
    again = regrow.apply(str(mixture), tmp_path / "again", run=result.folder)
    ours, theirs = (tensors_of(folder, several=False) for folder in (result.model, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# --- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-MoE with a tokenizer, as it lies on the hub: experts apart."""
    return stored("Qwen3-MoE", tmp_path_factory.mktemp("mixture"), vocab_size=300)


def stored(family: str, scratch: Path, fused: bool = False, **config: object) -> Path:
    """A checkpoint of several files as transformers writes it, experts apart or fused."""
    described = AutoConfig.for_model(**{**zoo.FAMILIES[family]().to_dict(), **config})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(described)
    model.save_pretrained(scratch / "whole", max_shard_size="60KB", save_original_format=not fused)
    make_tokenizer(scratch / "whole")
    return scratch / "whole"


def tensors_of(folder: Path, several: bool = True) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == several
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture
def most_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of tensors read from a model's files that are alive: now, and at most."""
    live, read = [0, 0], StoredTensors.read

    def change(size: int) -> None:
        live[0] += size
        live[1] = max(live)

    def counted(self: StoredTensors, name: str) -> torch.Tensor:
        tensor = read(self, name)
        if self.entries[name].file.parent.name == "whole":
            change(tensor.nbytes)
            weakref.finalize(tensor, change, -tensor.nbytes)
        return tensor

    monkeypatch.setattr(StoredTensors, "read", counted)
    return live


APART = {"Mixtral": "block_sparse_moe.experts.3.w1.weight", "Qwen3-MoE": "mlp.experts.11.gate_proj.weight"}
LAYOUTS = [("Mixtral", False, {}), ("Qwen3-MoE", False, {"num_local_experts": 12}), ("Qwen3-MoE", True, {})]


@pytest.mark.parametrize(("family", "fused", "config"), LAYOUTS)
def test_applied_on_disk_is_cut_in_memory(
    family: str, fused: bool, config: dict[str, int], tmp_path: Path, most_read: list[int]
) -> None:
    source = stored(family, tmp_path, fused, **config)
    expert = "mlp.experts.gate_up_proj" if fused else APART[family]
    assert f"model.layers.2.{expert}" in tensors_of(source)

    def keep_of(groups: Groups) -> dict[str, np.ndarray]:
        heads = {group.name: np.array([group.layer, 3]) for group in groups if group.kind == "attention"}
        return thinned(groups, 3, 8, seed=1) | heads

    model = in_memory(source, tmp_path, keep_of, refit=True)
    whole = AutoModelForCausalLM.from_pretrained(source)
    folder = streamed(source, tmp_path)
    applied, expected = tensors_of(folder), tensors_of(tmp_path / "memory")
    assert applied.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in applied.items())
    assert most_read == [0, max(parameter.nbytes for parameter in whole.parameters())]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: (folder / file).is_file() for name, file in index.items()} == dict.fromkeys(applied, True)

    reloaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert (type(reloaded).__name__, len(reloaded.model.layers[0].mlp.experts.down_proj)) == (type(model).__name__, 3)
    assert torch.equal(logits_of(reloaded.eval()), logits_of(model.eval()))


def test_experts_on_disk_that_make_no_whole_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stored("Mixtral", tmp_path)
    whole = tensors_of(source)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    path = "model.layers.1.block_sparse_moe.experts"

    def refused(match: str, change: dict[str, torch.Tensor | None] | None = None) -> None:
        changed = whole | (change or {})
        save_file({name: t for name, t in changed.items() if t is not None}, source / "model.safetensors")
        with pytest.raises(InputError, match=match):
            Source(str(source), source)

    refused(r"experts\.down_proj is \[3, 64, 40\] on disk, not \[4, 64, 40\]", {f"{path}.2.w2.weight": None})
    refused(
        r"experts\.0\.w1\.weight on disk cannot become model.*gate_up_proj by itself \(MergeModulelist, Concatenate: S",
        {f"{path}.2.w1.weight": None},
    )
    refused(
        "both .*mlp.experts.down_proj on disk are model.layers.1.mlp.experts.down_proj",
        {"model.layers.1.mlp.experts.down_proj": torch.zeros(4, 64, 40)},
    )
    refused(r"experts\.1\.w2\.weight is stored as I8", {f"{path}.1.w2.weight": torch.zeros(64, 40).char()})
    refused("experts.1.w4.weight on disk has no counterpart", {f"{path}.1.w4.weight": torch.zeros(1)})

    def split_heads(model: PreTrainedModel) -> list[WeightConverter]:
        targets = ["self_attn.k_proj", "self_attn.v_proj"]
        return [*get_model_conversion_mapping(model), WeightConverter("self_attn.kv_proj", targets, [Chunk(0)])]

    monkeypatch.setattr("regrow.checkpoint.source.get_model_conversion_mapping", split_heads)
    for number in range(3):
        k, v = (f"model.layers.{number}.self_attn.{which}_proj.weight" for which in "kv")
        whole[k.replace("k_proj", "kv_proj")] = torch.cat([whole.pop(k), whole.pop(v)])
    refused(r"kv_proj\.weight on disk cannot become .*k_proj\.weight by itself \(Chunk\); save the model anew")


def test_a_mixture_goes_through_the_whole_walk(mixture: Path, tmp_path: Path, text: Path, lean: None) -> None:
    overrides = QUICK | {
        "training.steps": 4, "pruning.schedule": "cubic", "pruning.kinds": ["attention", "ffn", "expert", "hidden"],
        "pruning.criterion": "gate-fisher", "pruning.sparsity": 0.4, "compensation.method": "none",
        "output.keep_adapter": True,
    }  # fmt: skip
    result = prune(str(mixture), tmp_path / "out", "loraprune", data=str(text), overrides=overrides)
    assert result.plan.sparsity.block >= 0.4
    model = AutoModelForCausalLM.from_pretrained(result.model)
    whole = result.plan.total_parameters - result.plan.removed_parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == whole
    assert (logits_of(on_base(result.folder)) - logits_of(model)).abs().max() < 1e-5
    config, widths = model.config, result.results["widths"]
    assert 2 <= config.num_experts == widths["layers.0.expert"]
    assert config.moe_intermediate_size == max(widths[f"layers.0.expert{n}.ffn"] for n in range(4))
    assert config.moe_intermediate_size % 8 == 0
    assert config.hidden_size == widths[RESIDUAL] < 64
    assert "| layer | attention | expert | ffn (experts) |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("recipe", ["loraprune", "lorashear"])
def test_a_mixture_whose_weights_lie_elsewhere_comes_to_the_same(
    recipe: str, mixture: Path, tmp_path: Path, text: Path, lean: None
) -> None:
    """By criteria that look at the adapters of experts, trained ones included."""
    overrides = QUICK | {
        "training.steps": 4, "pruning.sparsity": 0.3, "training.gradient_checkpointing": True, "pruning.warm_up": 0.25,
        "analysis.enabled": False, "pruning.allocation": "local", "evaluation.memory": False,
    }  # fmt: skip
    results = [
        prune(str(mixture), tmp_path / place, recipe, data=str(text), overrides=overrides | {"training.offload": place})
        for place in ("none", "disk")
    ]
    assert results[0].plan == results[1].plan
    assert results[0].plan.sparsity.block >= 0.3
    ours, theirs = (tensors_of(result.model, several=False) for result in results)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    adapters = load_file(results[0].folder / "adapters.safetensors")
    moved = [name for name, factor in adapters.items() if ".experts." in name and "lora_B" in name and factor.any()]
    assert len(moved) == 2 * 3, "both products of every layer have learned"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_mixture_is_pruned_on_a_quantised_base(kind: str, mixture: Path, tmp_path: Path, text: Path) -> None:
    """Its linears are; experts are as they were. It ends on the original weights."""
    pytest.importorskip("bitsandbytes")
    overrides = QUICK | {
        "training.steps": 4, "pruning.kinds": ["attention", "ffn", "expert"], "pruning.sparsity": 0.4,
        "training.quantization": kind, "training.original_share": 0.5, "evaluation.memory": False,
    }  # fmt: skip
    result = prune(str(mixture), tmp_path / "out", "magnitude", data=str(text), overrides=overrides)
    assert any(name.endswith(".expert") and len(part.keep) < part.units for name, part in result.plan.groups.items())
    assert result.results["verification"]["passed"]
    model = AutoModelForCausalLM.from_pretrained(result.model)
    whole = result.plan.total_parameters - result.plan.removed_parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == whole


def test_an_uneven_mixture_and_its_kept_adapter_compute_with_the_stock_kernels(
    tmp_path: Path, text: Path, lean: None
) -> None:
    model = stored("Mixtral", tmp_path, vocab_size=300)
    settings = {**QUICK, "output.keep_adapter": True, "pruning.shape": "free", "pruning.protect_first": 0.3}
    result = prune(str(model), tmp_path / "out", "magnitude", data=str(text), steps=4, sparsity=0.3, overrides=settings)
    assert needs_remote_code(result.model), "else nothing is uneven"
    merged = AutoModelForCausalLM.from_pretrained(result.model, trust_remote_code=True).eval()
    base = AutoModelForCausalLM.from_pretrained(result.folder / "base", trust_remote_code=True).eval()
    whole = AutoModelForCausalLM.from_pretrained(model)
    assert merged.config._experts_implementation == whole.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        wanted, without = (each(input_ids=IDS, use_cache=False).logits for each in (merged, base))
        kept = PeftModel.from_pretrained(base, result.folder / "adapter").eval()
        assert (kept(input_ids=IDS, use_cache=False).logits - wanted).abs().max() < 1e-4
    assert (without - wanted).abs().max() > 1e-3


def test_one_key_for_two_widths_and_dense_layers_beside_those_of_experts(
    tmp_path: Path, text: Path, lean: None
) -> None:
    """The experts' channels and the shared expert's go together, and the dense layer stays, in the uniform shape."""
    model = stored("GLM-4 MoE", tmp_path, vocab_size=300)
    groups = prunable_groups(AutoModelForCausalLM.from_pretrained(model))
    offered = {(g.layer, g.kind, g.expert in (None, 0)): g.widths for g in groups if g.kind.startswith("ffn")}
    assert offered[0, "ffn", True] == (40,)
    assert offered[1, "ffn", True] == offered[1, "ffn2", True] == (8, 16)
    with pytest.raises(InputError, match="cannot have widths of their own"):
        check_free(AutoConfig.from_pretrained(model), find_groups(AutoModelForCausalLM.from_pretrained(model)))
    overrides = {**QUICK, "output.keep_adapter": True}
    result = prune(
        str(model), tmp_path / "out", "magnitude", data=str(text), steps=2, sparsity=0.3, overrides=overrides
    )
    left = {name: len(part.keep) for name, part in result.plan.groups.items()}
    assert left["layers.0.ffn"] == 40
    assert {n for name, n in left.items() if ".ffn" in name and "layers.0." not in name} == {8}
    assert result.plan.sparsity.block >= 0.3
    config = AutoConfig.from_pretrained(result.model)
    assert (config.intermediate_size, config.moe_intermediate_size) == (40, 8)
    merged = AutoModelForCausalLM.from_pretrained(result.model)
    assert (logits_of(on_base(result.folder)) - logits_of(merged)).abs().max() < 1e-5, "no linear is left out"
