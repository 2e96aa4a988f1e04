"""Quantised frozen bases: what is trained on one is what the original checkpoint gets."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, build, go_through, make_tokenizer, random_keep, with_lora
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

import regrow
from regrow.checkpoint.load import load_model, load_tokenizer
from regrow.checkpoint.verify import Verification
from regrow.data.corpus import read_corpus
from regrow.data.tokens import Batch, batches
from regrow.errors import InputError
from regrow.planning.plan import Plan
from regrow.progress import Silent
from regrow.recipe import load_recipe
from regrow.recovery.learner import Learner
from regrow.recovery.pruner import Pruner
from regrow.recovery.quantised_base import rebuild, settle_quantization
from regrow.recovery.scoring import linear_evidence
from regrow.recovery.teacher import copy_without_adapters
from regrow.structure.adapters import adapter_parameters, adapters_off, merge_lora
from regrow.structure.cut import cut
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups, find_groups
from regrow.structure.quantised import dequantised, held_bytes, is_quantised, kept_as, quantised_linears, release

bitsandbytes = pytest.importorskip("bitsandbytes")

BOTH = pytest.mark.parametrize("kind", ["int8", "nf4"])
ERROR = {"int8": 0.01, "nf4": 0.11}
"""Largest relative error of a random normal weight."""
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 (biases on q, k and v) whose rows end where nf4's blocks of 64 do, and a tokenizer."""
    place = tmp_path_factory.mktemp("aligned") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 128}
    model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **heads, **tokens))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(place)
    make_tokenizer(place)
    return place


def data(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield Batch(torch.randint(0, 300, (3, 12), generator=generator))


def answers(model: PreTrainedModel) -> Tensor:
    """Logits as training computes them: with 8-bit weights, but not 8-bit activations."""
    model.train()
    with torch.no_grad():
        return model(input_ids=next(data(7)).ids_BT, use_cache=False).logits


def plain_twin(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model of full precision that has a quantised one's rounded weights."""
    twin = load_model(str(folder))
    names = {id(module): name for name, module in model.named_modules()}
    for linear in quantised_linears(model):
        name = names[id(linear)].removesuffix(".base_layer")
        twin.get_parameter(f"{name}.weight").data.copy_(dequantised(linear))
    return twin


@BOTH
def test_the_linears_of_the_layers_are_quantised_and_nothing_else(folder: Path, kind: str) -> None:
    whole, model = load_model(str(folder)), load_model(str(folder), quantization=kind)
    names = {name for name, p in model.named_parameters() if kept_as(p)}
    assert names == {f"{name}.weight" for name in find_groups(whole).linears}
    assert not hasattr(model.config, "quantization_config")
    for name in names:
        weight, rounded = whole.get_parameter(name), dequantised(model.get_submodule(name.removesuffix(".weight")))
        assert 0 < (rounded - weight).norm() / weight.norm() < ERROR[kind]
    assert find_groups(model).to_json() == find_groups(whole).to_json()
    with_lora(model)
    with_lora(whole)
    assert find_groups(model).to_json() == find_groups(whole).to_json()
    blocks = sum(whole.get_submodule(name).weight.numel() for name in find_groups(whole).linears)
    saved = held_bytes(whole) - held_bytes(model)
    assert saved / blocks == pytest.approx(4 - {"int8": 1, "nf4": 0.516}[kind], abs=0.1)


def test_four_bits_need_rows_of_whole_blocks_on_a_cpu(tmp_path: Path) -> None:
    build("llama-gqa").save_pretrained(tmp_path)
    assert not is_quantised(load_model(str(tmp_path), quantization="nf4"))
    assert is_quantised(load_model(str(tmp_path), quantization="int8"))


def test_an_int8_cut_is_exact(folder: Path) -> None:
    model = load_model(str(folder), quantization="int8")
    groups = with_lora(model)
    keep = random_keep(groups, seed=3)
    with Gates(model, groups.groups) as gates:
        for name, units in keep.items():
            gates.keep(name, units)
        masked = answers(model)
    pieces = [
        (piece, keep[group.name])
        for group in groups
        for piece in group.slices
        if not piece.is_adapter and piece.parameter.endswith("weight")
    ]
    whole = {piece.parameter: linear_evidence(model, piece).weight for piece, _ in pieces}
    cut(model, groups, keep)
    assert (answers(model) - masked).abs().max() < 1e-5
    for piece, units in pieces:
        stay = torch.from_numpy(np.sort(piece.index[units].reshape(-1)))
        linear = model.get_submodule(piece.parameter.removesuffix(".weight"))
        assert torch.equal(dequantised(linear), whole[piece.parameter].index_select(piece.axis, stay))
        assert (linear.out_features, linear.in_features) == linear.weight.shape


def train_on(model: PreTrainedModel, name: str, cut_early: bool) -> tuple[Pruner, list[float], Groups]:
    settings = {"training.steps": STEPS, "pruning.interval": 2, "pruning.calibration_batches": 2}
    settings |= {"training.learning_rate": 3e-3, "lora.dropout": 0.0, "pruning.protect_last": 0}
    recipe = load_recipe("loraprune", settings | {"pruning.criterion": name})
    groups = with_lora(model, fill=False)
    learner = Learner(model, recipe.training, data())
    with Pruner(model, groups, recipe, learner, data(1), cut_early=cut_early) as pruner:
        losses = go_through(pruner, STEPS)
        pruner.settle()
    return pruner, losses, groups


@pytest.mark.parametrize("criterion", ["lora", "gate-fisher"])
def test_an_int8_base_cut_early_is_one_masked_to_the_end(folder: Path, criterion: str) -> None:
    torch.manual_seed(0)
    early, early_losses, _ = train_on(load_model(str(folder), quantization="int8"), criterion, cut_early=True)
    torch.manual_seed(0)
    late, late_losses, _ = train_on(load_model(str(folder), quantization="int8"), criterion, cut_early=False)
    late.finish()
    assert early.plan == late.plan
    assert early_losses == pytest.approx(late_losses, abs=1e-4)
    assert (answers(early.model) - answers(late.model)).abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "criterion"), [("int8", "lora"), ("nf4", "gate-fisher")])
def test_what_is_trained_computes_the_same_on_plain_weights(folder: Path, kind: str, criterion: str) -> None:
    model = load_model(str(folder), quantization=kind)
    twin = plain_twin(model, folder)
    pruner, losses, _ = train_on(model, criterion, cut_early=kind == "int8")
    assert losses[0] != pytest.approx(losses[-1], abs=1e-3)
    with pruner.gates:
        trained = answers(model)
    pruner.finish()
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
    with_lora(twin)
    rebuild(twin, pruner.plan, adapters)
    assert (answers(twin) - trained).abs().max() < 1e-4
    merge_lora(twin)
    assert (answers(twin) - trained).abs().max() < 1e-4


def test_four_bit_weights_are_not_repacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)  # the trap needs no such machine
    model = load_model(str(folder), quantization="nf4")
    with_lora(model)
    before = [dequantised(linear) for linear in quantised_linears(model)]
    wanted = answers(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=next(data(7)).ids_BT, use_cache=False)
    assert all(torch.equal(dequantised(now), was) for now, was in zip(quantised_linears(model), before, strict=True))
    assert torch.equal(answers(model), wanted)
    Learner(model, load_recipe().training, data()).backward(data())
    assert all(factor.grad is not None and factor.grad.any() for factor in adapter_parameters(model))

    for linear in quantised_linears(model):  # and if ever they are, nothing is computed from the garbage
        linear.support_avx512bf16_for_cpu = True
    model.eval()
    with torch.no_grad():
        model(input_ids=next(data(7)).ids_BT, use_cache=False)
    with pytest.raises(AssertionError, match="repacked"):
        dequantised(next(iter(quantised_linears(model))))


@BOTH
def test_a_copy_is_whole_and_its_own(folder: Path, kind: str) -> None:
    model = load_model(str(folder), quantization=kind)
    alone = held_bytes(model)
    groups = with_lora(model)
    with adapters_off(model):
        dense = answers(model)
    teacher = copy_without_adapters(model, None)
    assert torch.equal(answers(teacher), dense)
    assert held_bytes(teacher) == alone
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    cut(model, groups, random_keep(groups, seed=1))
    del model
    assert torch.equal(answers(teacher), dense)


@BOTH
def test_no_full_copy_of_the_base_is_kept(folder: Path, kind: str) -> None:
    def of_full_size() -> int:
        gc.collect()
        # An export elsewhere may have left fake tensors of symbolic shapes, which are of a type of their own.
        tensors = [item for item in gc.get_objects() if type(item) in (Tensor, torch.nn.Parameter)]
        shapes = {(128, 64), (64, 128), (64, 64)}
        return sum(t.is_floating_point() and tuple(t.shape) in shapes and t.device.type != "meta" for t in tensors)

    before = of_full_size()
    model = load_model(str(folder), quantization=kind)
    pruner, _, _ = train_on(model, "lora", cut_early=kind == "int8")
    assert of_full_size() <= before
    del pruner
    release(model)
    assert all(p.device.type == "meta" for p in model.parameters())


@BOTH
def test_nothing_is_merged_into_a_quantised_base(folder: Path, kind: str) -> None:
    model = load_model(str(folder), quantization=kind)
    with_lora(model)
    with pytest.raises(AssertionError, match="quantised base"):
        merge_lora(model)


def reloaded(model: PreTrainedModel, folder: Path, ids: Tensor) -> Verification:
    """As `verify_checkpoint`, in this process."""
    stock = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        difference = (stock(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
    return Verification(type(stock).__name__, "", float(difference), 1e-5, False)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (
            "nf4",
            {
                "search.evaluations": 4, "search.windows": 4, "search.judge_windows": 4, "compensation.windows": 4,
                "distillation.teacher": "auto",
            },
        ),
        ("int8", {"search.evaluations": 0, "compensation.windows": 4, "distillation.teacher": "model"}),
    ],
)  # fmt: skip
def test_the_default_recipe_ends_in_a_plain_checkpoint(
    folder: Path, text: Path, tmp_path: Path, lean: None, monkeypatch: pytest.MonkeyPatch, kind: str, settings
) -> None:
    monkeypatch.setattr("regrow.walk.verify_checkpoint", reloaded)
    given = {**QUICK, "lora.rank": 4, **settings}
    result = regrow.prune(str(folder), tmp_path, data=str(text), sparsity=0.4, steps=4, quantize=kind, overrides=given)
    config = json.loads((result.model / "config.json").read_text())
    assert "quantization_config" not in config
    assert "adapter" in (tmp_path / "recipe.yaml").read_text().split("carrier:")[1][:9]
    assert result.results["training"]["quantization"]["kind"] == kind
    assert kind in (tmp_path / "report.md").read_text()
    used = result.results["training"]["distillation"]
    assert used["teacher_steps"] == ({"self": 4} if kind == "nf4" else {"model": 4})
    assert result.plan.sparsity.block >= 0.4
    stock = AutoModelForCausalLM.from_pretrained(result.model)
    assert {p.dtype for p in stock.parameters()} == {torch.float32}


@BOTH
def test_without_training_the_original_weights_are_cut(
    folder: Path, text: Path, tmp_path: Path, lean: None, kind: str
) -> None:
    result = regrow.prune(
        str(folder), tmp_path, "magnitude", data=str(text), sparsity=0.4, steps=0, quantize=kind, overrides=QUICK
    )
    model = load_model(str(folder))
    groups = find_groups(model)
    cut(model, groups, result.plan.positions_within(Plan.whole(groups)))
    saved = AutoModelForCausalLM.from_pretrained(result.model).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pruning.criterion": "taylor"}, "pruning.criterion=taylor"),
        ({"analysis.enabled": True, "analysis.criterion": "taylor-vector"}, "analysis.criterion=taylor-vector"),
        ({"pruning.schedule": "cubic"}, "pruning.schedule=one-shot"),
    ],
)
def test_what_a_quantised_base_cannot_do_is_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        settle_quantization(load_recipe("regrow", {"training.quantization": "int8", **settings}), Silent())


def test_without_bitsandbytes_it_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.structure.quantise.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"regrow\[quant\]"):
        load_model(str(folder), quantization="nf4")


def spearman(first: Tensor, second: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("criterion", ["gate-fisher", "lora"])
def test_int8_scores_rank_as_those_of_the_whole_weights(real_data: Path, criterion: str) -> None:
    name, source = real_data / "models" / "stories3M", real_data / "text" / "tinystories" / "valid.jsonl"
    given = {"data.source": str(source), "pruning.criterion": criterion, "pruning.schedule": "one-shot"}
    recipe = load_recipe("loraprune", given | {"pruning.calibration_batches": 3, "pruning.ema": None})
    corpus, _ = read_corpus(recipe.data, load_tokenizer(str(name)), max_tokens=8000, eval_windows=2, seed=0)
    scores = {}
    for quantization in ("none", "int8"):
        torch.manual_seed(0)
        model = load_model(str(name), quantization=quantization)
        groups = with_lora(model, rank=8, fill=False)
        calibration = batches(corpus.train, 4, 1)
        with Pruner(model, groups, recipe, Learner(model, recipe.training, calibration), calibration) as pruner:
            pruner.calibrate()
        found = pruner.scorer.average.scores
        scores[quantization] = {group.name: found[group.name] for group in groups if group.kind == "ffn"}
    assert min(spearman(scores["none"][name], scores["int8"][name]) for name in scores["none"]) >= 0.98
