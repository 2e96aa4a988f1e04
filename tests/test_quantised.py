"""Quantised frozen bases: what is trained on one is what the original checkpoint gets."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK, build, go_through, make_tokenizer, random_keep, with_lora
from safetensors.torch import load_file, save_file
from test_resume import Calling, Fault, assert_same, corpus
from test_target import TABLE
from torch import Tensor
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, PreTrainedModel, Qwen2Config

import regrow
from regrow.aim import Aim
from regrow.checkpoint.journal import Forgetful, Journal
from regrow.checkpoint.load import load_model, load_skeleton, load_tokenizer
from regrow.checkpoint.offloaded import load
from regrow.checkpoint.originals import Originals
from regrow.checkpoint.state import State
from regrow.checkpoint.stock import prunable_groups
from regrow.checkpoint.verify import Verification, merge
from regrow.data.corpus import read_corpus
from regrow.data.tokens import Batch, batches
from regrow.errors import InputError
from regrow.planning.plan import Plan
from regrow.planning.target import parse_target
from regrow.progress import Silent
from regrow.recipe import load_recipe
from regrow.recovery.average import Average
from regrow.recovery.compensate import Compensated, Compensator
from regrow.recovery.learner import SECOND_PEAK, Learner
from regrow.recovery.outcome import Trained
from regrow.recovery.pruner import CutEvent, Pruner
from regrow.recovery.quantised_base import rebuild, settle_originals, settle_quantization
from regrow.recovery.scoring import linear_evidence
from regrow.recovery.teacher import copy_without_adapters
from regrow.recovery.train import train
from regrow.structure import offload
from regrow.structure.adapters import adapter_parameters, adapters_off, attach_lora, merge_lora
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups
from regrow.structure.offload import is_offloaded
from regrow.structure.quantise import quantise
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


def answers(model: PreTrainedModel, training: bool = True) -> Tensor:
    """Logits as training computes them: with 8-bit weights, but not 8-bit activations."""
    model.train(training)
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
    with pytest.raises(InputError, match=r"training\.quantization=nf4: .* no row of theirs is a multiple of 64 long"):
        load_model(str(tmp_path), quantization="nf4")
    assert is_quantised(load_model(str(tmp_path), quantization="int8"))


def test_linears_that_are_not_replaced_are_no_quantised_base(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    AutoModelForCausalLM.from_config(FalconConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="linears of this 'falcon' model cannot be kept so on cpu"):
        load_model(str(tmp_path), quantization="int8")


@BOTH
def test_a_quantised_linear_takes_any_number_of_axes(folder: Path, kind: str) -> None:
    linear = next(quantised_linears(load_model(str(folder), quantization=kind)))
    x = torch.randn(2, 1, 3, linear.in_features, requires_grad=True)
    y = linear(x)
    assert torch.equal(y, linear(x.flatten(0, 2)).unflatten(0, (2, 1, 3)))
    y.sum().backward()
    torch.testing.assert_close(x.grad, dequantised(linear).sum(0).expand_as(x), rtol=1e-2, atol=1e-3)


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


@pytest.mark.parametrize(
    "kept", [{}, {"quantization": "int8"}, {"quantization": "nf4"}, {"offload": "disk"}], ids=lambda kept: str(kept)
)
def test_a_model_without_weights_has_the_groups_of_the_loaded_one(folder: Path, kept: dict[str, str]) -> None:
    """So that a run need not trace again what it has loaded."""
    loaded = prunable_groups(load(str(folder), torch.device("cpu"), **kept))
    skeleton = prunable_groups(load_skeleton(str(folder)))
    assert loaded.to_json() == skeleton.to_json()
    assert loaded.linears == skeleton.linears
    for one, other in zip(loaded, skeleton, strict=True):
        assert (one.cost, one.hidden, one.widths) == (other.cost, other.hidden, other.widths)
        slices = [[(s.parameter, s.axis, s.index.tolist()) for s in group.slices] for group in (one, other)]
        assert slices[0] == slices[1]


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
        (
            "int8",
            {
                "search.evaluations": 0, "compensation.windows": 4, "distillation.teacher": "model",
                "training.original_share": 0.0,
            },
        ),
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
    report = (tmp_path / "report.md").read_text()
    assert kind in report
    assert ("from step 2 on" in report) == (kind == "nf4")
    used = result.results["training"]["distillation"]
    assert used["teacher_steps"] == ({"self": 2, "model": 2} if kind == "nf4" else {"model": 4})
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


def test_the_result_is_written_from_the_files_or_where_they_are_not_read_from_memory(
    folder: Path, text: Path, tmp_path: Path, lean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "odd")
    weights = tmp_path / "odd" / "model.safetensors"
    save_file(load_file(weights) | {"extra": torch.ones(1)}, weights, {"format": "pt"})
    monkeypatch.setattr("regrow.walk.verify_checkpoint", reloaded)
    offloaded: list[bool] = []
    monkeypatch.setattr(
        "regrow.walk.merge", lambda model, ids: (offloaded.append(is_offloaded(model)), merge(model, ids))[1]
    )
    results = [
        regrow.prune(
            str(each), tmp_path / f"from {each.name}", "magnitude", data=str(text), sparsity=0.4, steps=2,
            quantize="int8", overrides=QUICK,
        )
        for each in (folder, tmp_path / "odd")
    ]  # fmt: skip
    assert offloaded == [True, False]
    files = [(result.model / "model.safetensors").read_bytes() for result in results]
    assert files[0] == files[1]


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


# --- the last steps on the original weights --------------------------------------------------------

LAST = {
    "training.steps": 6,
    "training.batch_size": 2,
    "training.eval_interval": 2,
    "training.learning_rate": 1e-2,
    "training.original_share": 0.5,
    "pruning.calibration_batches": 2,
    "pruning.sparsity": 0.4,
    "search.evaluations": 0,
    "compensation.method": "none",
    "compensation.selection": "criterion",
    "lora.dropout": 0.1,
}
"""Steps 3, 4 and 5 are on the original weights."""
SELF, AUTO = {"distillation.teacher": "self"}, {"distillation.teacher": "auto"}
LATE = {"pruning.decay_steps": 4}
"""The target is reached after three steps have been due for the original weights."""


@cache
def known_groups(folder: Path) -> Groups:
    """Of the model with adapters, which are the same however it is kept."""
    return with_lora(load_model(str(folder)), fill=False)


class Watching(Calling):
    """Remembers the learning rates, too."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        super().__init__(on_step)
        self.rates: list[float] = []

    def track(self, figures: Mapping[str, float], step: int) -> None:
        self.rates += [figures["learning_rate"]] if "learning_rate" in figures else []


def recovered(
    folder: Path,
    out: Path,
    kind: str,
    settings: Mapping[str, object] = MappingProxyType({}),
    on_step: Callable[[int], None] = lambda step: None,
    on_cut: Callable[[CutEvent], None] = lambda event: None,
) -> tuple[Trained, PreTrainedModel, Watching]:
    """Train from what the journal in `out` knows."""
    groups = known_groups(folder)  # first, for it uses chance up
    given = {**LAST, "training.quantization": kind, **settings}
    recipe = settle_originals(str(folder), load_recipe("regrow", given), Silent())
    torch.manual_seed(0)
    model = load_model(str(folder), quantization=kind)
    attach_lora(model, groups.linears, rank=3, alpha=6, dropout=recipe.lora.dropout)
    progress = Watching(on_step)
    done = train(
        model, groups, recipe, corpus("regrow"), progress, teacher_folder=out / "teacher",
        on_cut=on_cut, on_validation=lambda history: None, journal=Journal(out, progress.say),
        track=progress.track, originals=Originals.wanted(str(folder), recipe.training),
    )  # fmt: skip
    return done, model, progress


def losses(done: Trained) -> list[float]:
    return [step["loss"] for step in done.history.steps]


@pytest.mark.parametrize(("kind", "settings"), [("nf4", {}), ("nf4", SELF), ("int8", AUTO)])
def test_at_the_end_the_model_is_the_plan_and_the_adapters_on_the_original_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, object]
) -> None:
    events: list[int | str] = []
    monkeypatch.setattr("regrow.recovery.pruner.cut", lambda *given: (events.append("cut"), cut(*given))[1])
    before = held_bytes(load_model(str(folder), quantization=kind))
    done, model, progress = recovered(folder, tmp_path, kind, settings, events.append)
    assert events == ([0, 1, 2, 3, 4, 5, "cut"] if settings == SELF else [0, 1, 2, "cut", 3, 4, 5])
    assert f"step 3: the original weights take the place of the {kind} ones" in progress.said
    assert done.summary["quantization"]["original_from"] == 3
    assert [validation["step"] for validation in done.history.validations] == [0, 2, 3, 4, 6]
    assert not is_quantised(model)
    assert held_bytes(model) - sum(p.nbytes for p in adapter_parameters(model)) < before, "they are not held"
    wanted = load_model(str(folder))
    attach_lora(wanted, find_groups(wanted).linears, rank=3, alpha=6, dropout=0.0)
    rebuild(wanted, done.plan, done.adapters)
    model.eval()
    assert (answers(wanted.eval(), training=False) - answers(model, training=False)).abs().max() < 1e-5


def test_until_then_nothing_is_changed(folder: Path, tmp_path: Path) -> None:
    # a cached teacher would answer otherwise, and another criterion be measured otherwise
    same = {**AUTO, "pruning.criterion": "random"}
    without, model, _ = recovered(folder, tmp_path / "0", "nf4", {"training.original_share": 0.0, **same})
    with_, _, _ = recovered(folder, tmp_path / "1", "nf4", same)
    weights = [p for n, p in model.named_parameters() if n.endswith("base_layer.weight")]
    assert all(kept_as(p) == "nf4" or p.is_meta for p in weights), "what has been cut of 4 bits is its shape only"
    assert "original_from" not in without.summary["quantization"]
    assert without.plan == with_.plan
    assert losses(without)[:3] == losses(with_)[:3]
    assert all(one != other for one, other in zip(losses(without)[3:], losses(with_)[3:], strict=True))


@pytest.mark.parametrize(
    ("kind", "settings"), [("nf4", {}), ("nf4", LATE | AUTO | {"training.patience": 1}), ("int8", SELF)]
)
def test_it_can_be_interrupted_before_at_and_after(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, object]
) -> None:
    every = {**settings, "training.checkpoint_interval": 1}
    whole, _, _ = recovered(folder, tmp_path / "whole", kind, every)
    write, broken = Journal.write, {2, 3, 4, 5}

    def write_and_fail(self: Journal, stage: str, state: State, step: int | None = None, files=()) -> None:
        write(self, stage, state, step, files)
        if step in broken:
            broken.remove(step)
            raise Fault

    monkeypatch.setattr(Journal, "write", write_and_fail)
    while broken:
        with pytest.raises(Fault):
            recovered(folder, tmp_path / "broken", kind, every)
    done, _, _ = recovered(folder, tmp_path / "broken", kind, every)
    assert_same(done, whole)
    assert done.summary == whole.summary | {"distillation": done.summary["distillation"]}


@pytest.mark.parametrize(("settings", "first"), [({}, 3), (LATE, 4), ({"training.original_share": 1.0}, 0)])
def test_the_best_is_of_the_original_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], first: int
) -> None:
    losses = dict(zip(range(7), (1.0, 1.1, 1.2, 9.0, 8.0, 8.0, 8.5), strict=True))
    monkeypatch.setattr("regrow.recovery.mixing.DataMix.validation_loss", lambda self, step: losses[step])
    done, _, _ = recovered(folder, tmp_path, "nf4", {"training.eval_interval": 1, **settings})
    assert done.summary["quantization"]["original_from"] == first
    assert (done.summary["best_step"], done.summary["best_validation_loss"]) == ((0, 1.0) if first == 0 else (4, 8.0))


def test_patience_that_has_run_out_brings_them_sooner(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regrow.recovery.mixing.DataMix.validation_loss", lambda self, step: float(step))
    settings = {"training.eval_interval": 1, "training.patience": 1, "training.original_share": 0.2}
    done, _, progress = recovered(folder, tmp_path, "nf4", settings)
    assert done.summary["quantization"]["original_from"] == 1
    assert [step["step"] for step in done.history.steps] == [0, 1, 2], "and runs out again"
    assert progress.said[-2].endswith("stopped at step 3")


def test_a_last_stage_does_not_end_before_them(folder: Path, tmp_path: Path) -> None:
    done, _, progress = recovered(folder, tmp_path, "nf4", {"recovery.interval": 1, "recovery.max_rounds": 1})
    assert [step["step"] for step in done.history.steps] == [0, 1, 2, 3], "its one round begins when they are there"
    assert "stage pretrain has converged; ended at step 4" in progress.said


def test_a_cached_teacher_answers_with_the_original_weights(folder: Path, tmp_path: Path) -> None:
    answers = {}
    for share in (0.0, 0.5):
        settings = {"training.original_share": share, "distillation.top_k": 300}
        fault = lambda step: (_ for _ in ()).throw(Fault)  # noqa: E731  (the folder goes with the training's end)
        with pytest.raises(Fault):
            recovered(folder, tmp_path / str(share), "nf4", settings, fault)
        parts = {name: np.load(tmp_path / str(share) / "teacher" / f"{name}.npy") for name in ("windows", "log_probs")}
        answers[share] = torch.from_numpy(parts["log_probs"])
    ids_NT = corpus("regrow").train.ids_NT[torch.from_numpy(parts["windows"])]
    with torch.no_grad():
        wanted = load_model(str(folder))(input_ids=ids_NT).logits[:, :-1].log_softmax(-1).topk(300).values
    assert (answers[0.5] - wanted).abs().max() < 1e-4
    assert (answers[0.0] - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("criterion", ["gate-fisher", "lora", "repairable-fisher", "flap", "mini-llm"])
def test_scores_are_those_of_the_original_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, criterion: str
) -> None:
    alive, most = [0], [0]

    class Counted(offload._Brought):
        def __init__(self, data: Tensor, requires_grad: bool) -> None:
            alive[0] += self.nbytes
            most[0] = max(alive + most)
            weakref.finalize(self, self.gone, self.nbytes)

        @staticmethod
        def gone(size: int) -> None:
            alive[0] -= size

    monkeypatch.setattr(offload, "_Brought", Counted)
    found: dict[tuple[str, float], dict[str, Tensor]] = {}
    for kind, share in (("none", 0.0), ("nf4", 0.0), ("nf4", 0.5)):
        settings = {"pruning.criterion": criterion, "training.original_share": share, "lora.dropout": 0.0}

        def keep(event: CutEvent, key: tuple[str, float] = (kind, share)) -> None:
            found[key] = event.scores
            raise Fault

        with pytest.raises(Fault):
            recovered(folder, tmp_path / f"{kind}{share}", kind, settings, on_cut=keep)
    wanted, rounded, ours = (torch.cat(list(scores.values())) for scores in found.values())
    assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (rounded - wanted).abs().max() > 1e-2 * wanted.abs().max()
    layer = load_model(str(folder)).model.layers[0]
    assert 0 < most[0] <= sum(p.nbytes for p in layer.parameters() if p.ndim > 1)


class Noting(Forgetful):
    """A journal that can be asked what was noted."""

    def __init__(self) -> None:
        self.noted: dict[str, State] = {}

    def write(self, stage: str, state: State, *_: object, **__: object) -> None:
        self.noted[stage] = state


@pytest.mark.parametrize("asked", ["perplexity=+400%", "speedup=1.2x"])
def test_a_target_is_settled_by_the_original_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr("regrow.aim.sparsity_for_speedup", lambda *given: 0.2)
    found: list[Tensor] = []
    for kind, share in (("none", 0.0), ("nf4", 0.0), ("nf4", 0.5)):
        settings = {"training.quantization": kind, "training.original_share": share, "lora.dropout": 0.0}
        model = load_model(str(folder), quantization=kind)
        attach_lora(model, known_groups(folder).linears, rank=3, alpha=6, dropout=0.0)
        aim = Aim(parse_target(asked), str(folder), tmp_path, Silent(), Noting(), latency=TABLE)
        given: list[Average | None] = []

        def train_into(model: Any, recipe: Any, folder: Any, scores: Average | None, given: Any = given) -> Trained:
            given.append(scores)
            raise Fault

        with pytest.raises(Fault):
            recipe = load_recipe("regrow", {**LAST, **settings})
            aim.recover(recipe, model, corpus("regrow"), lambda model=model: model, train_into)
        assert given[0] is not None
        parts = [each.flatten() for each in given[0].scores.values()]
        if aim.target.kind == "perplexity":
            noted = [aim.journal.noted[stage].values["found"] for stage in ("dense-loss", "forecast")]
            parts += [torch.tensor(each).flatten() for each in noted]
        found.append(torch.cat(parts))
    wanted, rounded, ours = found
    assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (rounded - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.filterwarnings("error:.gradient_checkpointing_disable:FutureWarning")
def test_activations_are_recomputed_for_as_long_as_asked(folder: Path) -> None:
    for always in (False, True):
        model = load_model(str(folder))
        with_lora(model)
        recipe = load_recipe("regrow", {"training.gradient_checkpointing": always})
        with Learner(model, recipe.training, data()).recomputing():
            assert model.is_gradient_checkpointing
        assert model.is_gradient_checkpointing == always


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_refit_is_made_on_the_original_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    seen: list[bool] = []
    run = Compensator.run

    def looking(self: Compensator, *given: Any) -> Compensated:
        seen.append(is_quantised(self.model))
        return run(self, *given)

    monkeypatch.setattr(Compensator, "run", looking)
    settings = {"training.original_share": share, "compensation.method": "least-squares", "compensation.windows": 4}
    recovered(folder, tmp_path, "nf4", settings | {"compensation.carrier": "adapter"})
    assert seen == [share == 0]


def test_the_rate_rises_once_more(folder: Path, tmp_path: Path) -> None:
    _, _, progress = recovered(folder, tmp_path, "nf4", {"training.schedule": "constant", "training.warm_up": 0.0})
    assert progress.rates == pytest.approx(
        [0.01 * x for x in (1, 1, 1, SECOND_PEAK, SECOND_PEAK * 2 / 3, SECOND_PEAK / 3)]
    )


def test_borrowed_weights_are_given_back(folder: Path) -> None:
    model, whole = load_model(str(folder), quantization="nf4"), load_model(str(folder))
    for each in (model, whole):
        torch.manual_seed(1)
        with_lora(each)
    before, held = answers(model), held_bytes(model)
    with Originals(str(folder)).borrowed(model, Gates(model, ())):
        assert (answers(model) - answers(whole)).abs().max() < 1e-5
        assert held_bytes(model) < held
    assert torch.equal(answers(model), before)
    assert held_bytes(model) == held


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "vocab_size": 320, "n_positions": 64}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    make_tokenizer(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@BOTH
def test_a_family_of_conv1ds_ends_in_a_plain_checkpoint(
    gpt2: Path, text: Path, tmp_path: Path, lean: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    widths = [
        {group.name: tuple(group.widths or ()) for group in prunable_groups(load_model(str(gpt2), quantization=kept))}
        for kept in ("none", kind)
    ]
    assert widths[0] == widths[1]
    assert any(len(counts) > 1 for counts in widths[0].values())
    monkeypatch.setattr("regrow.walk.verify_checkpoint", reloaded)
    result = regrow.prune(
        str(gpt2), tmp_path / "out", data=str(text), sparsity=0.15, steps=2, quantize=kind,
        overrides={**QUICK, "lora.rank": 4, "search.evaluations": 0, "compensation.windows": 4},
    )  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(result.model)
    assert stock.config.n_inner < 128
    assert {p.dtype for p in stock.parameters()} == {torch.float32}


def test_a_conv1d_is_brought_as_the_linear_that_it_became(gpt2: Path) -> None:
    model = load_model(str(gpt2), quantization="int8")
    assert is_quantised(model)
    Originals(str(gpt2)).put(model, Gates(model, ()))
    assert not is_quantised(model)
    assert (answers(model.eval(), False) - answers(load_model(str(gpt2)).eval(), False)).abs().max() < 1e-5


def test_gates_follow_to_linears_without_an_adapter(folder: Path) -> None:
    models = [load_model(str(folder), quantization="nf4"), load_model(str(folder))]
    groups = with_lora(models[0])
    first = groups.groups[0]
    found = []
    for model in models:
        for name in find_groups(model).linears:
            model.set_submodule(name, getattr(model.get_submodule(name), "base_layer", model.get_submodule(name)))
        gates = Gates(model, [first])
        with gates:
            gates.keep(first.name, [0])
            if is_quantised(model):
                rounded, originals = answers(model), Originals(str(folder))
                with originals.borrowed(model, gates):
                    pass
                assert torch.equal(answers(model), rounded)
                originals.put(model, gates)
            found.append(answers(model, training=False))
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_what_share_it_is_and_which_checkpoints_it_can_be_had_of(folder: Path, tmp_path: Path) -> None:
    def settled(place: Path, **settings: object) -> tuple[float | None, list[str]]:
        progress = Calling()
        given = {f"training.{key}": value for key, value in settings.items()}
        return settle_originals(
            str(place), load_recipe("regrow", given), progress
        ).training.original_share, progress.said

    default, said = settled(folder, quantization="nf4")
    assert default
    assert default > 0
    assert not said
    assert settled(folder, quantization="int8") == (default, []), "the recipe has a refit"
    without = load_recipe("regrow", {"training.quantization": "int8", "compensation.method": "none"})
    assert settle_originals(str(folder), without, Calling()).training.original_share == 0.0
    assert settled(folder) == (None, [])
    assert not load_recipe("regrow", {"training.original_share": 0.3}).training.ends_on_originals
    assert settled(folder, quantization="int8", original_share=0.3) == (0.3, [])
    load_model(str(folder)).save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors") | {"extra": torch.ones(1)}, tmp_path / "model.safetensors")
    share, (told,) = settled(tmp_path, quantization="nf4")
    assert share == 0
    assert "training.original_share=0" in told
    assert "extra" in told
    with pytest.raises(InputError, match="extra"):
        settled(tmp_path, quantization="nf4", original_share=0.2)


@BOTH
def test_autocast_leaves_a_bias_its_digits(kind: str) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 64)
    exact = plain.bias.detach().clone()
    linear = quantise(plain, kind, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        linear(torch.randn(2, 64).bfloat16())
    assert torch.equal(linear.bias, exact)
