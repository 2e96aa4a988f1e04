"""On a GPU, where there is one: what holds on a CPU holds there. Each run is a process of its own that may see it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import build
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MixtralConfig

import regrow

pytestmark = pytest.mark.skipif(not Path("/proc/driver/nvidia/version").exists(), reason="no NVIDIA GPU here")

DEMO = Path(regrow.__file__).parent / "demo" / "model"
WORDS = "the cat sat on a mat and saw one small dog run over an old hill then it went home to sleep"
SMALL = [
    "data.sequence_length=32", "evaluation.windows=[32]", "evaluation.max_windows=16", "evaluation.speed=false",
    "evaluation.memory=false", "training.batch_size=4", "training.eval_windows=4", "training.eval_interval=4",
    "search.evaluations=8", "search.windows=4", "search.judge_windows=4", "compensation.windows=8",
    "pruning.calibration_batches=4", "lora.rank=4",
]  # fmt: skip


def given_gpus() -> dict[str, str]:
    seen = os.environ["REGROW_TEST_GPUS"]
    others = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return others if seen == "all" else others | {"CUDA_VISIBLE_DEVICES": seen}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = torch.Generator().manual_seed(0)
    words = WORDS.split()
    stories = [" ".join(words[i] for i in torch.randint(len(words), (60,), generator=chance)) for _ in range(120)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"), "llama-biases")


def checkpoint(folder: Path, family: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = build(family)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prune(model: Path, out: Path, text: Path, *settings: str, recipe: str = "regrow", **options: object) -> list[str]:
    words = ["prune", model, "--out", out, "--data", text, "--recipe", recipe, "--sparsity", "0.4", "--steps", "8"]
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    given = [name for name in SMALL if recipe == "regrow" or not name.startswith(("search", "compensation"))]
    return [sys.executable, "-m", "regrow", *map(str, words), *(f"--set={one}" for one in (*given, *settings))]


def run(command: list[str]) -> str:
    done = subprocess.run(command, env=given_gpus(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def sha(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def kept_alike(out: Path, other: Path) -> float:
    """The share of the units kept by one plan that another keeps, too."""
    one, two = (json.loads((folder / "plan.json").read_text())["groups"] for folder in (out, other))
    assert one.keys() == two.keys()
    both = sum(len(set(one[name]["keep"]) & set(two[name]["keep"])) for name in one)
    return both / max(sum(len(group["keep"]) for group in plan.values()) for plan in (one, two))


def recovered(out: Path) -> float:
    return results(out)["perplexity"]["pruned"]["window-32"]["value"]


@pytest.mark.parametrize("recipe", ["regrow", "loraprune", "lorashear", "llm-pruner", "sheared-llama"])
def test_a_gpu_chooses_and_learns_what_a_cpu_does(llama: Path, text: Path, tmp_path: Path, recipe: str) -> None:
    for device in ("cpu", "cuda"):
        run(prune(llama, tmp_path / device, text, "training.precision=float32", recipe=recipe, device=device))
    assert results(tmp_path / "cpu")["machine"]["device"] != results(tmp_path / "cuda")["machine"]["device"]
    # what is scored after steps of AdamW hears its first ones, near ±1 however small the gradient is
    assert kept_alike(tmp_path / "cpu", tmp_path / "cuda") >= (0.9 if recipe in ("loraprune", "lorashear") else 1)
    assert recovered(tmp_path / "cuda") == pytest.approx(recovered(tmp_path / "cpu"), rel=2e-2)


@pytest.mark.parametrize("recipe", ["regrow", "loraprune", "lorashear"])
def test_the_same_bits_twice_and_after_a_kill(llama: Path, text: Path, tmp_path: Path, recipe: str) -> None:
    """In what is computed by default: bfloat16."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    same = "training.deterministic=true"
    run(prune(llama, whole, text, same, recipe=recipe, device="cuda"))
    process = subprocess.Popen(
        prune(llama, killed, text, same, recipe=recipe, device="cuda"), env=given_gpus(), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoint/**/*.safetensors")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "results.json").exists()
    assert "resuming" in run(prune(llama, killed, text, same, recipe=recipe, device="cuda"))
    assert sha(killed) == sha(whole)
    assert results(whole)["training"]["compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("recipe", ["regrow", "loraprune"])
def test_a_quantised_base(llama: Path, text: Path, tmp_path: Path, kind: str, recipe: str) -> None:
    pytest.importorskip("bitsandbytes")
    run(prune(llama, tmp_path / "whole", text, recipe=recipe, device="cuda"))
    run(prune(llama, tmp_path / kind, text, recipe=recipe, device="cuda", quantize=kind))
    assert results(tmp_path / kind)["training"]["quantization"]["kind"] == kind
    assert recovered(tmp_path / kind) == pytest.approx(recovered(tmp_path / "whole"), rel=0.1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / kind / "model")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_base(llama: Path, text: Path, tmp_path: Path, place: str) -> None:
    for where in ("none", place):
        settings = ("training.gradient_checkpointing=true", "compensation.carrier=adapter")
        run(prune(llama, tmp_path / where, text, *settings, device="cuda", offload=where))
    one, other = (load_file(tmp_path / where / "model" / "model.safetensors") for where in ("none", place))
    assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
    assert recovered(tmp_path / place) == pytest.approx(recovered(tmp_path / "none"), rel=1e-3)


def test_a_mixture(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    config = MixtralConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=len(tokenizer),
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        run(prune(tmp_path / "mixture", out, text, "training.precision=float32", recipe="loraprune", device=device))
    assert kept_alike(tmp_path / "cpu", tmp_path / "cuda") >= 0.9
    assert recovered(tmp_path / "cuda") == pytest.approx(recovered(tmp_path / "cpu"), rel=2e-2)
    assert AutoConfig.from_pretrained(tmp_path / "cuda" / "model").intermediate_size < 40


def test_bench_and_evaluate(llama: Path, text: Path, tmp_path: Path) -> None:
    run(prune(llama, tmp_path / "out", text, device="cuda"))
    result = tmp_path / "out" / "model"
    for words in (["bench", llama, result], ["evaluate", result, "--data", text]):
        command = [sys.executable, "-m", "regrow", *map(str, words), "--device", "cuda"]
        assert subprocess.run(command, env=given_gpus(), check=False).returncode == 0
