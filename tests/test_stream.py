"""Streamed ≡ saved from memory: a plan and adapters applied to a checkpoint on disk, tensor by tensor."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zoo
from conftest import (
    HEADS,
    QUICK,
    SIZES,
    CommandLine,
    build,
    logits,
    make_tokenizer,
    random_keep,
    uniform_keep,
    with_lora,
)
from peft import PeftModel
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, MixtralConfig

import regrow
from regrow.checkpoint.load import load_config, load_model, load_skeleton
from regrow.checkpoint.peft_folder import Adapter
from regrow.checkpoint.save import save_checkpoint
from regrow.checkpoint.shape import describe
from regrow.checkpoint.stream import SCALING, check_plan
from regrow.checkpoint.tensors import StoredTensors, write_tensors
from regrow.errors import InputError
from regrow.planning.memory import OVERHEAD, Sizes, estimate_memory
from regrow.planning.plan import Plan
from regrow.preflight import check_disk, check_memory
from regrow.recipe import load_recipe
from regrow.reuse import texts
from regrow.settings import Lora
from regrow.structure.adapters import merge_lora
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups
from regrow.structure.positions import index_map

SHARD = "20KB"


def dense(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A dense checkpoint of several files on disk."""
    model = build(family)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=3)
    make_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    save_checkpoint(model, tokenizer, folder / "dense", dtype=dtype, shard_size=SHARD, extras={})
    return folder / "dense"


def planned(whole: Groups, keep: dict[str, np.ndarray]) -> Plan:
    """The plan that keeps `keep`; layers that keep nothing go, but not for experts that do."""
    empty = {int(name.split(".")[1]) for name, units in keep.items() if not len(units) and ".expert" not in name}
    return Plan.whole(whole).keeping({name: units.tolist() for name, units in keep.items() if len(units)}, empty)


def in_memory(source: Path, folder: Path, keep_of, dtype: torch.dtype = torch.float32, refit: bool = False):
    """What a run does: cut, perhaps refit, merge, save. Returns the model and leaves plan and adapters in `folder`."""
    model = load_model(str(source))
    whole = find_groups(model)
    torch.manual_seed(5)
    groups = with_lora(model)
    keep = keep_of(groups)
    plan = planned(whole, keep)
    left = cut(model, groups, keep)
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
    if refit:
        module = left[-1].consumers[0].parameter.rpartition(".")[0]
        for name, parameter in model.get_submodule(module).named_parameters(recurse=False):
            parameter.data += 0.1 * torch.randn_like(parameter)
            kept[f"{module}.{name}"] = parameter.detach().clone()
    merge_lora(model)
    describe(model, whole, left)
    tokenizer, extras = AutoTokenizer.from_pretrained(source), texts(str(source), None, plan)
    save_checkpoint(model, tokenizer, folder / "memory", dtype=dtype, shard_size=SHARD, extras=extras)
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    (folder / "adapters.safetensors").write_bytes(save(kept, {SCALING: repr(6 / 3)}))
    return model


def streamed(source: Path, folder: Path, **settings) -> Path:
    return regrow.apply(
        str(source), folder / "streamed", plan=folder / "plan.json", adapters=folder / "adapters.safetensors",
        **{"shard_size": SHARD, **settings},
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_a_layer(keep):
    return lambda groups: {
        group.name: np.zeros(0, dtype=np.int64) if group.layer == 0 else units
        for group in groups
        for units in [keep(groups)[group.name]]
    }


even = lambda groups: uniform_keep(groups, heads=1, channels=17)  # noqa: E731
uneven = lambda groups: random_keep(groups, 4)  # noqa: E731
shallow = without_a_layer(uneven)

CASES = [
    ("llama-gqa", uneven, torch.float32), ("llama-mha-tied", even, torch.float32), ("mistral", even, torch.bfloat16),
    ("llama-biases", even, torch.float32), ("qwen2", shallow, torch.float32), ("qwen3-tied", shallow, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("family", "keep_of", "dtype"), CASES)
def test_every_file_is_as_saved_from_memory(family: str, keep_of, dtype: torch.dtype, tmp_path: Path) -> None:
    source = dense(family, tmp_path, dtype)
    model = in_memory(source, tmp_path, keep_of, dtype, refit=True)
    folder = streamed(source, tmp_path)
    assert contents(folder) == contents(tmp_path / "memory")
    assert len(list(folder.glob("*.safetensors"))) > 1
    reloaded = load_model(str(folder), dtype=dtype, trust_remote_code=True)
    assert torch.equal(logits(reloaded), logits(model))


def test_one_dtype_becomes_another(tmp_path: Path) -> None:
    source = dense("llama-gqa", tmp_path)
    in_memory(source, tmp_path, even, torch.bfloat16)
    assert contents(streamed(source, tmp_path, dtype="bfloat16")) == contents(tmp_path / "memory")


def test_without_adapters_the_model_is_only_cut(tmp_path: Path) -> None:
    source = dense("llama-gqa", tmp_path)
    in_memory(source, tmp_path, even)
    folder = regrow.apply(str(source), tmp_path / "out", plan=tmp_path / "plan.json")
    model = load_model(str(source))
    groups = find_groups(model)
    cut(model, groups, even(groups))
    assert torch.equal(logits(load_model(str(folder))), logits(model))
    assert "LoRA" not in (folder / "README.md").read_text()


def test_both_names_of_a_tied_tensor_may_be_on_disk_if_they_agree(tmp_path: Path) -> None:
    source = dense("qwen2", tmp_path)
    in_memory(source, tmp_path, even)
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in source.glob("*.safetensors*"):
        file.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, source / "model.safetensors")
    assert contents(streamed(source, tmp_path)) == contents(tmp_path / "memory")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match="json ties them"):
        regrow.apply(str(source), tmp_path / "other", plan=tmp_path / "plan.json")


def test_names_of_the_base_model_will_do(tmp_path: Path) -> None:
    source = dense("qwen2", tmp_path)
    in_memory(source, tmp_path, even)
    for file in source.glob("*.safetensors"):
        save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    assert contents(streamed(source, tmp_path)) == contents(tmp_path / "memory")


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, other = dense("llama-gqa", tmp_path), dense("qwen3", tmp_path / "other")
    in_memory(source, tmp_path, even)
    in_memory(other, tmp_path / "other", even)
    plan, adapters = tmp_path / "plan.json", tmp_path / "adapters.safetensors"

    def refused(match: str, model: Path = source, **given) -> None:
        with pytest.raises(InputError, match=match):
            regrow.apply(str(model), tmp_path / "out", **{"plan": plan, "adapters": adapters, **given})
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))

    refused("plan is of another model", plan=tmp_path / "other" / "plan.json")
    tensors = load_file(adapters)
    for name, wrong, match in (
        (
            "model.layers.0.mlp.up_proj.lora_B.default.weight",
            torch.zeros(16, 3),
            r"\[16, 3\], the cut model wants \[17",
        ),
        ("model.layers.9.mlp.up_proj.lora_B.default.weight", torch.zeros(17, 3), "no counterpart of the same rank"),
        ("model.layers.9.mlp.up_proj.weight", torch.zeros(17, 3), "does not have"),
        ("model.norm.weight", torch.zeros(2), r"wants \[48\]"),
    ):
        save_file({**tensors, name: wrong}, tmp_path / "wrong.safetensors", {SCALING: "2.0"})
        refused(match, adapters=tmp_path / "wrong.safetensors")
    save_file(tensors, tmp_path / "wrong.safetensors")
    refused("how its factors are scaled", adapters=tmp_path / "wrong.safetensors")
    refused("no file", adapters=tmp_path / "nowhere.safetensors")
    refused("give --plan or --run", plan=None, adapters=None)
    refused("holds no recipe.yaml", plan=None, adapters=None, run=tmp_path)

    shutil.copytree(source, tmp_path / "odd")
    odd = next(file for file in (tmp_path / "odd").glob("*.safetensors") if "model.norm.weight" in load_file(file))
    whole = load_file(odd)
    for change, match in (
        ({"model.normal.weight": torch.zeros(2)}, "model.normal.weight on disk has no counterpart"),
        ({"model.norm.weight": torch.zeros(2)}, r"\[2\] on disk, not \[48\]"),
        ({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}, "stored as I8"),
    ):
        save_file({**whole, **change}, odd)
        refused(match, model=tmp_path / "odd")
    save_file({name: tensor for name, tensor in whole.items() if name != "model.norm.weight"}, odd)
    refused("no tensor model.norm.weight", model=tmp_path / "odd")
    odd.write_bytes(odd.read_bytes()[:9])
    refused("damaged", model=tmp_path / "odd")

    def full(*args) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("regrow.checkpoint.stream.write_tensors", full)
    refused("no space left")


def test_a_plan_of_as_many_other_units_says_what_differs() -> None:
    configs = (LlamaConfig(**SIZES | {"hidden_size": width}, **HEADS, head_dim=8) for width in (48, 96))
    narrow, wide = (find_groups(AutoModelForCausalLM.from_config(config)) for config in configs)
    with pytest.raises(InputError, match=r"a unit of layers\.0\.attention has 2,304 parameters in it, 4,608 here"):
        check_plan(Plan.whole(narrow), wide, "it")


def test_a_file_is_written_as_safetensors_writes_it(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "c": torch.arange(6), "d": torch.zeros(0, 4),
        "e": torch.tensor(1.5),
    }  # fmt: skip
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "ours", described, tensors.items())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    stored = StoredTensors([tmp_path / "ours"])
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in tensors.items())


# --- adapters for later ---------------------------------------------------------------------------


def on_base(folder: Path, adapter: str = "adapter") -> PeftModel:
    base = load_model(str(folder / "base"), trust_remote_code=True)
    return PeftModel.from_pretrained(base, folder / adapter).eval()


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize("shape", ["uniform", "free"])
def test_a_run_can_keep_its_adapter(shape: str, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "output.keep_adapter": True, "pruning.shape": shape, "compensation.method": "least-squares"}
    result = regrow.prune(str(checkpoint), tmp_path / "run", "magnitude", data=str(text), steps=4, overrides=settings)
    merged = load_model(str(result.model), trust_remote_code=True)
    kept = on_base(result.folder)
    expected = logits(merged)
    assert (logits(kept) - expected).abs().max() < 1e-5
    with kept.disable_adapter():
        assert (logits(kept) - expected).abs().max() > 1e-3
    assert contents(regrow.apply(str(checkpoint), tmp_path / "again", run=result.folder)) == contents(result.model)

    # several adapters on one base: plain peft
    twice = Adapter.read(result.folder / "adapter")
    twice.factors.update({key: 2 * factor for key, factor in twice.factors.items() if key[1] == "B"})
    twice.write(result.folder / "twice")
    kept.load_adapter(str(result.folder / "twice"), "twice")
    kept.set_adapter("twice")
    assert (logits(kept) - logits(on_base(result.folder, "twice"))).abs().max() == 0
    assert (logits(kept) - expected).abs().max() > 1e-3
    kept.set_adapter("default")
    assert (logits(kept) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("family", "keep_of"), [("llama-gqa", uneven), ("qwen2", shallow), ("llama-biases", shallow)])
def test_an_adapter_is_carried_to_the_full_model_and_back(family: str, keep_of, tmp_path: Path) -> None:
    source = dense(family, tmp_path)
    whole, small = load_model(str(source)), load_model(str(source))
    groups = find_groups(whole)
    keep = keep_of(groups)
    (tmp_path / "plan.json").write_text(json.dumps(planned(groups, keep).to_json()))
    positions = index_map(whole, groups, keep)
    cut(small, groups, keep)
    torch.manual_seed(7)
    with_lora(small)
    trained = {name: p.detach() for name, p in small.named_parameters() if ".lora_" in name}
    adapter = Adapter.of_run(trained, Lora(rank=3, alpha=6), "base")
    adapter.write(tmp_path / "small")

    folder = regrow.scatter(tmp_path / "small", tmp_path / "full", plan=tmp_path / "plan.json", model=str(source))
    full = Adapter.read(folder)
    for (linear, factor), tensor in adapter.factors.items():
        before = positions.name_before(linear)
        assert positions.name_after(before) == linear
        wide, kept = (
            full.factors[before, factor],
            (positions.inputs if factor == "A" else positions.outputs).get(before),
        )
        axis = 1 if factor == "A" else 0
        assert wide.shape[axis] == whole.get_submodule(before).weight.shape[axis]
        assert torch.equal(wide if kept is None else kept.gather(wide, axis), tensor)
        assert wide.count_nonzero() == tensor.count_nonzero()

    PeftModel.from_pretrained(whole, folder)
    groups = find_groups(whole)
    with Gates(whole, groups.groups, groups.layers) as gates:
        for name, units in keep.items():
            gates.keep(name, units.tolist())
        for layer in {group.layer for group in groups if not len(keep[group.name])}:
            gates.set(f"layers.{layer}", torch.zeros(1))
        assert (logits(whole) - logits(small)).abs().max() < 1e-4
    assert (logits(whole) - logits(small)).abs().max() > 1e-2


def test_adapters_that_cannot_be_carried_are_refused(tmp_path: Path) -> None:
    source = dense("llama-gqa", tmp_path)
    in_memory(source, tmp_path, shallow)
    b = torch.zeros(10, 3)

    def refused(match: str, factors: dict, **config: object) -> None:
        Adapter({"peft_type": "LORA", "target_modules": ["q_proj"], **config}, factors).write(tmp_path / "small")
        with pytest.raises(InputError, match=match):
            regrow.scatter(tmp_path / "small", tmp_path / "full", plan=tmp_path / "plan.json", model=str(source))
        assert not (tmp_path / "full").exists()

    def pair(linear: str, b: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
        return {(linear, "A"): torch.zeros(3, 48), (linear, "B"): b}

    refused("not of a model pruned by this plan", pair("model.layers.0.self_attn.q_proj", torch.zeros(7, 3)))
    refused("factors for model.layers.9.up, which is no linear", pair("model.layers.9.up", b))
    refused("layers change their numbers", pair("lm_head", torch.zeros(64, 3)), rank_pattern={"layers.1.up_proj": 2})
    save_file({"base_model.model.x.lora_magnitude_vector": b}, tmp_path / "small" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="lora_magnitude_vector is no LoRA factor"):
        Adapter.read(tmp_path / "small")
    with pytest.raises(InputError, match="give a PEFT adapter's folder"):
        regrow.scatter(tmp_path, tmp_path / "full", plan=tmp_path / "plan.json", model=str(source))


def test_the_verbs(command: CommandLine, tmp_path: Path) -> None:
    source = dense("llama-gqa", tmp_path)
    in_memory(source, tmp_path, even)
    done = command(
        "apply", source, "--plan", tmp_path / "plan.json", "--adapters", tmp_path / "adapters.safetensors",
        "--shard-size", SHARD, "--out", tmp_path / "streamed",
    )  # fmt: skip
    assert (done.code, done.stdout) == (0, f"{tmp_path / 'streamed'}: a plain checkpoint\n")
    streamed, saved = contents(tmp_path / "streamed"), contents(tmp_path / "memory")
    for files in (streamed, saved):
        del files["tokenizer_config.json"]  # says whether its process was offline
    assert streamed == saved
    done = command("apply", source, "--plan", tmp_path / "plan.json", "--out", tmp_path / "streamed")
    assert (done.code, done.stdout, "not empty" in done.complaint) == (2, "", True)
    done = command("apply", source, "--plan", tmp_path / "plan.json", "--out", tmp_path / "new", "--shard-size", "5")
    assert (done.code, "shard_size" in done.complaint) == (2, True)
    tensors = load_file(tmp_path / "adapters.safetensors")
    Adapter.of_run(tensors, Lora(rank=3, alpha=6), "base").write(tmp_path / "small")
    done = command(
        "scatter", tmp_path / "small", "--plan", tmp_path / "plan.json", "--model", source, "--out", tmp_path / "full"
    )
    assert (done.code, done.stdout) == (0, f"{tmp_path / 'full'}: a PEFT adapter of {source}\n")


# --- before a run ---------------------------------------------------------------------------------


NF4 = 0.5 + 1 / 64 + 4 / 64 / 256
"""Bytes of a weight, its share of the scales and of their own among them."""
SIXTEEN_TOKENS = {
    "lora.rank": 2, "lora.dropout": 0.0, "training.batch_size": 2, "data.sequence_length": 8, "pruning.sparsity": 0.5,
    "pruning.calibration_batches": 1,
}  # fmt: skip
# The checkpoint: hidden 32, channels 48, 4 query and 2 KV heads of 12, 3 layers, 300 tokens.
LINEARS, INTERNALS = 3 * (32 * 48 * 2 + 32 * 24 * 2 + 3 * 32 * 48), 16 * (8 * 32 + 4 * 48)
RECOMPUTED = 4 * 3 * INTERNALS - 4 * (16 * 3 * 32 + INTERNALS)
"""Bytes of activations that checkpointing saves."""


def test_the_memory_model_of_refits_counts_the_largest_consumer_and_the_hidden_states(checkpoint: Path) -> None:
    settings = {**SIXTEEN_TOKENS, "compensation.windows": 6, "search.windows": 10, "search.judge_windows": 2}
    recipe = load_recipe("regrow", settings)
    model = load_model(str(checkpoint))
    sizes = Sizes.of(model, find_groups(model), recipe)

    def compensate(**changes: object) -> int:
        changed = recipe.override({key.replace("__", "."): value for key, value in changes.items()})
        return estimate_memory(sizes, changed, frozenset(), torch.float32, torch.bfloat16)["compensate"] - OVERHEAD

    held = 4 * sizes.parameters + 8 * sizes.adapters
    walked, solved = 2 * 2 * 10 * recipe.data.sequence_length * 32, 24 * 48 * (48 + 32)
    assert compensate() == held + solved + walked
    assert compensate(search__evaluations=0) == held + solved + walked * 6 // 10
    assert "compensate" not in estimate_memory(
        sizes, recipe.override({"compensation.method": "none"}), frozenset(), torch.float32, torch.float32
    )


def test_the_memory_model_of_finalists_counts_a_step_on_the_whole_model(checkpoint: Path) -> None:
    recipe = load_recipe("regrow", SIXTEEN_TOKENS)
    model = load_model(str(checkpoint))
    sizes = Sizes.of(model, find_groups(model), recipe)

    def finalists(**changes: object) -> int | None:
        changed = recipe.override({key.replace("__", "."): value for key, value in changes.items()})
        found = estimate_memory(sizes, changed, frozenset(), torch.float32, torch.float32)
        return found.get("train finalists")

    assert finalists() is finalists(search__evaluations=0, search__finalists=3) is None
    trained = finalists(compensation__carrier="adapter")
    assert trained == OVERHEAD + 4 * sizes.parameters + 16 * sizes.adapters + 4 * 3 * INTERNALS + 8 * 16 * 300
    assert finalists(search__finalists=3) == trained
    assert finalists(search__finalists=3, pruning__shape="free") is None


def test_the_memory_model_of_refits_counts_the_experts_that_are_measured_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, vocab_size=64, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    recipe = load_recipe("regrow", {"lora.rank": 4, "compensation.windows": 1, "search.evaluations": 0})

    def refit() -> int:
        sizes = Sizes.of(model, find_groups(model), recipe)
        found = estimate_memory(sizes, recipe, frozenset(), torch.float32, torch.float32)["compensate"]
        return found - OVERHEAD - 4 * sizes.parameters - 8 * sizes.adapters - 2 * 4 * recipe.data.sequence_length * 32

    assert refit() == 24 * 96 * (96 + 32) + 3 * 8 * 96**2
    monkeypatch.setattr("regrow.compensation.moments.GRAMS", 8 * 96**2 * 2)  # two experts at a time
    assert refit() == 24 * 96 * (96 + 32) + 8 * 96**2


def test_the_memory_model_counts_the_factors_of_experts() -> None:
    model = zoo.build("Mixtral")
    recipe = load_recipe("magnitude", {"lora.rank": 4, "lora.targets": ["gate_up_proj", "down_proj"]})
    sizes = Sizes.of(model, find_groups(model), recipe)
    # 3 layers of 4 experts, hidden 64, 40 channels, two experts a token: half of the rank each.
    assert sizes.adapters == 3 * 4 * 2 * ((64 + 80) + (40 + 64))


def test_the_memory_model_of_training_counts_what_a_recipe_asks_for(checkpoint: Path) -> None:
    recipe = load_recipe("magnitude", SIXTEEN_TOKENS)
    model = load_model(str(checkpoint))
    sizes, linears, internals = Sizes.of(model, find_groups(model), recipe), LINEARS, INTERNALS
    assert (sizes.parameters, sizes.block_parameters) == (linears + 3 * 64 + 32 + 2 * 300 * 32, linears)
    assert sizes.adapters == 3 * 2 * (2 * (32 + 48) + 2 * (32 + 24) + 3 * (32 + 48))
    assert sizes.gram == 3 * (48**2 + 48**2)

    def train(**settings: object) -> int:
        changed = recipe.override({key.replace("__", "."): value for key, value in settings.items()})
        return estimate_memory(sizes, changed, frozenset(), torch.float32, torch.float32)["train"] - OVERHEAD

    left, logits_BTV = sizes.parameters - linears // 2, 16 * 300
    step = 20 * sizes.adapters + 4 * 3 * internals + 8 * logits_BTV
    assert train() == 4 * left + step
    lesson = 4 * logits_BTV
    assert train(distillation__weight=0.7) == train() + 4 * sizes.parameters + lesson
    assert train(distillation__weight=0.7, distillation__teacher="self") == train() + 4 * linears // 2 + lesson
    assert train(distillation__weight=0.7, distillation__teacher="cached") == train()
    others = 4 * (sizes.parameters - linears)
    assert train(training__quantization="int8") == others + linears // 2 + step
    assert train(training__quantization="nf4") == others + round(linears * NF4) + step, "an nf4 base is cut at the end"
    parted = recipe.override({"training.offload": "shards", "training.gradient_checkpointing": True})
    assert sizes.matrices == linears
    each = [
        estimate_memory(sizes, parted, frozenset(), torch.float32, torch.float32, count)["train"] for count in (2, 4)
    ]
    assert each[0] - each[1] == 4 * (linears - linears // 2) // 4, "half of them is left"
    # Dropout keeps the linears' inputs a second time, with a mask of bytes: five are hidden wide, one heads, one F.
    wet = recipe.override({"lora.dropout": 0.1})
    more = Sizes.of(model, find_groups(model), wet)
    assert more.dropped == 3 * (5 * 32 + 48 + 48)
    assert estimate_memory(more, wet, frozenset(), torch.float32, torch.float32)["train"] == (
        train() + OVERHEAD + 16 * more.dropped * 5
    )
    some = wet.override({"lora.targets": ["down_proj"]})
    assert Sizes.of(model, find_groups(model), some).dropped == 3 * 48
    assert Sizes.of(model, find_groups(model), some).adapters == 3 * 2 * (32 + 48)
    # Nothing is counted as gone where the recipe does not say in advance how much will be.
    for unknown in ({"pruning__target": "params=40K"}, {"pruning__basis": "total"}):
        assert train(**unknown) == train() + 4 * (linears // 2)
    share, layer_by_layer = {"training__original_share": 0.2}, {"training__gradient_checkpointing": True}
    assert train(training__quantization="int8", **share) == others + linears + step, "it is cut later"
    assert train(training__quantization="nf4", **share) == train(training__quantization="nf4"), (
        "the last steps need less"
    )
    # a third of the layers in 32 bits is more than all of them in 4
    bound = train(training__quantization="nf4", **layer_by_layer) - round(linears * NF4) + 4 * linears // 2 // 3
    assert train(training__quantization="nf4", **layer_by_layer, **share) == bound, (
        "a layer of three is more than 4 bits"
    )
    assert train(**share) == train()
    assert train(training__gradient_checkpointing=True) == train() - RECOMPUTED


def test_the_memory_model_of_scoring_and_saving_counts_what_a_recipe_asks_for(checkpoint: Path) -> None:
    recipe = load_recipe("magnitude", SIXTEEN_TOKENS)
    model = load_model(str(checkpoint))
    sizes, linears = Sizes.of(model, find_groups(model), recipe), LINEARS
    left, others = sizes.parameters - linears // 2, 4 * (sizes.parameters - linears)
    found = estimate_memory(sizes, recipe, frozenset({"weight"}), torch.float32, torch.float32)
    step = 8 * sizes.adapters + 4 * 3 * INTERNALS + 8 * 16 * 300
    assert found["score"] - OVERHEAD == 4 * (sizes.parameters + linears) + step
    assert found["save"] - OVERHEAD == 8 * left
    in_4_bits = recipe.override({"training.quantization": "nf4", "training.original_share": 0.2})
    scored = estimate_memory(sizes, in_4_bits, frozenset({"gate"}), torch.float32, torch.float32)["score"]
    assert scored - OVERHEAD == others + round(linears * NF4) + 4 * sizes.matrices // 3 + step - RECOMPUTED

    def save(streamed: bool = False, **settings: object) -> int:
        changed = recipe.override({key.replace("__", "."): value for key, value in settings.items()})
        found = estimate_memory(sizes, changed, frozenset(), torch.float32, torch.float32, streamed=streamed)
        return found["save"] - OVERHEAD

    assert save(output__dtype="bfloat16") == (4 + 2) * left
    assert save(output__dtype="bfloat16", training__quantization="int8") == max(4 * sizes.parameters, 6 * left)
    from_files = 2 * round(4 * (left - sizes.matrices + linears // 2) + 4 * linears / 2 / 3)
    assert [save(True, training__offload=place) for place in ("cpu", "disk", "shards")] == [from_files] * 3
    assert save(True, training__quantization="nf4") == from_files


def test_a_run_that_cannot_fit_is_refused_before_it_begins(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("regrow", {"device": "cpu", "distillation.teacher": "auto"})
    skeleton = load_skeleton(str(checkpoint))
    given = str(checkpoint), skeleton, find_groups(skeleton)
    assert re.fullmatch(
        r"memory, estimated: score \d+ MiB, compensate \d+ MiB, train \d+ MiB, save \d+ MiB; [\d.]+ [GM]iB free on cpu",
        check_memory(*given, recipe),
    )
    monkeypatch.setattr("regrow.preflight.free_memory", lambda device: 2**20)
    with pytest.raises(InputError, match=r"will need about .*teacher=cached.*gradient_checkpointing.*batch_size"):
        regrow.prune(str(checkpoint), tmp_path / "out", recipe, data=str(text))
    assert not (tmp_path / "out").exists()
    check_memory(*given, recipe.override({"training.check_memory": False}))


def test_a_teacher_that_would_fill_the_disk_is_refused_before_anything_is_scored(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = load_config(str(checkpoint)), tmp_path / "not" / "there"
    recipe = load_recipe("regrow", {"training.steps": 2, "training.batch_size": 3, "data.sequence_length": 33})
    position = 8 * min(recipe.distillation.top_k, config.vocab_size) + 4
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=5 * (8 + 32 * position)))
    check_disk(out, config, recipe, windows=5)
    for other in ({"distillation.teacher": "auto"}, {"distillation.weight": 0.0}):
        check_disk(out, config, recipe.override(other), windows=1000)
    with pytest.raises(InputError, match=r"will take about .* of disk, .* free: choose another --out, .*top_k"):
        check_disk(out, config, recipe, windows=1000)
    with pytest.raises(InputError, match="of disk"):
        regrow.prune(str(checkpoint), tmp_path / "out", data=str(text), steps=4, overrides={"distillation.top_k": 64})
    assert not (tmp_path / "out" / "scores.safetensors").exists()
