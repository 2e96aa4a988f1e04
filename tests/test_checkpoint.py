"""Saved ≡ reloaded by stock transformers in a process of its own, for every family and shape."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import FAMILIES, build, logits, make_tokenizer, random_keep, uniform_keep, with_lora
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, RobertaConfig

import regrow
from regrow.checkpoint.files import check_folder, new_folder, write_json
from regrow.checkpoint.load import load_model, load_skeleton, load_tokenizer
from regrow.checkpoint.save import needs_remote_code, save_checkpoint
from regrow.checkpoint.shape import describe, layer_widths, pruned_config
from regrow.checkpoint.verify import Verification, verify_checkpoint
from regrow.errors import InputError, first_sentence
from regrow.planning.plan import Plan
from regrow.structure.adapters import merge_lora
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))


def pruned(family: str, keep_of) -> tuple:
    model = build(family)
    whole = find_groups(model)
    groups = with_lora(model)
    left = cut(model, groups, keep_of(groups))
    merge_lora(model)
    describe(model, whole, left)
    return model, left


def save(model, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    make_tokenizer(folder.parent / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "tokenizer")
    save_checkpoint(model, tokenizer, folder, dtype=dtype, shard_size="20KB", extras={"README.md": "# a card\n"})
    return folder


def test_a_check_with_regrow_in_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="had imported regrow"):
        Verification("LlamaForCausalLM", "5", 0.0, 1.0, regrow_imported=True).check(tmp_path)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-biases", "mistral", "qwen2", "qwen3-tied"])
def test_a_fresh_process_computes_the_same(family: str, tmp_path: Path) -> None:
    model, _ = pruned(family, lambda groups: uniform_keep(groups, heads=1, channels=17))
    folder = save(model, tmp_path / "model")
    assert len(list(folder.glob("*.safetensors"))) > 1
    verification = verify_checkpoint(model, folder, IDS)
    assert verification.passed
    assert verification.difference < 1e-4
    assert not verification.regrow_imported
    assert verification.model_class == ("LlamaForCausalLM" if family == "qwen2" else type(model).__name__)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (1, 17)
    assert config["head_dim"] == model.model.layers[0].self_attn.head_dim


def test_a_llama_whose_heads_no_longer_divide_its_width_is_saved_as_mistral(tmp_path: Path) -> None:
    model, _ = pruned("llama-mha-tied", lambda groups: uniform_keep(groups, heads=5, channels=20))
    verification = verify_checkpoint(model, save(model, tmp_path / "model"), IDS)
    assert verification.model_class == "MistralForCausalLM"
    assert verification.passed


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "qwen3-tied"])
def test_uneven_layers_reload_with_their_own_modeling_file(family: str, tmp_path: Path) -> None:
    model, _ = pruned(family, lambda groups: random_keep(groups, 4))
    folder = save(model, tmp_path / "model")
    assert needs_remote_code(folder)
    verification = verify_checkpoint(model, folder, IDS)
    assert verification.passed
    reloaded = load_model(str(folder), trust_remote_code=True)
    assert torch.equal(logits(model), logits(reloaded))
    ids = reloaded.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    step_by_step = IDS[:1]
    for _ in range(5):
        following = reloaded(input_ids=step_by_step, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        step_by_step = torch.cat([step_by_step, following], 1)
    assert torch.equal(ids, step_by_step)
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_model(str(folder))


def test_the_probe_would_notice_a_wrong_checkpoint(tmp_path: Path) -> None:
    model, _ = pruned("llama-gqa", lambda groups: uniform_keep(groups, heads=2, channels=30))
    folder = save(model, tmp_path / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1.0
    assert not verify_checkpoint(model, folder, IDS).passed


def test_bfloat16_is_saved_and_verified_in_bfloat16(tmp_path: Path) -> None:
    model, _ = pruned("llama-gqa", lambda groups: uniform_keep(groups, heads=2, channels=30))
    folder = save(model, tmp_path / "model", torch.bfloat16)
    assert verify_checkpoint(model, folder, IDS).passed
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_config_says_how_wide_each_layer_is(family: str) -> None:
    model = build(family)
    whole = find_groups(model)
    left = cut(model, whole, random_keep(whole, 1))
    for number, layer in enumerate(layer_widths(model.config, whole, left)):
        attention = model.model.layers[number].self_attn
        assert attention.q_proj.weight.shape[0] == layer["num_attention_heads"] * attention.head_dim
        assert attention.k_proj.weight.shape[0] == layer["num_key_value_heads"] * attention.head_dim
        assert model.model.layers[number].mlp.up_proj.weight.shape[0] == layer["intermediate_size"]


def test_a_llama_with_biases_and_odd_heads_is_a_granite() -> None:
    """Neither its own config class nor Mistral's takes it; that it computes the same is tested with FLAP's biases."""
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=6, attention_bias=True))
    whole = find_groups(model)
    left = cut(model, whole, {g.name: np.arange(5) for g in whole if g.kind == "attention"})
    config = pruned_config(model.config, whole, left)
    assert (config.model_type, config.num_attention_heads, config.attention_bias) == ("granite", 5, True)
    assert config.attention_multiplier == pytest.approx(8**-0.5)


def test_a_skeleton_has_the_groups_of_the_model(checkpoint: Path) -> None:
    bones = find_groups(load_skeleton(str(checkpoint)))
    model = find_groups(load_model(str(checkpoint)))
    assert bones.to_json() == model.to_json()


# --- files ------------------------------------------------------------------------------------


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), new_folder(target) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with new_folder(target) as partial:
            (partial / "file").write_text(content)
    assert (target / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_mount_point_is_filled_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "volume"
    target.mkdir()
    (target / ".lock").touch()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == target)
    with pytest.raises(RuntimeError), new_folder(target) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    with new_folder(target) as partial:
        assert partial.parent == target
        for name in ("config.json", "weights"):
            (partial / name).write_text(name)
        (partial / "weights").chmod(0o400)
    assert {path.name: path.stat().st_mode & 0o777 for path in target.iterdir()} == dict.fromkeys(
        [".lock", "config.json", "weights"], (target / ".lock").stat().st_mode & 0o777
    )


def test_the_present_folder_and_links_are_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere" / "here").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/here", target_is_directory=True)
    with new_folder(tmp_path / "link") as partial:
        (partial / "file").write_text("first")
    assert (tmp_path / "elsewhere" / "here" / "file").read_text() == "first"
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with new_folder(Path()) as partial:
        (partial / "file").write_text("second")
    assert Path("file").read_text() == "second", "and whoever stands in it sees it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_transformers_keeps_in_float32_stays_so(in_memory: bool, tmp_path: Path) -> None:
    zoo.build("ERNIE 4.5 MoE").bfloat16().save_pretrained(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "stock")
    make_tokenizer(tmp_path / "stock")
    stock = load_file(tmp_path / "stock" / "model.safetensors")
    assert {tensor.dtype for tensor in stock.values()} == {torch.float32, torch.bfloat16}
    if in_memory:
        model = load_model(str(tmp_path / "stock"))
        save_checkpoint(
            model, AutoTokenizer.from_pretrained(tmp_path / "stock"), tmp_path / "ours", dtype=torch.bfloat16,
            shard_size="5GB", extras={},
        )  # fmt: skip
    else:
        plan = Plan.whole(find_groups(load_model(str(tmp_path / "stock"))))
        (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
        regrow.apply(str(tmp_path / "stock"), tmp_path / "ours", plan=tmp_path / "plan.json")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: t.dtype for name, t in stock.items()}
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_only_an_empty_folder_or_a_run_is_taken(tmp_path: Path) -> None:
    assert not check_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not check_folder(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        check_folder(tmp_path / "full")
    with pytest.raises(InputError, match="is a file"):
        check_folder(tmp_path / "full" / "thesis.txt")
    write_json(tmp_path / "new" / "run.json", {})
    assert check_folder(tmp_path / "new")


def test_a_model_that_sees_what_follows_is_refused(tmp_path: Path) -> None:
    small = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    for name, seeing in (("encoder", False), ("decoder", True)):
        config = RobertaConfig(**small, num_attention_heads=2, max_position_embeddings=16, is_decoder=seeing)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match=r'sees the tokens that it is to predict.*"is_decoder": true'):
        load_model(str(tmp_path / "encoder"))
    load_model(str(tmp_path / "decoder"))


def test_a_causal_model_that_is_no_decoder_by_its_config_is_taken(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(zoo.FAMILIES["GPT-NeoX"]())
    model.save_pretrained(tmp_path)
    assert model.config.is_decoder is False
    load_model(str(tmp_path))


def test_the_tokenizer_is_loaded(checkpoint: Path) -> None:
    assert load_tokenizer(str(checkpoint)).bos_token_id == 0


@pytest.mark.parametrize(
    ("said", "first"),
    [
        ("No class a.b.C in 2.1. Set it. Then try.", "No class a.b.C in 2.1"),
        ("Give a `dtype`, e.g. `x` or i.e. Y.", "Give a `dtype`, e.g. `x` or i.e. Y"),
        ("It has none. `use_cache` is off", "It has none"),
        ("Chars may be '-' or '.'. The name is longer", "Chars may be '-' or '.'"),
        ("401 Client Error. (Request ID: 1.2)", "401 Client Error. (Request ID: 1.2)"),
    ],
)
def test_of_what_a_library_says_the_first_sentence_is_told(said: str, first: str) -> None:
    assert first_sentence(said) == first
