"""Tiny random models of the supported families, and helpers that every oracle uses."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

# The oracles are of a CPU's arithmetic; test_cuda.py gives its processes the GPUs back. Workers inherit both.
os.environ.setdefault("REGROW_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and one that is not reached is asked for a minute

import torch
from hypothesis import settings
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from regrow.checkpoint.verify import Verification
from regrow.criteria.evidence import Linear
from regrow.planning.plan import Plan
from regrow.recipe import load_recipe
from regrow.recovery.pruner import Pruner
from regrow.run import prune
from regrow.structure.adapters import adapter_parameters, attach_lora
from regrow.structure.finding import find_groups
from regrow.structure.groups import Groups

settings.register_profile("any machine", deadline=None)  # a busy one takes its time
settings.load_profile("any machine")

os.environ.setdefault("REGROW_CACHE", "")  # tests that mean it name a folder; the user's is left alone

# Shells start what runs in the background with Ctrl-C ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the tests can leave besides passing."""
    parser.addoption("--bad-input-table", metavar="FILE", help="write what is said of bad input into a Markdown page")


SIZES = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}

FAMILIES = {
    "llama-gqa": lambda: LlamaConfig(**SIZES, **HEADS, head_dim=10),
    "llama-mha-tied": lambda: LlamaConfig(
        **SIZES, num_attention_heads=6, num_key_value_heads=6, tie_word_embeddings=True
    ),
    "llama-mqa": lambda: LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=1),
    "llama-biases": lambda: LlamaConfig(**SIZES, **HEADS, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, **HEADS, head_dim=10, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, **HEADS, head_dim=10),
    "qwen3-tied": lambda: Qwen3Config(**SIZES, **HEADS, head_dim=16, tie_word_embeddings=True),
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, biases and norms away from their trivial values."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    return model


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What four bits of MXFP4 stand for."""


def mxfp4_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Write a gpt-oss with experts in MXFP4, as the hub has it, and a tokenizer.

    Returns:
        The weights it stands for, by the names and in the shapes of the stock class.
    """
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 8, "vocab_size": 300}
    few = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**shape, **few)).to(torch.bfloat16)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder)
    make_tokenizer(folder)
    packed = dict(weights)
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, into, out = packed.pop(name).shape
        codes = torch.randint(0, 16, (experts, out, into // 32, 32))
        exponents = torch.randint(121, 127, (experts, out, into // 32))
        packed[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        packed[f"{name}_scales"] = exponents.to(torch.uint8)
        whole = FP4[codes] * 2.0 ** (exponents - 127)[..., None]
        weights[name] = whole.view(experts, out, into).transpose(1, 2).to(torch.bfloat16)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def two_by_two(axis: int) -> Linear:
    """W = [[1, 2], [3, 4]], rank 1: B = (1, -1), A = (2, 1), dB = (1, 0), dA = (0, 1), s = 2."""
    return Linear(
        name="m",
        weight=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        axis=axis,
        positions=torch.tensor([[0], [1]]),
        weight_grad=torch.tensor([[1.0, -1.0], [2.0, 0.5]]),
        lora_a=torch.tensor([[2.0, 1.0]]),
        lora_b=torch.tensor([[1.0], [-1.0]]),
        lora_a_grad=torch.tensor([[0.0, 1.0]]),
        lora_b_grad=torch.tensor([[1.0], [0.0]]),
        scaling=2.0,
    )


def with_lora(model: PreTrainedModel, rank: int = 3, dropout: float = 0.0, fill: bool = True) -> Groups:
    """Attach LoRA, both factors away from zero if `fill`; the groups with the factors in them."""
    groups = find_groups(model)
    experts = dict.fromkeys(groups.experts, rank)
    attach_lora(model, groups.linears, rank=rank, alpha=6, dropout=dropout, experts=experts)
    if fill:
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return find_groups(model)


def random_keep(groups: Groups, seed: int) -> dict[str, np.ndarray]:
    """Group name -> ascending numbers of units that stay: at least one, at random."""
    chance = np.random.default_rng(seed)
    keep = {}
    for group in groups:
        count = int(chance.integers(1, group.units + 1))
        keep[group.name] = np.sort(chance.choice(group.units, count, replace=False))
    return keep


def uniform_keep(groups: Groups, heads: int, channels: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The same number of units in every layer, which ones at random."""
    chance = np.random.default_rng(seed)
    return {
        g.name: np.sort(chance.choice(g.units, heads if g.kind == "attention" else channels, replace=False))
        for g in groups
    }


def logits(model: PreTrainedModel, seed: int = 1, batch: int = 2, length: int = 11) -> torch.Tensor:
    """Logits of random tokens, without dropout."""
    ids = torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def plan_of(groups: Groups, keep: dict[str, np.ndarray]) -> Plan:
    """A plan that keeps `keep`."""
    return Plan.whole(groups).keeping({name: units.tolist() for name, units in keep.items()})


def go_through(pruner: Pruner, steps: int) -> list[float]:
    """Calibrate and take every step of a schedule, its last event included; the losses."""
    losses = []
    pruner.calibrate()
    for step in range(steps):
        pruner.before_step(step)
        losses.append(pruner.train_step())
    pruner.before_step(steps)
    return losses


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pretrained models and text; tests that need it skip without."""
    folder = os.environ.get("REGROW_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("REGROW_REAL_DATA names no folder of real models")
    return Path(folder)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- the command line, in processes of its own --------------------------------------------------


@dataclass(frozen=True)
class Done:
    """What became of a command."""

    code: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """Standard error without the lines that say which stage begins."""
        return "".join(line for line in self.stderr.splitlines(True) if not STAGE.fullmatch(line.rstrip("\n")))


STAGE = re.compile(r"\w[\w, -]* …")

COMMAND_LINE = """
import gc, glob, json, os, resource, signal, sys, time, traceback
from regrow import cli
cli.quiet()
import datasets, torch, transformers
import regrow.measure, regrow.report.terminal, regrow.run, regrow.terminal
with torch.device("meta"):
    regrow.find_groups(transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1)))
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(job["seconds"])
        for number, name in enumerate((os.devnull, job["stdout"], job["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        os.chdir(job["cwd"])
        if job["file_limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
        sys.argv = ["regrow", *job["argv"]]
        try:
            cli.main()
        except SystemExit as done:
            code = done.code
        except BaseException:
            code = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking torch and transformers down in an orderly way would be most of the time
    done = 0
    while job["when"] and not done and not glob.glob(job["when"]):
        time.sleep(0.002)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        if job["when"]:
            os.kill(child, job["signal"])
        status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
"""Forks a process for each command, when torch and transformers have long been imported."""


class CommandLine:
    """Runs `regrow …`, each time in a fresh process that starts at once."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", COMMAND_LINE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"HF_HOME": str(scratch / "home")},
        )

    def __call__(
        self, *argv: str | Path, cwd: Path | None = None, file_limit: int = 0, seconds: int = 100,
        when: str = "", signal: int = 9,
    ) -> Done:  # fmt: skip
        """With `when`: as soon as a file matches that pattern, the process gets the signal."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        stdout, stderr = self._scratch / "stdout", self._scratch / "stderr"
        for file in (stdout, stderr):
            file.write_bytes(b"")
        job = {
            "argv": [str(word) for word in argv],
            "cwd": str(cwd or self._scratch),
            "file_limit": file_limit,
            "seconds": seconds,
            "when": when,
            "signal": signal,
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return Done(code, stdout.read_text(encoding="utf-8"), stderr.read_text(encoding="utf-8"))

    def close(self) -> None:
        """No more commands."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The command line, as a function: `command("inspect", folder)`."""
    line = CommandLine(tmp_path_factory.mktemp("command-line"))
    yield line
    line.close()


STORY = (
    "Once upon a time a gardener cut the old tree back to its trunk, and in spring the tree grew again. "
    "The children asked why it had to lose so many branches. It could not carry them all, said the gardener. "
    "What it keeps it can feed, and what it feeds will bear fruit. {number} summers later they ate {number} pears. "
)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of some 300 tokens, with `<s>` and `</s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([STORY.format(number=n) for n in range(20)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaMA with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=300,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short documents, as .jsonl."""
    import json

    file = tmp_path_factory.mktemp("text") / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": STORY.format(number=n)}) + "\n" for n in range(120)))
    return file


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without completions, and without the fresh process that reloads the checkpoint: most of their time."""
    passed = Verification("LlamaForCausalLM", "", 0.0, 1.0, False)
    monkeypatch.setattr("regrow.walk.verify_checkpoint", lambda model, folder, ids: passed)
    monkeypatch.setattr("regrow.evaluation.compare.complete", lambda model, tokenizer, prompt: "…")


QUICK = {
    "training.batch_size": 4,
    "training.eval_interval": 4,
    "evaluation.completions": 1,
    "data.sequence_length": 32,
    "pruning.interval": 1,
    "pruning.calibration_batches": 2,
    "analysis.calibration_batches": 1,
    "evaluation.windows": [32],
    "evaluation.speed": False,
    "evaluation.memory": False,
    "lora.dropout": 0.0,
}
"""Settings that make a whole run take a second or two."""

ARGV = ["prune", "tiny", "--recipe", "lorashear", "--out", "my run"]
LONG_NAME = "<b>a-source-with-a-name-that-has-no-place-to-break-" + "and-goes-on-" * 8


@pytest.fixture(scope="session")
def reported_run(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that a report can show: analysis, several sources, speed, completions, and TensorBoard."""
    out = tmp_path_factory.mktemp("report") / "out"
    (checkpoint / "README.md").write_text("---\nlicense: mit\nlicense_link: LICENSE\n---\n\n# Tiny\n")
    extra = {
        "data.sources": [{"name": name, "source": str(text)} for name in ("tales", LONG_NAME)],
        "recovery.interval": 4,
        "analysis.windows": 2,
        "pruning.shape": "free",
        "evaluation.prompts": ["Once upon a time", "W" * 120],
        "evaluation.speed": True,
        "evaluation.speed_batches": [1],
        "output.tracker": "tensorboard",
    }
    torch.set_num_threads(1)
    recipe = load_recipe("lorashear", {**QUICK, **extra, "training.steps": 12, "pruning.sparsity": 0.3})
    with pytest.MonkeyPatch.context() as patch:
        passed = Verification("UnevenForCausalLM", "", 0.0, 1.0, False)
        patch.setattr("regrow.walk.verify_checkpoint", lambda model, folder, ids: passed)
        prune(str(checkpoint), out, recipe, argv=ARGV)
    return out
