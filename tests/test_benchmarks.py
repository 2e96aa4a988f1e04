"""Benchmarks that cannot be run where they are written, or that train for long, do run."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_llama import Shape, perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module(name)


# --- gpu.py --------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark("gpu", monkeypatch)


def arguments(**changed: object) -> Namespace:
    given = {"device": "cpu", "shape": "tiny", "batch": 2, "length": 16, "warm_up": 0, "steps": 1}
    return Namespace(**given | changed)


WHOLE, RANK_8, RANK_32 = 229_952, 8, 32


@pytest.mark.parametrize(
    ("case", "rank", "kept"),
    [
        ("lora", RANK_8, 4.0),
        ("loraprune int8", RANK_8, 1.0),
        ("llm-pruner", RANK_8, 4.0),
        ("regrow nf4", RANK_32, 0.5),
        ("65b nf4", RANK_8, 0.5),
    ],
)
def test_every_kind_of_step_is_measured(case: str, rank: int, kept: float, gpu: ModuleType) -> None:
    found = gpu.run_here(arguments(child=case))
    assert found["parameters"] == WHOLE
    inside = 4 * (4 * 64 * 64 + 3 * 64 * 192)
    factors = 4 * rank * 4 * (4 * (64 + 64) + 3 * (64 + 192))
    held = found["held_bytes"] - factors - 4 * (WHOLE - inside)
    assert held / inside == pytest.approx(kept, rel=0.15), "bytes of a weight, scales among them"
    assert found["batch"] == (1 if case == "65b nf4" else 2)
    assert found["tokens_per_second"] == pytest.approx(found["batch"] * 16 / found["seconds"])


def test_cut_models_are_as_small_as_they_should_be(gpu: ModuleType) -> None:
    found = gpu.run_here(arguments(child="speed"))
    blocks = 4 * (4 * 64 * 64 + 3 * 64 * 192)
    for name, share in (("dense", 0.0), ("20% cut", 0.2), ("50% cut", 0.5)):
        assert (WHOLE - found[name]["parameters"]) / blocks == pytest.approx(share, abs=0.03)
        assert [one["batch"] for one in found[name]["speed"]] == [1, 8]
    table = gpu.tables({"speed": found, "lora": {"failed": "out of memory"}}, gpu.PAPER)
    assert "| lora | whole |  | out of memory |" in table
    assert sum(line.startswith(("| dense |", "| 20% cut |", "| 50% cut |")) for line in table.splitlines()) == 6


def test_a_case_that_fails_does_not_end_the_others(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert gpu.run("lora", 10) == {"failed": "ended with 1"}
    monkeypatch.setattr(gpu, "run_here", lambda given: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert gpu.attempt(arguments(child="lora")) == {"failed": "out of memory"}


def test_without_a_gpu_there_is_one_clear_line(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main()


# --- train_wikitext_model.py ---------------------------------------------------------------------


def test_a_small_llama_is_trained_on_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = benchmark("train_wikitext_model", monkeypatch)
    article = " = Title {} = \n \n The {} of the {} is known as the Battle of {} . \n = = Section = = \n More .\n"
    text = "".join(article.format(*[f"{n * k % 97} men" for k in range(1, 5)]) for n in range(100))
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text(text)
    words = f"x --out {tmp_path / 'm'} --train {tmp_path / 'train.txt'} --test {tmp_path / 'test.txt'} --steps 2"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--threads", "1"])
    monkeypatch.setattr("small_llama.BATCH", 2)
    monkeypatch.setattr(trainer, "SHAPE", Shape(vocab=300, hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2))
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        trainer.main()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    found = json.loads((tmp_path / "m" / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert found["parameters"] == model.num_parameters()
    reader = AutoTokenizer.from_pretrained(tmp_path / "m")
    rows = reader(trainer.read_articles(tmp_path / "test.txt"))["input_ids"]
    assert len(rows) == 100
    tokens = torch.tensor([token for row in rows for token in row])
    assert found["tokens"]["test"] == len(tokens)
    assert found["tokens"]["held out"] < found["tokens"]["train"] / 8
    assert found["perplexity"]["test"] == pytest.approx(perplexity(model, tokens), rel=1e-3)


# --- upcycle.py ----------------------------------------------------------------------------------


def test_a_mixture_computes_what_its_dense_model_did(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is one that transformers loads from its files."""
    maker = benchmark("upcycle", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["x", str(checkpoint), "--out", str(tmp_path / "m"), "--experts", "3"])
    maker.main()
    dense, mixture = (AutoModelForCausalLM.from_pretrained(folder) for folder in (checkpoint, tmp_path / "m"))
    ids = torch.arange(3, 20)[None]
    assert (mixture(ids).logits - dense(ids).logits).abs().max() < 1e-4
    assert mixture.config.num_local_experts == 3
    assert mixture.num_parameters() > dense.num_parameters()
    assert AutoTokenizer.from_pretrained(tmp_path / "m").vocab_size == mixture.config.vocab_size
