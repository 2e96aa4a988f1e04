"""Families: each is pruned as far as its stock class allows; what a class cannot have is known before any work."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import QUICK, CommandLine, logits, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Config, StableLmConfig
from zoo import CLOSE, FAMILIES, Found, Reloaded, build, with_lora
from zoo_families import GQA, NEWER

from regrow.checkpoint.empty import build_empty
from regrow.checkpoint.offer import allowed, check_offer, choices, ranges
from regrow.checkpoint.shape import describe, pruned_config, zero_biases
from regrow.checkpoint.stock import check_free, prunable_groups, stock_widths
from regrow.errors import InputError
from regrow.evaluation.latency import measure_latency
from regrow.planning.allocation import choose
from regrow.planning.plan import Plan
from regrow.run import prune
from regrow.settings import Pruning
from regrow.structure.adapters import adapter_parameters
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups
from regrow.structure.prefix import LayerWalk

NO_HEADS = {
    "GPT-2", "GPT-J", "OPT", "GPT-NeoX", "StableLM", "Falcon (MQA)", "Falcon (GQA)", "BLOOM", "MPT", "Helium", "Doge",
    "Persimmon", "GPT-Neo", "CodeGen", "MiniMax", "XGLM", "Gemma 4", "Gemma 4 (MoE)", "Gemma 4 (E4B)",
    "Gemma 4 (E4B, sees)",
}  # fmt: skip
ONE_NORM = {"OLMo 2", "OLMo 3", "OLMoE", "MiniMax-M2", "FlexOlmo", "OLMo hybrid"}
"""Families in which one norm goes over all heads."""
ONE_UNIT = {"GPTBigCode"}
"""Families with one KV head, whatever the config says."""
LATENT = {"DeepSeek-V2", "DeepSeek-V3", "GLM-4 MoE Lite", "MiniCPM3", "Sarvam MLA"}
"""Families whose attention is opaque."""
FEW_LINEARS = {"LFM2-MoE", "MiniMax", "Nemotron-H", "Gemma 4 (E4B)", "Gemma 4 (E4B, sees)"}
"""Families with layers that have but a mixer's linears, or experts beside them, or keys and values of another layer."""
NO_FFN = {"BLOOM", "MPT"}
MIXTURES = {
    "Mixtral", "Qwen2-MoE", "Qwen3-MoE", "OLMoE", "Granite MoE", "gpt-oss", "ERNIE 4.5 MoE", "Phi-3.5-MoE", "FlexOlmo",
    "DeepSeek-V2", "Qwen3-Next", "MiniMax", "Jamba", "Granite 4", "Gemma 4 (MoE)",
    "Granite MoE (shared)", "Granite MoE SWA", "Mellum", "HunYuan MoE", "Cohere 2 MoE", "Qwen3.5 MoE", "Lara Mini",
}  # fmt: skip


@pytest.fixture(scope="module")
def checked() -> dict[str, Found]:
    """What has been seen so far, by family; the checkpoints lie in `scratch`."""
    return {}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


def folder_of(scratch: Path, family: str) -> Path:
    return scratch / str(list(FAMILIES).index(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_is_cut(family: str, checked: dict[str, Found], scratch: Path) -> None:
    found = checked[family] = zoo.check(family, folder_of(scratch, family))
    assert found.difference < CLOSE
    assert found.changed > 1e-2, "a mask that changes nothing proves nothing"
    assert found.linears >= (2 if family in FEW_LINEARS else 4)
    offered = {kind for kind, widths in found.widths.items() if len(widths.counts) > 1}
    assert ("attention" in offered) == (family not in NO_HEADS | ONE_NORM | ONE_UNIT | LATENT)
    assert ("ffn" in offered) == (family not in NO_FFN)
    assert ("expert" in offered) == (family in MIXTURES)
    assert all(widths.refusal for widths in found.widths.values() if len(widths.counts) == 1)


def test_a_fresh_process_computes_and_writes_the_same(checked: dict[str, Found], scratch: Path) -> None:
    """One process for all of them; those that another worker has been given are pruned here too.

    Beside them lies a Qwen2 with so few heads that it is saved as a Llama. The page tells what is seen here.
    """
    for family in set(FAMILIES) - set(checked):
        checked[family] = zoo.check(family, folder_of(scratch, family))
    qwen2 = fewer_heads("Qwen2", 2)
    qwen2.save_pretrained(scratch / "qwen2")
    folders = [folder_of(scratch, family) for family in FAMILIES]
    expected = [checked[family].logits for family in FAMILIES]
    *seen, relabelled = zoo.reload([*folders, scratch / "qwen2"], [*expected, zoo.logits_of(qwen2)])
    assert relabelled == Reloaded("LlamaForCausalLM", True, False, 0.0)
    rows = [zoo.row(family, checked[family], each) for family, each in zip(FAMILIES, seen, strict=True)]
    assert not [row for row in rows if "✗" in row]
    page = zoo.PAGE.read_text(encoding="utf-8").split(zoo.MARK)[1].strip().splitlines()
    missing = [f"| {family} |" for family in NEWER if family not in FAMILIES]
    known = [line for line in page if not line.startswith(tuple(missing))]
    assert known == [*zoo.HEADER.splitlines(), *rows]


def fewer_heads(family: str, units: int) -> PreTrainedModel:
    """A model that has lost KV heads, with the config that describes it."""
    model = build(family)
    groups = find_groups(model)
    left = cut(model, groups, {g.name: np.arange(units) for g in groups if g.kind == "attention"})
    describe(model, groups, left)
    return model


def widths_of(family: str) -> dict[str, str]:
    with torch.device("meta"):
        model = zoo.hf.AutoModelForCausalLM.from_config(FAMILIES[family]())
    return {kind: ranges(widths.counts) for kind, widths in stock_widths(model.config, find_groups(model)).items()}


def test_some_classes_want_heads_that_divide_the_hidden_size() -> None:
    assert widths_of("Gemma 2")["attention"] == "1–2, 4"
    assert widths_of("Llama")["attention"] == "1–4", "what Llama's class refuses, Mistral's takes"


@pytest.mark.parametrize("dense", [[0], [0, 1, 2]])
def test_layers_of_several_kinds_can_have_widths_of_their_own(dense: list[int]) -> None:
    """Also where a kind is first seen in a layer after which no second one was looked at."""
    few = {
        **GQA,
        "num_key_value_heads": 1,
        "num_hidden_layers": 4,
        "head_dim": 12,
        "moe_intermediate_size": 16,
        "mlp_only_layers": dense,
    }
    config = zoo.hf.Qwen3MoeConfig(**few, num_experts=4, num_experts_per_tok=2)
    check_free(config, prunable_groups(build_empty(config)))


def test_ranges_are_short() -> None:
    assert ranges([1, 2, 4, 6, 7, 8]) == "1–2, 4, 6–8"
    assert ranges(range(1, 6)) == "1–5"
    assert ranges(range(8, 65, 8)) == "8, 16, …, 64"
    assert ranges([*range(8, 65, 8), 70]) == "8, 16, …, 64, 70"
    assert ranges([3]) == "3"


def test_before_a_run_it_is_told_among_which_widths_it_chooses() -> None:
    with torch.device("meta"):
        model = zoo.hf.AutoModelForCausalLM.from_config(FAMILIES["Gemma 2"]())
    groups = prunable_groups(model)
    (told,) = allowed(groups, Pruning(floor=0.2, cap=0.7, multiple=4))
    assert told == "may stay, in every layer alike: 2, 4 of 4 KV heads; 12, 16, …, 40 of 40 FFN channels"
    (told,) = allowed(groups, Pruning(shape="free", kinds=("attention",)))
    assert told == "may stay, in each layer by itself: 1–4 of 4 KV heads"
    assert allowed(groups, Pruning(kinds=("layer",))) == []


# --- planning ------------------------------------------------------------------------------------


def flat_scores(groups: Groups) -> dict[str, torch.Tensor]:
    return {group.name: torch.arange(group.units, dtype=torch.float32) for group in groups}


def planned(family: str, pruning: Pruning) -> dict[str, int]:
    groups = prunable_groups(build(family))
    plan = choose(groups, Plan.whole(groups), flat_scores(groups), pruning)
    assert plan.sparsity.block >= pruning.sparsity
    return {name.partition(".")[2]: len(group.keep) for name, group in plan.groups.items()}


def test_what_cannot_be_cut_is_made_up_for_by_what_can() -> None:
    kept = planned("GPT-NeoX", Pruning(sparsity=0.2))
    assert {kept[f"{layer}.attention"] for layer in range(3)} == {8}
    assert len({kept[f"{layer}.ffn"] for layer in range(3)}) == 1
    assert kept["0.ffn"] < 30


def test_what_cannot_be_cut_is_asked_for_nothing_where_units_are_counted() -> None:
    groups = prunable_groups(build("GPT-NeoX"))
    plan = choose(groups, Plan.whole(groups), flat_scores(groups), Pruning(sparsity=0.25, basis="units"))
    assert {group.removed > 0 for name, group in plan.groups.items() if name.endswith("attention")} == {False}
    assert {group.removed for name, group in plan.groups.items() if name.endswith("ffn")} == {
        round(0.25 * groups.by_name("layers.0.ffn").units)
    }


@pytest.mark.parametrize("sparsity", [0.15, 0.3, 0.45, 0.6])
def test_only_possible_numbers_of_heads_are_planned(sparsity: float) -> None:
    kept = planned("Gemma 2", Pruning(sparsity=sparsity))
    assert {kept[f"{layer}.attention"] for layer in range(3)} <= {1, 2, 4}
    assert planned("Gemma 2", Pruning(sparsity=0.25, kinds=("attention",)))["0.attention"] == 2


@pytest.mark.parametrize(
    ("family", "pruning", "reason"),
    [
        ("BLOOM", Pruning(), "no key for the width"),
        ("GPT-2", Pruning(kinds=("attention",)), "the stock class has"),
        ("GPT-2", Pruning(shape="free"), "cannot have widths of their own"),
        ("OLMo 2", Pruning(kinds=("attention",)), "without the others"),
        ("Llama", Pruning(kinds=("expert",)), "it has none"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_run(family: str, pruning: Pruning, reason: str) -> None:
    model = build(family)
    with pytest.raises(InputError, match=reason):
        check_offer(model.config, prunable_groups(model), pruning)


def test_a_norm_of_its_own_for_every_head_keeps_heads_and_lets_channels_go() -> None:
    """Each head is a group, and all of them share one output projection."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(StableLmConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, vocab_size=64, num_attention_heads=6,
        num_key_value_heads=3, qk_layernorm=True,
    )).eval()  # fmt: skip
    groups = with_lora(model)
    plan = choose(groups, Plan.whole(groups), flat_scores(groups), Pruning(sparsity=0.2))
    assert {len(plan.groups[group.name].keep) < group.units for group in groups if group.kind == "ffn"} == {True}
    keep = plan.positions_within(Plan.whole(groups))
    with Gates(model, groups.groups) as gates:
        whole, seen = logits(model), dict[str, torch.Tensor]()
        with gates.recording(1.0, lambda name, c_BU: seen.update({name: c_BU})):
            model(input_ids=torch.arange(12)[None]).logits.logsumexp(-1).sum().backward()
        for name, units in keep.items():
            gates.keep(name, units.tolist())
        masked = logits(model)
    assert {name: c_BU.shape[1] for name, c_BU in seen.items()} == {group.name: group.units for group in groups}
    cut(model, groups, keep)
    torch.testing.assert_close(logits(model), masked, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, masked)


def test_what_tracing_cannot_see_into_is_told() -> None:
    model = build("LFM2")
    groups = prunable_groups(model)
    told = "stays as it is: it uses aten.conv1d, which has no pruning rule"
    assert check_offer(model.config, groups, Pruning()) == [f"conv of 2 of 4 layers {told}"]
    assert check_offer(model.config, groups, Pruning(shape="free")) == [f"conv of 2 of 4 layers {told}"]
    with pytest.raises(InputError, match=f"hidden channels stay .*; conv of 2 of 4 layers {told}"):
        check_offer(model.config, groups, Pruning(kinds=("hidden",)))
    shown = choices(model.config, groups)
    assert shown["KV heads"] == "1–4 of 4 in every layer that has some"
    assert shown["FFN channels"] == "1–40 of 40 in every layer"
    assert shown["conv of 2 of 4 layers"] == told.removeprefix("stays ")
    assert with_lora(model).linears == groups.linears
    adapted = [name for name in groups.linears if ".conv." in name]
    assert adapted == [f"model.layers.{n}.conv.{part}" for n in (0, 2) for part in ("in_proj", "out_proj")]


def test_a_part_that_stays_whole_is_told() -> None:
    model = build("GPT-2")
    groups = prunable_groups(model)
    (told,) = check_offer(model.config, groups, Pruning())
    assert told.startswith("KV heads stay as they are")
    assert check_offer(model.config, groups, Pruning(kinds=("ffn", "layer"))) == []
    check_free(FAMILIES["Llama"](), find_groups(build("Llama")))


# --- saving under another name -------------------------------------------------------------------


def test_a_qwen2_with_fewer_heads_is_described_as_a_llama() -> None:
    model = fewer_heads("Qwen2", 2)
    assert (model.config.model_type, model.config.head_dim) == ("llama", 8)
    zeros = [parameter for name, parameter in model.named_parameters() if name.endswith("o_proj.bias")]
    assert not any(bool(bias.any()) for bias in zeros)
    names = {name: p.numel() for name, p in model.named_parameters() if name.endswith("o_proj.bias")}
    assert names == zero_biases(FAMILIES["Qwen2"](), find_groups(build("Qwen2")))
    assert sum(names.values()) == sum(bias.numel() for bias in zeros) == 3 * 64
    assert zero_biases(FAMILIES["Llama"](), find_groups(build("Llama"))) == {}


@pytest.mark.parametrize(
    ("what", "saved_as"), [("ffn only", "qwen2"), ("heads do not divide", "granite"), ("sliding window", "qwen2")]
)
def test_what_a_qwen2_is_saved_as_where_llama_cannot_say_it(what: str, saved_as: str) -> None:
    config = FAMILIES["Qwen2"]()
    if what == "sliding window":
        config = Qwen2Config(**GQA, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    with torch.device("meta"):
        model = zoo.hf.AutoModelForCausalLM.from_config(config)
    groups = find_groups(model)
    kind, count = ("ffn", 20) if what == "ffn only" else ("attention", 3 if what == "heads do not divide" else 2)
    left = cut(model, groups, {g.name: np.arange(count) for g in groups if g.kind == kind})
    assert pruned_config(config, groups, left).model_type == saved_as


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["GPT-2", "Phi-3"])
def test_turned_and_fused_weights_train_after_a_cut(family: str) -> None:
    """The gradient of each gate is that of the consumer's columns, and LoRA's factors have the cut shapes."""
    model = build(family).double()
    groups = with_lora(model)
    keep = zoo.some_units(groups, stock_widths(model.config, groups), [])
    left = cut(model, groups, keep)
    model.double().eval()
    got: dict[str, torch.Tensor] = {}
    with Gates(model, left.groups) as gates, gates.recording(1.0, lambda name, c: got.update({name: c.sum(0)})):
        model(input_ids=zoo.IDS, use_cache=False).logits.square().mean().backward()
        before = {name: value.clone() for name, value in got.items()}
    assert all(parameter.grad is not None for parameter in adapter_parameters(model))
    step = 1e-4
    for group in (left[0], left[1]):
        losses = []
        for sign in (1, -1):
            value = torch.ones(group.units, dtype=torch.float64)
            value[1] += sign * step
            with Gates(model, left.groups) as gates, torch.no_grad():
                gates.set(group.name, value)
                losses.append(float(model(input_ids=zoo.IDS, use_cache=False).logits.square().mean()))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float(before[group.name][1]) == pytest.approx(slope, rel=2e-2, abs=1e-6)


def test_a_gpt2_goes_through_the_whole_walk(tmp_path: Path, text: Path, lean: None) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**FAMILIES["GPT-2"]().to_dict(), "vocab_size": 300})
    zoo.hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    make_tokenizer(tmp_path / "gpt2")
    few = {"training.steps": 2, "compensation.windows": 4, "search.evaluations": 0, "pruning.sparsity": 0.2}
    result = prune(str(tmp_path / "gpt2"), tmp_path / "out", "regrow", data=str(text), overrides={**QUICK, **few})
    assert result.plan.sparsity.block >= 0.2
    assert {len(g.keep) for name, g in result.plan.groups.items() if name.endswith("attention")} == {8}


@pytest.mark.parametrize(("family", "recipe"), [("Qwen3-Next", "regrow"), ("LFM2", "loraprune"), ("LFM2", "lorashear")])
def test_a_hybrid_goes_through_the_whole_walk(tmp_path: Path, text: Path, lean: None, family: str, recipe: str) -> None:
    """Its convolutions and linear attention are adapted and stay; a shared expert is given tokens without sequences."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**FAMILIES[family]().to_dict(), "vocab_size": 300})
    zoo.hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    few = {"training.steps": 3, "pruning.sparsity": 0.3}
    if recipe == "regrow":
        few |= {"compensation.windows": 4, "search.evaluations": 2}
    if recipe == "lorashear":
        few |= {
            "analysis.windows": 4,
            "analysis.shares": [0.5],
            "analysis.calibration_batches": 1,
            "pruning.periods": 1,
        }
    result = prune(str(tmp_path / "model"), tmp_path / "out", recipe, data=str(text), overrides={**QUICK, **few})
    assert result.plan.sparsity.block >= 0.3
    left = zoo.hf.AutoModelForCausalLM.from_pretrained(result.model)
    mixer = next(name for name, _ in left.model.layers[0].named_children())
    whole = {name: p.shape for name, p in zoo.hf.AutoModelForCausalLM.from_config(config).named_parameters()}
    assert {p.shape == whole[name] for name, p in left.named_parameters() if f"layers.0.{mixer}." in name} == {True}


def save_with_tokens(family: str, folder: Path) -> None:
    """A checkpoint whose vocabulary is the tests' tokenizer's."""
    config = FAMILIES[family]()
    text = config.get_text_config()
    text.vocab_size = text.vocab_size_per_layer_input = 300
    torch.manual_seed(0)
    model = zoo.hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # projections of images are zero to begin with
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer(folder)


def test_a_model_that_sees_is_pruned_and_still_sees(tmp_path: Path, text: Path, lean: None) -> None:
    save_with_tokens("Gemma 3", tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    few = {
        "training.steps": 2,
        "compensation.windows": 4,
        "search.evaluations": 2,
        "pruning.kinds": ["ffn"],
        "pruning.sparsity": 0.2,
    }
    result = prune(str(tmp_path / "model"), tmp_path / "out", data=str(text), overrides={**QUICK, **few})
    whole, left = (
        zoo.hf.AutoModelForImageTextToText.from_pretrained(folder) for folder in (tmp_path / "model", result.model)
    )
    assert (Path(result.model) / "preprocessor_config.json").is_file()
    image = {name: p for name, p in whole.named_parameters() if "language_model" not in name and "lm_head" not in name}
    assert image
    assert all(torch.equal(left.get_parameter(name), p) for name, p in image.items())
    assert left.config.text_config.intermediate_size < whole.config.text_config.intermediate_size
    ids = torch.tensor([[5, 1, 2, 2, 2, 2, 1, 7]])
    shown = [left(input_ids=ids, pixel_values=torch.full((1, 3, 28, 28), value)).logits for value in (0.0, 1.0)]
    assert (shown[0] - shown[1]).abs().max() > 1e-6
    assert torch.isfinite(shown[1]).all()


@pytest.mark.parametrize(("family", "recipe"), [("Gemma 4 (E4B, sees)", "regrow"), ("Gemma 4 (MoE)", "loraprune")])
def test_a_gemma4_goes_through_the_whole_walk(tmp_path: Path, text: Path, lean: None, family: str, recipe: str) -> None:
    """Layers take keys and values from others; heads differ from layer to layer, as the stock class has them."""
    save_with_tokens(family, tmp_path / "model")
    few = {"training.steps": 3, "pruning.sparsity": 0.08}
    if recipe == "regrow":
        few |= {"compensation.windows": 4, "search.evaluations": 2}
    result = prune(str(tmp_path / "model"), tmp_path / "out", recipe, data=str(text), overrides={**QUICK, **few})
    assert result.plan.sparsity.block >= 0.08
    assert not list(Path(result.model).glob("*.py"))
    left = zoo.hf.AutoModelForCausalLM.from_pretrained(result.model).config.get_text_config()
    assert min(left.intermediate_size, left.moe_intermediate_size or 40) < 40
    assert [left.per_layer_config[number].head_dim for number in range(4)] == [8, 64, 8, 64]


def test_a_walk_layer_by_layer_passes_shared_keys_and_values_on() -> None:
    model = build("Gemma 4 (E4B)")
    walk = LayerWalk(model, [zoo.IDS])
    with torch.no_grad():
        whole = model(zoo.IDS, use_cache=False).logits
    for _ in range(4):
        assert torch.equal(next(walk.finish()), whole)
        walk.advance()


@pytest.mark.parametrize("family", ["Gemma 3", "Gemma 4"])
def test_layers_that_a_config_tells_apart_are_timed(family: str) -> None:
    model = build(family)
    groups = prunable_groups(model)
    table = measure_latency(model, groups, {}, lambda name: None)
    assert len(table.savings["ffn"]) > 1


def test_layers_that_need_each_other_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.evaluation.latency.BEYOND_CACHES", 1)  # of a large model few layers are enough
    model = build("Gemma 4 (E4B)")
    with pytest.raises(InputError, match="how long the layers of a 'gemma4_text' model take cannot be measured"):
        measure_latency(model, prunable_groups(model), {}, lambda name: None)


def test_inspect_says_what_is_possible(command: CommandLine, tmp_path: Path) -> None:
    FAMILIES["Gemma 2"]().save_pretrained(tmp_path)
    done = command("inspect", tmp_path)
    assert (done.code, done.stderr) == (0, "")
    assert "KV heads: 1–2, 4 of 4 in every layer (others: " in done.stdout
    assert "FFN channels: 1–40 of 40 in every layer" in done.stdout
