"""The residual stream's width: masked ≡ cut, whatever a norm takes its mean of."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import QUICK, build, logits, plan_of, uniform_keep, with_lora
from peft import PeftModel
from test_stream import contents, dense, in_memory, streamed
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

import regrow
from regrow.checkpoint.load import load_model
from regrow.checkpoint.offer import check_offer, choices
from regrow.checkpoint.peft_folder import Adapter
from regrow.checkpoint.shape import describe, pruned_config
from regrow.checkpoint.stock import prunable_groups
from regrow.criteria.registry import find_criterion
from regrow.data.tokens import Batch
from regrow.errors import InputError
from regrow.evaluation.compare import plan_as_gates
from regrow.planning.allocation import check_reach, choose
from regrow.planning.hidden import removals
from regrow.planning.plan import Plan
from regrow.planning.target import parse_target, sparsity_for
from regrow.preflight import check_settings
from regrow.recipe import load_recipe
from regrow.recovery.scoring import Scorer
from regrow.settings import Lora, Pruning
from regrow.structure.adapters import merge_lora
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.groups import RESIDUAL, Groups
from regrow.structure.residual import block_cost

CLOSE = 1e-4


def some_hidden(groups: Groups, count: int, seed: int = 0) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(groups.residual.units, count, replace=False))


def zeroed(model: PreTrainedModel, groups: Groups, kept: np.ndarray) -> PreTrainedModel:
    """Without any hook: the removed channels' embeddings, rows and norm weights are zero, and as the mean square over
    D channels of which h are there is h / D of theirs, `w sqrt(h/D)` and `eps h/D` are what the cut norms have.
    """
    model = copy.deepcopy(model)
    share = len(kept) / groups.residual.units
    gone = np.setdiff1d(np.arange(groups.residual.units), kept)
    with torch.no_grad():
        for piece in groups.residual.slices:
            parameter = model.get_parameter(piece.parameter)
            parameter.index_fill_(piece.axis, torch.from_numpy(piece.index[gone].reshape(-1)), 0)
            owner = model.get_submodule(piece.parameter.rpartition(".")[0])
            if "RMSNorm" in type(owner).__name__:
                parameter.mul_(share**0.5)
                owner.variance_epsilon *= share
    return model


@pytest.mark.parametrize("family", ["qwen3", "llama-mha-tied", "llama-biases"])
def test_masked_zeroed_and_cut_are_one(family: str) -> None:
    model = build(family).double()
    groups = with_lora(model)
    model.double()
    keep = uniform_keep(groups, 2, 17) | {RESIDUAL: some_hidden(groups, 29)}
    heads = [n for n, _ in model.named_parameters() if "q_norm" in n or "k_norm" in n]
    before = {name: model.get_parameter(name).clone() for name in heads}
    with Gates(model, groups.groups, residual=groups.residual) as gates:
        assert torch.equal(logits(model), whole := logits(model))
        for name, units in keep.items():
            gates.keep(name, units)
        masked = logits(model)
        with gates.opened():
            assert torch.equal(logits(model), whole)
    other = zeroed(model, groups, keep[RESIDUAL])
    cut(other, groups, {name: units for name, units in keep.items() if name != RESIDUAL})
    left = cut(model, groups, keep)
    after = logits(model)
    assert (masked - after).abs().max() < 1e-10
    assert (logits(other) - after).abs().max() < 5e-6  # norms compute in float32
    assert (masked - whole).abs().max() > 1e-2, "a mask that changes nothing proves nothing"
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert {
        p.shape[-1] for n, p in model.named_parameters() if "layernorm" in n or ("lora_A" in n and "q_proj" in n)
    } == {29}
    # what was counted is what is there, and what a trace of the cut model finds
    assert left.total_parameters == sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    if family == "qwen3":
        found = find_groups(model)
        assert left.block_parameters == found.block_parameters
        assert left.layers == found.layers
        assert [(g.units, g.cost, g.hidden) for g in left] == [(g.units, g.cost, g.hidden) for g in found]
        assert (left.residual.units, left.residual.cost) == (29, found.residual.cost)
        pairs = zip(left.residual.slices, found.residual.slices, strict=True)
        assert all(np.array_equal(ours.index, theirs.index) for ours, theirs in pairs)
    merge_lora(model)
    assert (logits(model) - after).abs().max() < 1e-10


NO_HIDDEN = {
    "Gemma", "Gemma 2", "Gemma 3", "Gemma 3 (text)", "Gemma 4", "Gemma 4 (MoE)", "VaultGemma", "GPT-2", "GPT-J", "OPT",
    "GPT-NeoX", "StableLM", "Helium", "Doge", "Persimmon", "GPT-Neo", "GPTBigCode", "CodeGen", "XGLM", "Falcon (MQA)",
    "Falcon (GQA)", "BLOOM", "MPT", "OLMoE",
}  # fmt: skip
"""Families whose class ties a head's size, or a factor, to the hidden size."""
NO_STREAM = {
    "Gemma 4 (E4B)", "Gemma 4 (E4B, sees)", "LFM2", "LFM2-MoE", "Qwen3.5", "Qwen3.5 MoE", "Qwen3-Next", "OLMo hybrid",
    "MiniMax", "Jamba", "Bamba", "Granite 4", "Falcon-H1", "Nemotron-H", "DeepSeek-V2",
    "DeepSeek-V3", "GLM-4 MoE Lite", "MiniCPM3", "Lara Mini", "Sarvam MLA",
}  # fmt: skip
"""Families in which tracing follows no one stream."""


@pytest.mark.parametrize("family", sorted(set(zoo.FAMILIES) - NO_HIDDEN - NO_STREAM))
def test_fewer_hidden_channels_are_masked_as_they_are_cut_and_built(family: str) -> None:
    """The stock class, given the narrow config and the narrow weights, computes what the cut model does."""
    model = zoo.build(family)
    residual = (groups := prunable_groups(model)).residual
    width = max(width for width in residual.widths if width % 8 == 0 and width < residual.units)
    keep = np.sort(np.random.default_rng(0).choice(residual.units, width, replace=False))
    whole = zoo.logits_of(model)
    with Gates(model, groups.groups, residual=residual) as gates:
        gates.keep(RESIDUAL, keep)
        masked = zoo.logits_of(model)
    left = cut(model, groups, {RESIDUAL: keep})
    assert (masked - zoo.logits_of(model)).abs().max() < 1e-4 < 1e-2 < (masked - whole).abs().max()
    describe(model, groups, left)
    built = zoo.hf.AutoModelForCausalLM.from_config(model.config).eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(zoo.logits_of(built), zoo.logits_of(model))


def test_a_norm_of_one_operator_is_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    several = find_groups(build("llama-biases"))
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", nn.RMSNorm)
    one = find_groups(build("llama-biases"))
    assert one.to_json() == several.to_json()
    assert sum("norm" in piece.parameter for piece in one.residual.slices) == 2 * len(one.layers) + 1


def test_layer_norms_are_masked_as_they_are_cut() -> None:
    """StarCoder2's norms subtract a mean and add a bias. Experts, which no linear reads: `test_experts.py`."""
    model = zoo.build("StarCoder2")
    groups = find_groups(model)
    kept = some_hidden(groups, 40)
    with Gates(model, groups.groups, residual=groups.residual) as gates:
        whole = zoo.logits_of(model)
        gates.keep(RESIDUAL, kept)
        masked = zoo.logits_of(model)
    cut(model, groups, {RESIDUAL: kept})
    assert (masked - zoo.logits_of(model)).abs().max() < CLOSE
    assert (masked - whole).abs().max() > 1e-2


# --- scores --------------------------------------------------------------------------------------

IDS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(3))


def derivatives(model: PreTrainedModel, groups: Groups) -> torch.Tensor:
    """`[3, U]`, of a sum that is separate for every sequence."""
    got: dict[str, torch.Tensor] = {}
    with Gates(model, groups.groups, residual=groups.residual) as gates, gates.recording(2.0, got.__setitem__):
        (model(input_ids=IDS, use_cache=False).logits.square().sum() / 2).backward()
    return got[RESIDUAL]


def test_a_hidden_gate_has_the_derivative_of_everything_written_to_the_stream() -> None:
    model = build("llama-mha-tied")
    groups = with_lora(model)
    model.double()
    c_BU = derivatives(model, groups)
    written = [f"model.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn.o_proj", "mlp.down_proj")]

    def scaled(unit: int, gate: float) -> torch.Tensor:
        factors = torch.ones(48, dtype=torch.float64).index_fill(0, torch.tensor([unit]), gate)
        hook = lambda module, args, output: output * factors  # noqa: E731
        handles = [model.get_submodule(name).register_forward_hook(hook) for name in ["model.embed_tokens", *written]]
        with torch.no_grad():
            losses = model(input_ids=IDS, use_cache=False).logits.square().sum((1, 2))
        for handle in handles:
            handle.remove()
        return losses

    for unit in (0, 17, 47):
        losses = scaled(unit, 1 + 1e-3), scaled(unit, 1 - 1e-3)
        difference = (losses[0] - losses[1]) / 2e-3
        assert torch.allclose(c_BU[:, unit].double(), difference, rtol=2e-3, atol=2e-3 * float(c_BU.abs().max()))


def test_the_derivative_is_the_same_checkpointed_and_in_batches() -> None:
    model = build("llama-gqa")
    groups = with_lora(model)
    whole = derivatives(model, groups)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert (derivatives(model, groups) - whole).abs().max() < 1e-4 * whole.abs().max()


# --- planning ------------------------------------------------------------------------------------


def flat_scores(groups: Groups) -> dict[str, torch.Tensor]:
    every = [*groups, groups.residual]
    return {
        group.name: torch.rand(group.units, generator=torch.Generator().manual_seed(group.units)) for group in every
    }


PRUNINGS = [
    Pruning(kinds=("hidden",), sparsity=0.3),
    Pruning(kinds=("hidden",), sparsity=0.3, basis="total"),
    Pruning(kinds=("hidden",), sparsity=0.3, basis="units"),
    Pruning(kinds=("attention", "ffn", "hidden"), sparsity=0.45),
    Pruning(kinds=("attention", "ffn", "hidden"), sparsity=0.45, basis="total"),
    Pruning(kinds=("attention", "ffn", "hidden"), sparsity=0.5, allocation="global"),
    Pruning(kinds=("attention", "ffn", "hidden"), sparsity=0.5, hidden=0.15),
    Pruning(kinds=("ffn", "hidden"), sparsity=0.4, multiple=4),
    Pruning(kinds=("attention", "hidden"), sparsity=0.4),
    Pruning(kinds=("attention", "ffn", "hidden"), sparsity=0.5, basis="units"),
    Pruning(kinds=("attention", "ffn", "layer", "hidden"), sparsity=0.6),
    Pruning(kinds=("layer", "hidden"), sparsity=0.6),
]  # fmt: skip


@pytest.fixture(scope="module")
def traced() -> tuple[PreTrainedModel, Groups]:
    model = build("llama-gqa")
    return model, prunable_groups(model)


@pytest.mark.parametrize("pruning", PRUNINGS, ids=lambda p: f"{'-'.join(p.kinds)} {p.basis}")
def test_the_target_is_reached_exactly_and_counted_as_it_is(pruning: Pruning, traced) -> None:
    model, groups = copy.deepcopy(traced[0]), traced[1]
    whole = Plan.whole(groups)
    plan = choose(groups, whole, flat_scores(groups), pruning)
    assert plan.narrows
    assert len(plan.residual.keep) % (pruning.multiple or 8) == 0
    if pruning.hidden:
        assert plan.residual.removed == 8, "of 48, the first multiple of 8 that is at least 15 %"
    left = cut(model, groups, plan.positions_within(whole))
    assert sum(p.numel() for p in model.parameters()) == groups.total_parameters - plan.removed_parameters
    assert left.total_parameters == groups.total_parameters - plan.removed_parameters
    assert left.block_parameters == groups.block_parameters - plan.removed_block_parameters
    # reached, and by less than a step: one FFN channel in every layer, or eight hidden channels
    reached = getattr(plan.sparsity, pruning.basis)
    assert reached >= pruning.sparsity - 1e-9 or pruning.basis == "units"
    ffn = [group for group in left if group.kind == "ffn"]
    total = groups.total_parameters if pruning.basis == "total" else groups.block_parameters
    hidden = left.residual.cost if pruning.basis == "total" else block_cost(left)
    step = sum(g.cost for g in ffn) * (pruning.multiple or 1) if "ffn" in pruning.kinds else 8 * hidden
    if pruning.basis != "units":
        assert (reached - pruning.sparsity) * total < step
    assert Plan.parse(json.dumps(plan.to_json())) == plan
    # on the way: nothing that went comes back, and the end is the same
    half = choose(groups, whole, flat_scores(groups), pruning, 0.5)
    assert set(plan.residual.keep) <= set(half.residual.keep) != set(whole.residual.keep)
    assert choose(groups, half, flat_scores(groups), pruning) == plan


def test_what_is_out_of_reach_says_what_is_within_it(traced) -> None:
    _, groups = traced
    for kinds in (("hidden",), ("attention", "ffn", "hidden")):
        pruning = Pruning(kinds=kinds, sparsity=0.95, floor=0.4)
        with pytest.raises(InputError, match=r"hidden channels left.*use at most (0\.\d+)") as refused:
            check_reach(groups, pruning)
        check_reach(groups, pruning.model_copy(update={"sparsity": float(str(refused.value).split()[-1])}))


def test_where_tracing_follows_no_stream_the_others_bring_all() -> None:
    with torch.device("meta"):
        model = zoo.hf.AutoModelForCausalLM.from_config(zoo.FAMILIES["LFM2"]())
    groups = prunable_groups(model)
    assert groups.residual is None
    scores = {group.name: torch.arange(group.units, dtype=torch.float32) for group in groups}
    both = Pruning(sparsity=0.1, kinds=("attention", "ffn", "hidden"))
    plan = choose(groups, Plan.whole(groups), scores, both)
    assert plan == choose(groups, Plan.whole(groups), scores, both.model_copy(update={"kinds": ("attention", "ffn")}))
    assert plan.sparsity.block >= 0.1
    with pytest.raises(InputError, match="use at most") as refused:
        check_reach(groups, both.model_copy(update={"sparsity": 0.99}))
    assert "hidden" not in str(refused.value)


def test_layers_that_go_take_their_norms_without_weights_along() -> None:
    model = zoo.build("NanoChat")
    groups = prunable_groups(model)
    none = np.zeros(0, dtype=np.int64)
    keep = {group.name: none for group in groups if group.layer == 1} | {RESIDUAL: np.arange(40)}
    left = cut(model, groups, keep)
    assert left.residual.bare_norms == find_groups(model).residual.bare_norms
    assert len(left.residual.bare_norms) < len(groups.residual.bare_norms)


def test_a_target_in_parameters_counts_the_embeddings(traced) -> None:
    _, groups = traced
    pruning = Pruning(kinds=("attention", "ffn", "hidden"))
    target = parse_target("params=20000")
    share = sparsity_for(target, groups, pruning, bytes_per_parameter=4, other_bytes=0)
    pruning = pruning.model_copy(update={"sparsity": share, "basis": "total"})
    plan = choose(groups, Plan.whole(groups), flat_scores(groups), pruning)
    left = groups.total_parameters - plan.removed_parameters
    assert 20000 - 3 * 48 * 2 < left <= 20000


# --- saving --------------------------------------------------------------------------------------


def narrow(groups: Groups) -> dict[str, np.ndarray]:
    return uniform_keep(groups, 2, 17) | {RESIDUAL: some_hidden(groups, 30)}


def narrow_with_a_layer_less(groups: Groups) -> dict[str, np.ndarray]:
    none = np.zeros(0, dtype=np.int64)
    return {name: none if name.startswith("layers.0.") else units for name, units in narrow(groups).items()}


@pytest.mark.parametrize(
    ("family", "keep_of", "saved_as"),
    [("llama-gqa", narrow, "mistral"), ("qwen2", narrow_with_a_layer_less, "granite")],
)
def test_applied_on_disk_is_saved_from_memory(family: str, keep_of, saved_as: str, tmp_path: Path) -> None:
    source = dense(family, tmp_path)
    model = in_memory(source, tmp_path, keep_of)
    assert contents(streamed(source, tmp_path)) == contents(tmp_path / "memory")
    stock = load_model(str(tmp_path / "streamed"))
    assert torch.equal(logits(stock), logits(model))
    config = json.loads((tmp_path / "streamed" / "config.json").read_text())
    assert (config["hidden_size"], config["model_type"]) == (30, saved_as)
    assert config["head_dim"] == {"llama-gqa": 10, "qwen2": 8}[family]
    if family == "llama-gqa":  # exports know nothing of it: they read the config
        regrow.export(tmp_path / "streamed", tmp_path / "padded", pad=True)
        assert torch.equal(logits(load_model(str(tmp_path / "padded"))), logits(model))
        pytest.importorskip("gguf")
        from test_export import Read

        regrow.export(tmp_path / "streamed", tmp_path / "model.gguf", "gguf")
        read, ids = Read(tmp_path / "model.gguf"), IDS[0]
        assert (read.logits(ids) - logits_of(model.double(), ids[None])[0]).abs().max() < CLOSE


def logits_of(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids_BT, use_cache=False).logits


def test_an_adapter_of_a_narrow_model_is_carried_to_the_full_one(tmp_path: Path) -> None:
    source = dense("llama-gqa", tmp_path)
    whole, small = load_model(str(source)), load_model(str(source))
    groups = find_groups(whole)
    keep = narrow(groups)
    plan = plan_of(groups, keep)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    cut(small, groups, keep)
    torch.manual_seed(7)
    with_lora(small)
    trained = {name: p.detach() for name, p in small.named_parameters() if ".lora_" in name}
    Adapter.of_run(trained, Lora(rank=3, alpha=6), "base").write(tmp_path / "small")
    folder = regrow.scatter(tmp_path / "small", tmp_path / "full", plan=tmp_path / "plan.json", model=str(source))
    PeftModel.from_pretrained(whole, folder)
    with plan_as_gates(whole, groups, plan):
        assert (logits(whole) - logits(small)).abs().max() < CLOSE
    assert (logits(whole) - logits(small)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "reason"),
    [("Gemma", "scalar_embed_scale"), ("GPT-2", "would be")],
)
def test_hidden_sizes_that_a_class_cannot_have_are_refused(family: str, reason: str) -> None:
    with torch.device("meta"):
        model = zoo.hf.AutoModelForCausalLM.from_config(zoo.FAMILIES[family]())
    groups = prunable_groups(model)
    with pytest.raises(InputError, match=reason):
        check_offer(model.config, groups, Pruning(kinds=("hidden",)))
    assert "hidden channels" in choices(model.config, groups)


def test_a_llama_with_biases_whose_heads_do_not_divide_its_hidden_size_is_a_granite() -> None:
    model = build("llama-biases")
    groups = prunable_groups(model)
    assert groups.residual.widths == range(1, 49)
    left = cut(model, groups, {RESIDUAL: np.arange(32)})
    described = pruned_config(model.config, groups, left)
    assert (described.model_type, described.hidden_size, described.head_dim) == ("granite", 32, 8)


def test_a_stream_that_stays_whole_has_no_gates_and_loses_nothing() -> None:
    model = zoo.hf.AutoModelForCausalLM.from_config(zoo.FAMILIES["Gemma"]())
    groups = prunable_groups(model)
    assert groups.residual is not None
    pruning = Pruning(kinds=("attention", "ffn", "hidden"), sparsity=0.4)
    assert removals(groups, pruning) == [0]
    scores = {name: values for name, values in flat_scores(groups).items() if name != RESIDUAL}
    plan = choose(groups, Plan.whole(groups), scores, pruning)
    assert not plan.narrows
    assert plan.sparsity.block >= 0.4


# --- runs ----------------------------------------------------------------------------------------

ALL = ["attention", "ffn", "hidden"]
PLAIN = {"distillation.weight": 0.0, "compensation.method": "none", "search.evaluations": 0, "search.judge_windows": 4}


@pytest.mark.parametrize(
    "name",
    [
        "magnitude", "taylor", "lhspg", "lora", "gate-fisher", "random", "wanda", "wanda-norm", "flap", "mini-llm",
        "taylor-second", "taylor-mix",
    ],
)  # fmt: skip
def test_criteria_score_hidden_channels_and_leave_the_weights_alone(name: str, traced) -> None:
    """A head without an adapter is no copy of anything: what works in place on it would be a change to the model."""
    model, groups = copy.deepcopy(traced[0]), traced[1]
    criterion = find_criterion(name)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plan = Plan.whole(groups)
    with Gates(model, groups.groups, residual=groups.residual) as gates:
        scorer = Scorer(model, plan, gates, criterion, None, seed=0, hidden=True)
        scorer.watch(groups)
        model.model.embed_tokens.weight.requires_grad_(True)  # in the place of an adapter
        scorer.look(Batch(IDS))
        with scorer.recording(1.0):
            model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        head = model.lm_head.weight.grad
        assert scorer.update(groups, plan, plan)
    scores = scorer.average.scores[RESIDUAL]
    assert scores.shape == (48,)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    if name == "magnitude":
        columns = [s.parameter for s in groups.residual.consumers]
        squares = sum(before[column].double().square().sum(0) for column in columns)
        assert torch.allclose(scores, squares.sqrt(), rtol=1e-5)
        assert "lm_head.weight" in columns
    elif name == "taylor":
        assert head is not None
    if name != "lora":  # without adapters it knows nothing
        assert len(scores.unique()) == 48


@pytest.mark.parametrize(
    "settings",
    [
        {
            "pruning.kinds": [*ALL, "layer"], "pruning.criterion": "gate-fisher", "pruning.target": "params=15000",
            "pruning.schedule": "cubic", "distillation.weight": 0.5, "distillation.teacher": "self",
            "pruning.decay_steps": 2,
        },
        {"pruning.kinds": ALL, "compensation.method": "least-squares", "search.evaluations": 2, "search.windows": 4},
    ],
    ids=["layers and a target, masked to the end", "searched and refitted"],
)  # fmt: skip
@pytest.mark.usefixtures("lean")
def test_a_run(settings: dict, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    recipe = load_recipe("regrow", {**QUICK, **PLAIN, **settings})
    result = regrow.prune(str(checkpoint), tmp_path / "run", recipe, data=str(text), steps=6)
    size, sparsity = result.results["size"]["pruned"]["total"], result.results["sparsity"]
    assert size == result.plan.total_parameters - result.plan.removed_parameters
    assert sparsity[sparsity["basis"]] >= sparsity["requested"]
    if "pruning.target" in settings:
        assert 15000 - 8 * 3 * 32 < size <= 15000
        assert "of all parameters to remove" in (tmp_path / "run" / "report.md").read_text()
    config = json.loads((result.model / "config.json").read_text())
    assert config["hidden_size"] == len(result.plan.residual.keep) == result.results["widths"][RESIDUAL] < 32
    assert "hidden channels" in (result.model / "README.md").read_text()
    again = regrow.apply(str(checkpoint), tmp_path / "again", run=result.folder)
    assert contents(again) == contents(result.model)


def test_a_fresh_process(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Nothing is replaced here: the checkpoint is loaded by stock transformers in a process of its own."""
    alone = {"pruning.kinds": ["hidden"], "pruning.schedule": "lhspg", "pruning.criterion": "lhspg"}
    recipe = load_recipe("regrow", {**QUICK, **PLAIN, **alone})
    result = regrow.prune(str(checkpoint), tmp_path / "run", recipe, data=str(text), steps=6)
    assert {name for name, group in result.plan.parts.items() if group.removed} == {RESIDUAL}
    assert result.results["verification"]["passed"]
    assert not result.results["verification"]["regrow_imported"]
    with pytest.raises(InputError, match=r"take hidden out of pruning\.kinds"):
        check_settings(recipe.override({"pruning.shape": "free"}))
