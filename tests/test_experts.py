"""Mixtures of experts: channels inside experts and whole experts, from the gates to the checkpoint."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import QUICK, make_tokenizer, plan_of
from safetensors.torch import load_file, save_file
from test_stream import in_memory, on_base, streamed
from test_structure import embedding_gradient, gated_gradient, recorded, summed_losses
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter
from zoo import CLOSE, build, logits_of

from regrow.checkpoint.source import Source
from regrow.checkpoint.stock import prunable_groups
from regrow.checkpoint.tensors import StoredTensors
from regrow.criteria.registry import find_criterion
from regrow.errors import InputError
from regrow.planning.allocation import choose
from regrow.planning.experts import expert_choices, expert_price, fold, unfold
from regrow.planning.plan import Plan
from regrow.preflight import check_experts
from regrow.recipe import load_recipe
from regrow.recovery.scoring import gather_evidence
from regrow.report.graph import draw_graph
from regrow.run import prune
from regrow.settings import Pruning
from regrow.structure.cut import cut
from regrow.structure.gates import Gates
from regrow.structure.graph import layer_graph
from regrow.structure.groups import RESIDUAL, Groups, find_groups
from regrow.structure.residual import block_cost

IDS = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(7))


def thinned(groups: Groups, experts: int, channels: int, seed: int = 0) -> dict[str, np.ndarray]:
    """So many experts in every layer, and so many channels in each, which ones at random; everything else."""
    chance = np.random.default_rng(seed)
    keep: dict[str, np.ndarray] = {}
    for group in groups:
        count = experts if group.kind == "expert" else group.units
        if group.expert is not None:
            count = channels if group.expert in keep[f"layers.{group.layer}.expert"] else 0
        keep[group.name] = np.sort(chance.choice(group.units, count, replace=False))
    return keep


CASES = {"channels": (4, 8), "experts": (3, 16), "all": (2, 8)}


@pytest.mark.parametrize(
    ("family", "case"),
    [("Mixtral", "channels"), ("OLMoE", "experts"), ("Mixtral", "all"), ("Qwen3-MoE", "all"), ("gpt-oss", "all")],
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
    """Counted, their share rounded; else one more in every layer until they bring enough. Two of four have to stay."""
    nothing = {group.name: 0 for group in mixtral}

    def offered(wanted: int, **settings: object) -> list[set[int]]:
        pruning = Pruning(kinds=("expert", "ffn"), **settings)
        return [set(each.values()) for each in expert_choices(mixtral, nothing, pruning, frozenset(), wanted)]

    for sparsity, count in ((0.1, 0), (0.3, 1), (0.4, 2), (0.5, 2), (0.9, 2)):
        assert offered(10**9, basis="units", sparsity=sparsity) == [{count}]
    one = len(mixtral.layers) * expert_price(mixtral, 0)
    assert [len(offered(wanted)) - 1 for wanted in (0, 1, one, one + 1, 9 * one)] == [0, 1, 1, 2, 2]
    assert offered(9 * one) == [{0}, {1}, {2}]
    assert expert_price(mixtral, 0) == mixtral.residual.units * (1 + 3 * mixtral.by_name("layers.0.expert0.ffn").units)
    assert offered(9 * one, cap=0.3) == [{0}, {1}]
    assert offered(9 * one, floor=0.6) == [{0}, {1}]


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


@pytest.mark.parametrize("name", ["lora", "obs", "wanda", "flap", "mini-llm", "taylor-second"])
def test_criteria_that_look_at_adapters_or_linears_are_refused(name: str, mixtral: Groups) -> None:
    with pytest.raises(InputError, match="experts"):
        find_criterion(name).check_experts(mixtral, ("attention", "ffn"))
    find_criterion(name).check_experts(mixtral, ("attention", "hidden"))


def test_offloaded_experts_are_refused(mixtral: Groups) -> None:
    offloaded = {"training.offload": "disk"}
    with pytest.raises(InputError, match="offload=disk does not go with pruning experts"):
        check_experts(load_recipe("magnitude", offloaded), mixtral)
    check_experts(load_recipe("magnitude", offloaded | {"pruning.kinds": ["attention"]}), mixtral)


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


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
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
