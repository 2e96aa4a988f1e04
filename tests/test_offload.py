"""Frozen weights that lie elsewhere: a run that brings them layer by layer is the run that has them all."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zoo
from conftest import QUICK, build, logits, make_tokenizer, random_keep, with_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

import regrow
from regrow import preflight
from regrow.checkpoint import reload_probe
from regrow.checkpoint.load import load_model
from regrow.checkpoint.offloaded import load_offloaded
from regrow.checkpoint.save import save_checkpoint
from regrow.checkpoint.verify import verify_checkpoint
from regrow.errors import InputError
from regrow.progress import Silent
from regrow.recipe import load_recipe
from regrow.recovery.quantised_base import settle_offload
from regrow.recovery.teacher import copy_without_adapters
from regrow.structure.adapters import adapter_parameters, attach_lora, merge_lora
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.offload import InFile, Offloaded, Store, convert, staying
from regrow.structure.prefix import LayerWalk
from regrow.structure.quantised import held_bytes, is_quantised

CPU = torch.device("cpu")


def gradients(model: PreTrainedModel) -> list[Tensor]:
    """Of the adapters, with dropout and activation checkpointing."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.manual_seed(3)
    ids = torch.randint(0, 64, (2, 9))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = [parameter.grad for parameter in adapter_parameters(model)]
    model.zero_grad()
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    """With LoRA on all linears of the layers, both factors away from zero."""
    torch.manual_seed(0)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    attach_lora(model, linears, rank=3, alpha=6, dropout=0.1)
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def test_every_family_computes_the_same_to_the_bit(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    resident, away = load_model(str(tmp_path)), load_offloaded(str(tmp_path), CPU, "disk")
    assert {n: (p.shape, p.dtype) for n, p in resident.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in away.named_parameters()
    }
    assert torch.equal(logits(resident), logits(away))
    assert same(gradients(adapted(resident)), gradients(adapted(away)))


def test_a_cut_and_a_merge_are_made_on_the_way(tmp_path: Path) -> None:
    build("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    models = [load_model(str(tmp_path)), *(load_offloaded(str(tmp_path), CPU, place) for place in ("cpu", "disk"))]
    resident = adapted(models[0])
    away = [adapted(model) for model in models[1:]]
    groups = find_groups(resident)
    for seed in (1, 2):  # the second counts from what the first has left
        left = [cut(model, groups, random_keep(groups, seed)) for model in models]
        groups = left[0]
        assert all(each.to_json() == groups.to_json() for each in left)
    assert all(torch.equal(logits(resident), logits(model)) for model in away)
    wanted = gradients(resident)
    assert all(same(wanted, gradients(model)) for model in away)
    for model in models:
        merge_lora(model.eval())
    assert all(torch.equal(logits(resident), logits(model)) for model in away)
    for model in models:
        convert(model, torch.bfloat16)
    assert all(torch.equal(logits(resident), logits(model)) for model in away)
    assert not any(torch.isfinite(p).any() for model in away for p in model.parameters() if isinstance(p, Offloaded))


@pytest.mark.parametrize("family", ["LFM2", "Qwen3-Next", "Jamba"])
def test_weights_that_another_module_reads_are_here(family: str, tmp_path: Path) -> None:
    """The layer reads its convolution's; nothing is hooked onto that."""
    model = zoo.build(family)
    model.save_pretrained(tmp_path)
    offloaded = load_offloaded(str(tmp_path), torch.device("cpu"), "disk")
    here = {name for name, each in offloaded.named_parameters() if each.ndim > 1 and not isinstance(each, Offloaded)}
    convolutions = {name for name, _ in model.named_parameters() if name.endswith(("conv.weight", "conv1d.weight"))}
    assert convolutions
    assert {name for name in here if "conv" in name} == convolutions
    assert torch.equal(zoo.logits_of(offloaded), zoo.logits_of(model))


def test_a_cut_of_experts_that_keep_channels_of_their_own() -> None:
    """In any order what each expert keeps stays its own."""
    weight = torch.arange(4 * 3 * 5.0).view(4, 3, 5)
    channels = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 2]])
    columns = torch.tensor([4, 0, 2])
    wanted = torch.stack([weight[expert][channels[expert]] for expert in range(4)])[:, :, columns][[3, 1]]
    whole = InFile(lambda: weight)
    for steps in (
        [(1, channels), (2, columns), (0, torch.tensor([3, 1]))],
        [(0, torch.tensor([3, 1])), (1, channels[[3, 1]]), (2, columns)],
        [(1, channels), (0, torch.tensor([3, 1])), (2, columns)],
    ):
        store = whole
        for axis, positions in steps:
            store = store.cut(axis, positions)
        assert torch.equal(store.read(), wanted)
    again = whole.cut(1, channels).cut(1, torch.tensor([[1], [0], [1], [0]]))
    assert torch.equal(again.read(), torch.stack([weight[e][[c]] for e, c in enumerate((1, 1, 2, 1))]))


def test_what_is_held_is_what_is_not_brought(tmp_path: Path) -> None:
    build("llama-biases").save_pretrained(tmp_path)
    away = load_offloaded(str(tmp_path), CPU, "disk")
    here = {name for name, p in away.named_parameters() if not isinstance(p, Offloaded)}
    assert {name for name in here if ".layers." in name and name.endswith("proj.weight")} == set()
    assert all(p.ndim == 1 for name, p in away.named_parameters() if name in here and ".layers." in name)
    assert held_bytes(away) == sum(p.nbytes for name, p in away.named_parameters() if name in here)


def test_a_pass_that_is_cut_short_leaves_nothing_behind(tmp_path: Path) -> None:
    build("mistral").save_pretrained(tmp_path)
    away = adapted(load_offloaded(str(tmp_path), CPU, "disk"))
    elsewhere = {name for name, p in away.named_parameters() if isinstance(p, Offloaded)}
    gradients(away)  # recomputations stop early
    assert {name for name, p in away.named_parameters() if isinstance(p, Offloaded)} == elsewhere != set()


def test_a_walk_brings_a_layer_once_for_all_batches(tmp_path: Path) -> None:
    build("llama-gqa").save_pretrained(tmp_path)
    resident, away = load_model(str(tmp_path)), load_offloaded(str(tmp_path), CPU, "disk")
    read = Counter[str]()
    for name, parameter in away.named_parameters():
        if isinstance(parameter, Offloaded):
            parameter.store = Counted(name, parameter.store, read)
    batches = list(torch.randint(64, (6, 9), generator=torch.Generator().manual_seed(0)).split(2))
    walks = [LayerWalk(model, batches) for model in (resident, away)]
    for layer in range(2):
        read.clear()
        for one, other in zip(*(walk.run() for walk in walks), strict=True):
            assert torch.equal(one, other)
        assert set(read.values()) == {1}
        assert read.keys() == {name for name, _ in away.named_parameters() if f".{layer}." in name and "proj" in name}
        for walk in walks:
            walk.advance()
    assert all(isinstance(p, Offloaded) for name, p in away.named_parameters() if "proj" in name)
    with pytest.raises(RuntimeError, match="on the way"), staying(away.model.layers[0]):
        raise RuntimeError("on the way")
    assert all(isinstance(p, Offloaded) for name, p in away.named_parameters() if "proj" in name)


@dataclass
class Counted:
    name: str
    store: Store
    read_of: Counter[str]

    def read(self) -> Tensor:
        self.read_of[self.name] += 1
        return self.store.read()


def test_a_teacher_stays_whole_when_its_student_is_cut(tmp_path: Path) -> None:
    build("llama-gqa").save_pretrained(tmp_path)
    away = load_offloaded(str(tmp_path), CPU, "cpu")
    whole = logits(away)
    groups = with_lora(away)
    teacher = copy_without_adapters(away, None)
    cut(away, groups, random_keep(groups, 4))
    assert torch.equal(logits(teacher), whole)
    assert not torch.equal(logits(away), whole)


def test_a_quantised_teacher_is_made_of_what_is_brought(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    build("llama-gqa").save_pretrained(tmp_path)
    copies = [
        copy_without_adapters(adapted(model), "int8")
        for model in (load_model(str(tmp_path)), load_offloaded(str(tmp_path), CPU, "disk"))
    ]
    assert all(is_quantised(model) for model in copies)
    assert torch.equal(*map(logits, copies))


RUNS: dict[str, tuple[str, dict[str, object]]] = {
    "two cuts, a copy as teacher": ("loraprune", {"pruning.schedule": "cubic", "distillation.weight": 0.5}),
    "moments of inputs, search and refit": (
        "regrow",
        {
            "pruning.criterion": "obs", "search.evaluations": 4, "search.windows": 4, "search.judge_windows": 4,
            "compensation.windows": 4, "compensation.carrier": "adapter",
        },
    ),
    "biases": ("flap", {"compensation.windows": 4}),
    "lhspg, analysed": ("lorashear", {"analysis.windows": 2, "analysis.calibration_batches": 1, "pruning.periods": 2}),
    "hidden channels": (
        "loraprune", {"pruning.kinds": ["ffn", "hidden"], "pruning.criterion": "gate-fisher", "pruning.basis": "total"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_a_run_leaves_the_same_files(run: str, checkpoint: Path, text: Path, tmp_path: Path, lean: None) -> None:
    recipe, settings = RUNS[run]
    given = {**QUICK, "lora.rank": 4, "training.gradient_checkpointing": True, **settings}
    results = {}
    for place in ("none", "disk"):
        results[place] = regrow.prune(
            str(checkpoint), tmp_path / place, recipe, data=str(text), sparsity=0.4, steps=4, offload=place,
            overrides=given,
        )  # fmt: skip
    written = (
        "plan.json",
        "scores.safetensors",
        "adapters.safetensors",
        "model/model.safetensors",
        "model/config.json",
    )
    for file in written:
        assert (tmp_path / "none" / file).read_bytes() == (tmp_path / "disk" / file).read_bytes(), file
    for key in ("perplexity", "size"):
        assert results["none"].results[key] == results["disk"].results[key]


def test_a_merge_on_the_way_is_verified_in_a_fresh_process(tmp_path: Path) -> None:
    build("llama-gqa").save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    resident, away = load_model(str(tmp_path / "model")), load_offloaded(str(tmp_path / "model"), CPU, "disk")
    for model in (resident, away):
        merge_lora(adapted(model))
    tokenizer, saved = AutoTokenizer.from_pretrained(tmp_path / "model"), tmp_path / "saved"
    save_checkpoint(resident, tokenizer, saved, dtype=torch.float32, shard_size="5GB", extras={})
    assert verify_checkpoint(away, saved, torch.randint(0, 64, (2, 9))).passed


def test_the_fresh_process_may_leave_weights_on_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama-gqa"), torch.randint(0, 64, (2, 9))
    model.save_pretrained(tmp_path / "model")
    save_file({"ids": ids}, tmp_path / "ids")
    monkeypatch.setattr(reload_probe, "room", lambda device: {"cpu": 40_000})
    checkpoint, ids_file, logits_file, scratch = (str(tmp_path / name) for name in ("model", "ids", "logits", "away"))
    assert "disk" in reload_probe.load(checkpoint, "cpu", False, scratch).hf_device_map.values()
    reload_probe.main(checkpoint, ids_file, logits_file, "cpu", f"--offload={scratch}")
    with torch.inference_mode():
        assert torch.equal(load_file(logits_file)["logits"], model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pruning.criterion": "taylor"}, "training.offload=disk"),
        ({"training.quantization": "int8"}, "training.quantization=int8"),
        ({"pruning.target": "speedup=1.5x"}, "speedup"),
        ({"pruning.schedule": "cubic", "compensation.method": "least-squares"}, "pruning.schedule=one-shot"),
    ],
)
def test_what_offloaded_weights_cannot_do_is_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        settle_offload(load_recipe("regrow", {"training.offload": "disk", **settings}), Silent())


def test_a_run_that_cannot_fit_is_told_of_offload(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda device: 2**20)
    with pytest.raises(InputError, match="--offload disk"):
        regrow.prune(str(checkpoint), tmp_path, "loraprune", data=str(text), sparsity=0.4, overrides=QUICK)
