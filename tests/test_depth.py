"""Whole layers as units: closed ≡ removed, plans that mix depth and width, and ShortGPT's score."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import QUICK, SIZES, build, logits, random_keep, uniform_keep, with_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_checkpoint import IDS, save
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    OpenAIGPTConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    SmolLM3Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo_families import FOUR

import regrow
from regrow.checkpoint.shape import describe
from regrow.checkpoint.stock import check_fewer_layers
from regrow.checkpoint.verify import verify_checkpoint
from regrow.criteria.depth import block_influence
from regrow.criteria.evidence import Evidence
from regrow.criteria.registry import find_criterion
from regrow.data.tokens import Batch
from regrow.errors import InputError
from regrow.evaluation.compare import plan_as_gates
from regrow.planning.allocation import choose, final_counts, lose, uniform_candidates
from regrow.planning.depth import layer_choices
from regrow.planning.plan import Plan
from regrow.planning.schedule import cut_events
from regrow.recipe import load_recipe
from regrow.recovery.learner import Learner
from regrow.recovery.losses import language_loss
from regrow.recovery.pruner import Pruner
from regrow.recovery.scoring import Scorer
from regrow.settings import Pruning
from regrow.structure.adapters import merge_lora
from regrow.structure.cut import cut
from regrow.structure.depth import check_depth
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups
from regrow.structure.per_layer import rearrange
from regrow.structure.similarity import Cosines, watching_layers

CLOSE = 1e-4
LAYERS = 4
GONE = [(1,), (0, 2), (3,)]


@pytest.fixture(autouse=True)
def _deep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "num_hidden_layers", LAYERS)


def mixed_plan(groups: Groups, seed: int, gone: tuple[int, ...], keep=random_keep) -> Plan:
    """Random widths in the layers that stay."""
    chosen = {name: units.tolist() for name, units in keep(groups, seed).items()}
    return Plan.whole(groups).keeping(chosen, gone)


def apply(model: PreTrainedModel, groups: Groups, plan: Plan, optimizer=None) -> Groups:
    return cut(model, groups, plan.positions_within(Plan.whole(groups)), optimizer)


# --- structure --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_closed_layers_are_removed_layers(family: str, seed: int) -> None:
    model = build(family, seed)
    groups = with_lora(model)
    plan = mixed_plan(groups, seed, GONE[seed])
    whole = logits(model)
    with plan_as_gates(model, groups, plan):
        masked = logits(model)
    left = apply(model, groups, plan)
    assert (masked - logits(model)).abs().max() < CLOSE
    assert (masked - whole).abs().max() > 1e-2, "a mask that changes nothing proves nothing"

    base = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    total = sum(p.numel() for p in base.values())
    linears = sum(p.numel() for name, p in base.items() if ".layers." in name and "norm" not in name)
    assert total == left.total_parameters == groups.total_parameters - plan.removed_parameters
    assert linears == left.block_parameters == groups.block_parameters - plan.removed_block_parameters
    assert plan.sparsity.total == (groups.total_parameters - total) / groups.total_parameters
    assert plan.sparsity.block == (groups.block_parameters - linears) / groups.block_parameters


def test_closed_layers_that_give_lists_are_removed_layers() -> None:
    model = AutoModelForCausalLM.from_config(
        OpenAIGPTConfig(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    ).eval()
    groups = find_groups(model)
    plan = Plan.whole(groups).keeping({}, [1])
    seen: list[str] = []
    with plan_as_gates(model, groups, plan), watching_layers(model, groups.layers, lambda unit, _: seen.append(unit)):
        masked = logits(model)
    assert seen == [layer.unit for layer in groups.layers]
    apply(model, groups, plan)
    assert (masked - logits(model)).abs().max() < CLOSE


def test_groups_after_layers_went_are_what_tracing_finds(family: str) -> None:
    model = build(family)
    groups = with_lora(model)
    left = apply(model, groups, mixed_plan(groups, 2, (0, 2)))
    traced = find_groups(model)
    assert [layer.number for layer in left.layers] == [1, 3]
    assert [replace(layer, number=n) for n, layer in enumerate(left.layers)] == list(traced.layers)
    assert left.linears == traced.linears
    for ours, theirs in zip(left, traced, strict=True):
        assert ours.name == theirs.name.replace(f".{theirs.layer}.", f".{[1, 3][theirs.layer]}.")
        assert (ours.units, ours.cost) == (theirs.units, theirs.cost)
        assert {(s.parameter, s.axis): s.index.tolist() for s in ours.slices} == {
            (s.parameter, s.axis): s.index.tolist() for s in theirs.slices
        }


def test_layers_first_then_widths_is_both_at_once(family: str) -> None:
    once, twice = build(family), build(family)
    groups = find_groups(once)
    final = mixed_plan(groups, 3, (0, 2))
    first = Plan.whole(groups).keeping({}, [2])
    apply(once, groups, final)
    left = apply(twice, find_groups(twice), first)
    cut(twice, left, final.positions_within(first))
    assert torch.equal(logits(once), logits(twice))


def test_a_cache_speaks_of_the_layers_that_are_left(family: str) -> None:
    model = build(family)
    groups = find_groups(model)
    apply(model, groups, mixed_plan(groups, 1, (0, 2)))
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    grown = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    whole = model(input_ids=grown.sequences, use_cache=False).logits[0, -6:-1]
    assert (torch.cat(grown.logits) - whole).abs().max() < CLOSE


def test_open_layers_change_no_bit(family: str) -> None:
    model = build(family)
    groups = with_lora(model)
    before = logits(model)
    with Gates(model, groups.groups, groups.layers) as gates:
        assert torch.equal(before, logits(model))
        with gates.recording(1.0, lambda name, c: None):
            model.eval()
            ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(1))
            assert torch.equal(before, model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("gate", [1.0, 0.6])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layers_gate_gradient_is_autograds(gate: float, checkpointing: bool) -> None:
    model = build("llama-biases")
    groups = with_lora(model)
    model.double().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    got: dict[str, torch.Tensor] = {}
    with Gates(model, groups.groups, groups.layers) as gates:
        gates.set("layers.2", torch.tensor([gate]))
        with gates.recording(IDS[:, 1:].numel(), lambda name, c: got.update({name: c})):
            language_loss(model(input_ids=IDS, use_cache=False).logits, IDS).backward()

    g_BL = torch.ones(len(IDS), LAYERS, dtype=torch.float64)
    g_BL[:, 2] = gate
    g_BL.requires_grad_(True)
    handles = [
        layer.register_forward_hook(lambda _, x, y, n=n: x[0] + g_BL[:, n, None, None] * (y - x[0]))
        for n, layer in enumerate(model.model.layers)
    ]
    (language_loss(model(input_ids=IDS, use_cache=False).logits, IDS) * IDS[:, 1:].numel()).backward()
    for handle in handles:
        handle.remove()
    expected = g_BL.grad
    assert expected is not None
    for number in range(LAYERS):
        torch.testing.assert_close(got[f"layers.{number}"][:, 0].double(), expected[:, number], rtol=1e-4, atol=1e-5)


def test_the_optimizer_forgets_what_is_gone_and_nothing_else() -> None:
    model = build("llama-gqa")
    groups = with_lora(model, fill=False)
    generator = torch.Generator().manual_seed(0)
    batches = iter(lambda: Batch(torch.randint(0, 64, (3, 10), generator=generator)), None)
    recipe = load_recipe("regrow", {"pruning.kinds": ["layer"], "training.steps": 20, "training.learning_rate": 1e-3})
    learner = Learner(model, recipe.training, batches)
    with Pruner(model, groups, recipe, learner, batches) as pruner:
        for _ in range(3):
            learner.step()
        before = {
            name: {key: value.clone() for key, value in learner.optimizer.state[p].items()}
            for name, p in model.named_parameters()
            if ".lora_" in name
        }
        pruner.plan = Plan.whole(groups).keeping({}, [1])
        pruner.finish()
        names = [name for name, _ in model.named_parameters() if ".lora_" in name]
        assert len(names) == len(before) * 3 // 4
        assert [id(p) for p in learner.parameters] == [id(p) for p in learner.optimizer.param_groups[0]["params"]]
        assert len(learner.optimizer.state) == len(names)
        for name, parameter in zip(names, learner.parameters, strict=True):
            number = int(name.split(".")[2])
            origin = name.replace(f"layers.{number}.", f"layers.{number + (number > 0)}.")
            for key, value in learner.optimizer.state[parameter].items():
                assert torch.equal(value, before[origin][key])
        assert not learner.step().skipped
        learner.restore(learner.snapshot())


def test_lists_per_layer_follow_and_a_reload_computes_the_same() -> None:
    rope = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_attention_heads": 6, "num_key_value_heads": 3}
    sizes = SIZES | {"num_hidden_layers": 6, "head_dim": 8} | rope
    for config in (
        SmolLM3Config(**sizes, no_rope_layer_interval=2),
        Gemma3TextConfig(**sizes, sliding_window=4, sliding_window_pattern=3, query_pre_attn_scalar=8),
    ):
        check_depth(config)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.15 * torch.randn_like(parameter))
        kinds = list(config.layer_types)
        groups = find_groups(model)
        plan = Plan.whole(groups).keeping({}, [1, 3])
        with plan_as_gates(model, groups, plan):
            masked = logits(model)
        apply(model, groups, plan)
        assert model.config.layer_types == [kinds[number] for number in (0, 2, 4, 5)]
        assert (masked - logits(model)).abs().max() < CLOSE
        again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config.to_dict()))
        again.load_state_dict(model.state_dict())
        assert torch.equal(logits(model), logits(again))


def test_a_model_whose_layers_depend_on_their_numbers_is_refused() -> None:
    with pytest.raises(InputError, match="decoder_sparse_step = 2"):
        check_depth(Qwen2MoeConfig(num_hidden_layers=4, decoder_sparse_step=2))
    check_depth(Qwen2MoeConfig(num_hidden_layers=4, decoder_sparse_step=1))  # every layer alike


def test_a_list_of_one_entry_per_layer_says_itself_what_each_is() -> None:
    config = LlamaConfig(num_hidden_layers=4)
    config.layer_pattern = ["a", "b", "a", "b"]
    check_depth(config)
    config.layer_pattern = ["a", "b"]  # in turns
    with pytest.raises(InputError, match="layer_pattern"):
        check_depth(config)


def test_a_class_that_makes_other_layers_under_other_numbers_is_refused() -> None:
    """Bamba's attention is at numbers of its own, DiffLlama computes with a layer's number."""
    with pytest.raises(InputError, match=r"'bamba' model depend on their numbers \(self_attn.q_proj.weight would be"):
        check_fewer_layers(zoo.FAMILIES["Bamba"]())
    with pytest.raises(InputError, match=r"depend on their numbers \(lambda_init of self_attn does\): none can"):
        check_fewer_layers(zoo.FAMILIES["DiffLlama"]())
    check_fewer_layers(zoo.FAMILIES["Llama"]())
    check_fewer_layers(LlamaConfig(num_hidden_layers=1))
    check_fewer_layers(LlamaConfig(num_hidden_layers=2, hidden_act="none"))  # no stock class builds it: nobody to ask


@pytest.mark.skipif("dory" not in CONFIG_MAPPING, reason="transformers has had Dory since 5.24")
def test_fewer_layers_are_asked_of_a_config_as_it_is_read_again() -> None:
    """Dory writes twice as many layers as it has, and parts that have to add up to them."""
    config = CONFIG_MAPPING["dory"](**FOUR, head_dim=12, n_input_layers=1, n_output_layers=1)
    with pytest.raises(InputError, match=r"depend on their numbers \(n_input_layers .* must equal num_hidden_layers\)"):
        check_fewer_layers(config)


def test_layers_before_those_of_experts_are_counted_anew() -> None:
    config = zoo.FAMILIES["DeepSeek-V3"]()
    check_fewer_layers(config)
    config.first_k_dense_replace = 2
    rearrange(config, [1, 2])
    assert (config.first_k_dense_replace, config.num_hidden_layers) == (1, 2)
    rearrange(config, [1])
    assert config.first_k_dense_replace == 0


# --- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shape"),
    [("llama-gqa", "uniform"), ("qwen2", "uniform"), ("qwen3-tied", "free"), ("llama-mha-tied", "free")],
)
def test_a_fresh_process_computes_the_same_without_the_layers(family: str, shape: str, tmp_path: Path) -> None:
    model = build(family)
    whole = find_groups(model)
    groups = with_lora(model)
    keep = random_keep if shape == "free" else lambda groups, seed: uniform_keep(groups, 1, 17, seed)
    left = apply(model, groups, mixed_plan(groups, 4, (0, 2), keep))
    merge_lora(model)
    describe(model, whole, left)
    folder = save(model, tmp_path / "model")
    verification = verify_checkpoint(model, folder, IDS)
    assert verification.passed
    assert not verification.regrow_imported
    assert (verification.model_class == "UnevenForCausalLM") == (shape == "free")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert set(config.get("per_layer_config", {})) == ({"0", "1"} if shape == "free" else set())


# --- plans ------------------------------------------------------------------------------------


GROUPS: dict[str, Groups] = {}


def groups_of(family: str) -> Groups:
    if family not in GROUPS:
        GROUPS[family] = find_groups(build(family))
    assert len(GROUPS[family].layers) == LAYERS
    return GROUPS[family]


@pytest.fixture
def groups() -> Groups:
    return groups_of("llama-gqa")


def scores_of(groups: Groups, seed: int, layers: float | None = None) -> dict[str, torch.Tensor]:
    """Random scores; of layers about `layers` times the sum of their units' scores, or none."""
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(group.units, generator=generator) for group in groups}
    if layers is not None:
        for layer in groups.layers:
            within = sum(float(scores[g.name].sum()) for g in groups if g.layer == layer.number)
            scores[layer.unit] = layers * within * (0.5 + torch.rand(1, generator=generator))
    return scores


def removed(plan: Plan, basis: str) -> int:
    return plan.removed_block_parameters if basis == "block" else plan.removed_parameters


ALL = ("attention", "ffn", "layer")


@settings(max_examples=60)
@given(
    sparsity=st.floats(0.05, 0.85),
    shape=st.sampled_from(["uniform", "free"]),
    allocation=st.sampled_from(["local", "global"]),
    basis=st.sampled_from(["block", "total"]),
    layers=st.sampled_from([None, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 100),
)
def test_the_target_is_reached_to_one_step(sparsity, shape, allocation, basis, layers, seed) -> None:
    groups = GROUPS.get("llama-gqa") or groups_of("llama-gqa")
    pruning = Pruning(sparsity=sparsity, shape=shape, allocation=allocation, basis=basis, kinds=ALL)
    try:
        plan = choose(groups, Plan.whole(groups), scores_of(groups, seed, layers), pruning)
    except InputError as error:
        assert "1 of 4 layers" in str(error)  # noqa: PT017
        return
    size = groups.block_parameters if basis == "block" else groups.total_parameters
    surplus = removed(plan, basis) - sparsity * size
    staying = LAYERS - len(plan.removed_layers)
    assert -1e-6 <= surplus < groups.by_name("layers.0.ffn").cost * (staying if shape == "uniform" else 1)
    widths = {(name.split(".")[2], len(group.keep)) for name, group in plan.groups.items() if group.keep}
    assert shape == "free" or len(widths) == 2


def test_a_worthless_layer_goes_and_a_precious_one_stays(groups: Groups) -> None:
    for shape in ("free", "uniform"):
        pruning = Pruning(sparsity=0.4, shape=shape, allocation="global", kinds=ALL)
        scores = scores_of(groups, 0, layers=10.0)
        assert choose(groups, Plan.whole(groups), scores, pruning).removed_layers == ()
        scores["layers.2"] = torch.tensor([1e-3])
        plan = choose(groups, Plan.whole(groups), scores, pruning)
        assert plan.removed_layers == (2,)
        assert all(plan.groups[f"layers.2.{kind}"].keep == () for kind in ("attention", "ffn"))
        protected = pruning.model_copy(update={"protect_last": 2})
        assert 2 not in choose(groups, Plan.whole(groups), scores, protected).removed_layers


def test_without_scores_of_layers_their_units_scores_add_up(groups: Groups) -> None:
    scores = scores_of(groups, 0)
    for name in ("layers.1.attention", "layers.1.ffn"):
        scores[name] *= 0.1
    plan = choose(groups, Plan.whole(groups), scores, Pruning(sparsity=0.25, kinds=("layer",)))
    assert plan.removed_layers == (1,)
    assert plan.sparsity.block == 0.25


def test_layers_alone_reach_the_target_with_the_fewest(groups: Groups) -> None:
    scores = {group.name: torch.zeros(group.units) for group in groups}
    scores |= {f"layers.{n}": torch.tensor([score]) for n, score in enumerate((0.4, 0.1, 0.3, 0.2))}
    for basis in ("block", "units"):
        for sparsity, gone in ((0.2, (1,)), (0.25, (1,)), (0.26, (1, 3)), (0.7, (1, 2, 3))):
            pruning = Pruning(sparsity=sparsity, kinds=("layer",), basis=basis)
            plan = choose(groups, Plan.whole(groups), scores, pruning)
            assert plan.removed_layers == gone
            assert plan.sparsity.block == len(gone) / 4
        with pytest.raises(InputError, match=r"only 1 of 4 layers, 0\.750 is removed; use at most 0\.75"):
            choose(groups, Plan.whole(groups), scores, Pruning(sparsity=0.8, kinds=("layer",), basis=basis))


@pytest.mark.parametrize("shape", ["uniform", "free"])
@pytest.mark.parametrize("sparsity", [0.2, 0.4, 0.5])
def test_by_count_every_kind_loses_its_share(shape: str, sparsity: float) -> None:
    groups = groups_of("llama-mha-tied")
    pruning = Pruning(sparsity=sparsity, shape=shape, basis="units", kinds=ALL)
    plan = choose(groups, Plan.whole(groups), scores_of(groups, 0), pruning)
    assert len(plan.removed_layers) == int(sparsity * LAYERS)
    for kind, units in (("attention", 24), ("ffn", 160)):
        lost = sum(g.units - len(g.keep) for name, g in plan.groups.items() if name.endswith(kind))
        assert 0 <= lost - round(sparsity * units) < (LAYERS if shape == "uniform" else 1)


def test_one_kind_alone_may_go(groups: Groups) -> None:
    plan = choose(groups, Plan.whole(groups), scores_of(groups, 0), Pruning(sparsity=0.3, kinds=("ffn",)))
    assert plan.sparsity.block >= 0.3
    assert all(len(g.keep) == 3 for name, g in plan.groups.items() if name.endswith("attention"))


def test_uniform_candidates_are_all_the_ways_and_the_best_is_chosen(groups: Groups) -> None:
    whole = Plan.whole(groups)
    pruning = Pruning(sparsity=0.5, kinds=ALL, allocation="global")
    nothing = {group.name: 0 for group in groups}
    for layers in (None, 0.3, 0.8):
        scores = scores_of(groups, 1, layers)
        found = uniform_candidates(groups, nothing, scores, pruning)
        assert {len(candidate.layers) for candidate in found} == {0, 1, 2}
        assert len({tuple(candidate.counts.values()) for candidate in found}) == len(found)
        target = 0.5 * groups.block_parameters
        for candidate in found:
            plan = lose(groups, whole, candidate.counts, scores, pruning)
            staying = LAYERS - len(candidate.layers)
            assert plan.removed_layers == candidate.layers
            assert 0 <= plan.removed_block_parameters - target < 144 * staying
            gone = sum(
                float(scores[name].sum()) - float(scores[name][list(group.keep)].sum())
                for name, group in plan.groups.items()
                if layers is None or group.keep
            )
            if layers is not None:
                gone += sum(float(scores[f"layers.{number}"]) for number in candidate.layers)
            assert candidate.damage == pytest.approx(gone, rel=1e-5)
        best = min(found, key=lambda candidate: candidate.damage)
        assert final_counts(groups, nothing, scores, pruning) == best.counts


@pytest.mark.parametrize("shape", ["uniform", "free"])
def test_on_the_way_no_layer_comes_back(groups: Groups, shape: str) -> None:
    pruning = Pruning(sparsity=0.8, shape=shape, allocation="global", schedule="cubic", kinds=ALL)
    plan, seen = Plan.whole(groups), []
    for number, fraction in enumerate(cut_events(pruning, 100).values()):
        following = choose(groups, plan, scores_of(groups, number, layers=0.02), pruning, fraction)
        assert set(plan.removed_layers) <= set(following.removed_layers)
        for name, group in following.groups.items():
            assert set(group.keep) <= set(plan.groups[name].keep)
        following.positions_within(plan)
        plan = following
        seen.append(len(plan.removed_layers))
    assert seen[0] < seen[-1] == 3
    assert plan.sparsity.block >= 0.8


def test_plans_from_before_layers_could_go_are_read(groups: Groups) -> None:
    document = Plan.whole(groups).to_json()
    del document["layers"], document["removed_layers"]
    old = Plan.parse(json.dumps(document))
    assert old.groups == Plan.whole(groups).groups
    plan = mixed_plan(groups, 0, (0, 2))
    assert Plan.parse(json.dumps(plan.to_json())) == plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"removed_layers": [1, 0]}, "ascending"),
        ({"removed_layers": [4]}, "some of the 4 layers"),
        ({"removed_layers": [0, 1, 2, 3]}, "at least one must stay"),
        ({"removed_layers": [1]}, r"groups\.layers\.1\.attention: keep must name none"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(groups: Groups, change: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Plan.parse(json.dumps(Plan.whole(groups).to_json() | change))


@pytest.mark.parametrize("basis", ["block", "total"])
@pytest.mark.parametrize("sparsity", [0.24, 0.49])
def test_layers_are_offered_until_they_reach_the_target_by_themselves(
    groups: Groups, basis: str, sparsity: float
) -> None:
    """Least damaging first, each set one larger than the last."""
    damage = {f"layers.{number}": torch.tensor([value]) for number, value in enumerate((3.0, 1.0, 4.0, 2.0))}
    pruning = Pruning(kinds=("layer", "ffn"), basis=basis, sparsity=sparsity, protect_first=0.0, protect_last=0)
    found = list(layer_choices(groups, {group.name: 0 for group in groups}, damage, pruning))
    one, whole = groups.layers[0].block_parameters, groups.block_parameters
    if basis == "total":
        one, whole = groups.layers[0].parameters, groups.total_parameters
    wanted = math.ceil(sparsity * whole / one)
    assert wanted == math.ceil(4 * sparsity) + (basis == "total"), "embeddings are a layer more"
    assert found == [frozenset([1, 3, 0][:count]) for count in range(wanted + 1)]


# --- scores -----------------------------------------------------------------------------------


def test_a_mean_of_cosines_by_hand() -> None:
    """Of tokens, not of batches; a batch that is not finite counts for nothing."""
    cosines = Cosines()
    assert cosines.mean == 0
    cosines.add(torch.tensor([[0.5]]))
    assert cosines.mean == 0.5
    cosines.add(torch.tensor([[0.5, float("nan")]]))
    cosines.add(torch.tensor([[1.0, -1.0], [0.25, 0.0]]))
    assert (cosines.mean, cosines.tokens) == (0.15, 5)


# cos((3, 4), (4, 3)) = 24/25; cos((1, 0), (0, 2)) = 0  ->  BI = 1 - 12/25
def test_block_influence_by_hand() -> None:
    cosine = torch.cosine_similarity(
        torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64),
        torch.tensor([[4.0, 3.0], [0.0, 2.0]], dtype=torch.float64),
    )
    score = block_influence(Evidence("layers.0", "layer", 1, (), similarity=float(cosine.mean())))
    assert score.tolist() == pytest.approx([0.52])


def test_block_influence_is_the_float64_reference() -> None:
    model = build("qwen3")
    groups = with_lora(model)
    criterion = find_criterion("block-influence")
    plan = Plan.whole(groups)
    batches = [torch.randint(0, 64, (2, 9)), torch.randint(0, 64, (3, 7))]
    with Gates(model, groups.groups, groups.layers) as gates:
        scorer = Scorer(model, plan, gates, criterion, None, seed=0, depth=True)
        scorer.watch(groups)
        for ids in batches:
            with scorer.recording(1.0), torch.no_grad():
                model(input_ids=ids, use_cache=False)
        assert scorer.update(groups, plan, plan)
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    model.double()
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, x, y, n=number: seen.setdefault(n, []).append((x[0], y)))
    for ids in batches:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    for number, passes in seen.items():
        x, y = (torch.cat([t.flatten(0, 1) for t in side]) for side in zip(*passes, strict=True))
        expected = 1 - ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).mean()
        assert float(scorer.average.scores[f"layers.{number}"]) == pytest.approx(float(expected), rel=1e-5)


def test_layers_are_scored_in_the_same_nats_as_units() -> None:
    model = build("llama-gqa")
    groups = with_lora(model)
    plan = Plan.whole(groups)
    seen: dict[str, torch.Tensor] = {}
    with Gates(model, groups.groups, groups.layers) as gates:
        scorer = Scorer(model, plan, gates, find_criterion("gate-fisher"), None, seed=0, depth=True)
        scorer.watch(groups)
        with gates.recording(IDS[:, 1:].numel(), lambda name, c: seen.update({name: c})):
            language_loss(model(input_ids=IDS, use_cache=False).logits, IDS).backward()
        with scorer.recording(IDS[:, 1:].numel()):
            language_loss(model(input_ids=IDS, use_cache=False).logits, IDS).backward()
        assert scorer.update(groups, plan, plan)
    for name, c_BU in seen.items():
        torch.testing.assert_close(scorer.average.scores[name], 0.5 * c_BU.double().square().mean(0))


def test_a_criterion_of_layers_prunes_no_widths(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set pruning\.kinds=\[layer\]"):
        regrow.prune(str(checkpoint), tmp_path / "out", data=str(text), criterion="block-influence")
    assert not (tmp_path / "out").exists()


# --- whole runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["uniform", "free"])
def test_removing_layers_early_is_closing_them_to_the_end(shape: str) -> None:
    recipe = load_recipe(
        "loraprune",
        {
            "training.steps": 12,
            "training.learning_rate": 3e-3,
            "pruning.interval": 2,
            "pruning.calibration_batches": 2,
            "pruning.criterion": "gate-fisher",
            "pruning.kinds": list(ALL),
            "pruning.shape": shape,
            "pruning.sparsity": 0.7,
            "pruning.protect_last": 0,
            "pruning.cap": 0.5,
        },
    )
    ends = []
    for cut_early in (True, False):
        model = build("llama-gqa")
        groups = with_lora(model, fill=False)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        data, calibration = (
            iter(lambda g=g: Batch(torch.randint(0, 64, (3, 10), generator=g)), None) for g in generators
        )
        learner = Learner(model, recipe.training, data)
        with Pruner(model, groups, recipe, learner, calibration, cut_early=cut_early) as pruner:
            pruner.calibrate()
            losses = []
            for step in range(12):
                pruner.before_step(step)
                losses.append(pruner.train_step())
            pruner.before_step(12)
            pruner.finish()
        ends.append((pruner.plan, losses, logits(model)))
    (plan, early, first), (other, late, second) = ends
    assert plan == other
    assert len(plan.removed_layers) >= 1
    assert early == pytest.approx(late, abs=1e-4)
    assert (first - second).abs().max() < CLOSE


def test_a_layer_fades_before_it_is_cut() -> None:
    recipe = load_recipe("shortgpt", {"training.steps": 6, "pruning.decay_steps": 4, "pruning.calibration_batches": 1})
    model = build("llama-gqa")
    groups = with_lora(model, fill=False)
    generator = torch.Generator().manual_seed(0)
    data = iter(lambda: Batch(torch.randint(0, 64, (3, 10), generator=generator)), None)
    learner = Learner(model, recipe.training, data)
    seen = []
    with Pruner(model, groups, recipe, learner, data) as pruner:
        pruner.calibrate()
        for step in range(6):
            pruner.before_step(step)
            seen.append([float(pruner.gates.value(layer.unit)) for layer in pruner.groups.layers])
            pruner.train_step()
    assert [sorted(values) for values in seen[:4]] == [[1 - n / 4] * 2 + [1.0] * 2 for n in range(4)]
    assert seen[4] == [1.0, 1.0]
    assert pruner.finished
    assert pruner.plan.sparsity.block == 0.5


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("shortgpt", {"pruning.sparsity": 0.3}),
        ("regrow", {"pruning.kinds": list(ALL), "pruning.sparsity": 0.6, "pruning.cap": 0.5}),
        (
            "regrow",
            {"pruning.kinds": list(ALL), "pruning.sparsity": 0.65, "pruning.cap": 0.6, "pruning.shape": "free"}
            | {"search.evaluations": 0, "pruning.allocation": "local"},
        ),
    ],
)
def test_a_whole_run(recipe: str, overrides: dict[str, object], checkpoint: Path, text: Path, tmp_path: Path) -> None:
    result = regrow.prune(
        str(checkpoint), tmp_path / "out", recipe, data=str(text), steps=4, overrides={**QUICK, **overrides}
    )
    assert len(result.plan.removed_layers) == 1
    assert result.results["verification"]["passed"]
    assert result.plan.sparsity.block >= overrides["pruning.sparsity"]
    assert result.results["sparsity"]["total"] == result.plan.sparsity.total
    model = AutoModelForCausalLM.from_pretrained(result.model, trust_remote_code=True)
    assert model.config.num_hidden_layers == 2
    left = sum(parameter.numel() for parameter in model.parameters())
    assert left == result.plan.total_parameters - result.plan.removed_parameters
    cut_model = result.results["perplexity"]["cut"]["window-32"]["value"]
    assert cut_model != result.results["perplexity"]["dense"]["window-32"]["value"]
    number = result.plan.removed_layers[0]
    assert f"| {number} | removed | removed |" in (result.folder / "report.md").read_text()
    assert "1 of 3 layers" in (result.model / "README.md").read_text()


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize("criterion", ["gate-fisher", "gate-second-order"])
def test_gate_scores_choose_whole_layers_in_a_run(criterion: str, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "pruning.kinds": ["layer"], "pruning.criterion": criterion, "pruning.sparsity": 0.3}
    result = regrow.prune(str(checkpoint), tmp_path / "out", "magnitude", data=str(text), steps=1, overrides=settings)
    scores = load_file(tmp_path / "out" / "scores.safetensors")
    layers = [float(scores[f"layers.{number}"]) for number in range(3)]
    assert len(set(layers)) == 3
    assert result.plan.removed_layers == (int(np.argmin(layers)),), "layers of equal size: the one of least damage"
