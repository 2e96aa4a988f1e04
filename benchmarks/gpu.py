r"""What a step of each method costs on one GPU, and what a cut model gains there: memory, tokens a second, latency.

A LLaMA of 7B's shape with random weights, made on the device; for each method and each way to keep the base (whole,
int8, nf4) the peak of a scoring-and-training step and its rate:

* `lora`: plain LoRA, nothing scored;
* `loraprune`: a training step scored from the LoRA factors, as in the recipe;
* `llm-pruner`: a scoring step with true weight gradients (no quantised base has any), as before its one shot;
* `regrow`: a training step with gates scored (gate-fisher) and the model's own weights as teacher; with `,
  recomputing` as with `training.gradient_checkpointing`.

Then prompt and decode latency of the dense model beside two cut by 20 % and 50 % (random units, equal layers), decoding
also with a step as one CUDA graph, and the memory of one step of a 65B shape in 4 bits with activation checkpointing.
On a CPU every case is a process of its own, so that peaks are clean; on a GPU the allocator tells them. One that runs
out of memory does not end the others, and one that the time left does not allow is skipped.
Beside them stand what the LoRAPrune paper (arXiv 2305.18403) reports for LLaMA-7B, at a batch of its own.

    python benchmarks/gpu.py --out gpu/
    python benchmarks/gpu.py --shape tiny --device cpu
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from environment import describe_machine
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from regrow.data.tokens import Batch, Windows
from regrow.evaluation.memory_probe import highest, resident
from regrow.evaluation.speed import cache_names, measure_speed
from regrow.planning.allocation import choose
from regrow.planning.plan import Plan
from regrow.progress import Silent
from regrow.recipe import Recipe, load_recipe
from regrow.recovery.distillation import distil
from regrow.recovery.learner import Learner
from regrow.recovery.pruner import Pruner
from regrow.structure.adapters import attach_lora
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.quantise import check_bitsandbytes, quantisable, quantise
from regrow.structure.quantised import held_bytes

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4},
}
RECIPES = {
    "lora": ("loraprune", {}),
    "loraprune": ("loraprune", {}),
    "llm-pruner": ("llm-pruner", {"pruning.calibration_batches": 1}),
    "regrow": ("regrow", {"distillation.teacher": "self"}),
}
PAPER = {"loraprune": 18.3, "loraprune int8": 13.8, "llm-pruner": 38.6}
"""GB, by case."""
SPARSITIES = (0.2, 0.5)
SPEED, LARGE, RECOMPUTING = "speed", "65b nf4", ", recomputing"
CASES = [
    "lora", "loraprune", "llm-pruner", "regrow", "lora int8", "loraprune int8", "regrow int8", "lora nf4",
    "loraprune nf4", "regrow nf4", "regrow, recomputing", "regrow int8, recomputing", "regrow nf4, recomputing", SPEED,
    LARGE,
]  # fmt: skip
LEAST_SECONDS = {SPEED: 60, LARGE: 90}
"""What must be left for a case to begin; 15 for the others."""


@dataclass(frozen=True)
class Step:
    """What one step took."""

    parameters: int
    held_bytes: int
    """Of the weights, adapters included, as they are kept."""
    peak_bytes: int
    """On CUDA the most that torch's allocator handed out, weights included, without the context. On a CPU what the
    process had more than before the model was made."""
    seconds: float
    """The median."""
    tokens_per_second: float
    batch: int
    length: int


def build(shape: str, kept: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A LLaMA with random weights, each made where it will lie."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], vocab_size=128 if shape == "tiny" else 32000, max_position_embeddings=2048)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if kept != "none":
        check_bitsandbytes("base", kept)
        linears = quantisable(model, kept, device)
        while linears:  # it would hold on to what has been replaced
            name, linear = linears.popitem()
            values = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(0, config.initializer_range)
            linear.weight = nn.Parameter(values, requires_grad=False)
            model.set_submodule(name, quantise(linear, kept, dtype))
        setattr(model, {"int8": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}[kept], True)  # for peft
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            values = torch.ones(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim > 1:
                values.normal_(0, config.initializer_range)
            set_module_tensor_to_device(model, name, device, value=values)
    return model.to(device).eval()


def method_and_base(case: str) -> tuple[str, str]:
    """What a case's step is, and how its base is kept."""
    method, _, kept = case.partition(", ")[0].partition(" ")
    return method, kept or "none"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def begin_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure_step(arguments: argparse.Namespace, case: str, shape: str, batch: int, recomputing: bool) -> Step:
    """Peak and rate of one method's step."""
    method, kept = method_and_base(case)
    device = torch.device(arguments.device)
    # What the cases before have left (workspaces of CUDA's libraries) is not this one's.
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name, settings = RECIPES[method]
    settings = settings | {"training.gradient_checkpointing": recomputing, "training.steps": 10**4}
    recipe = load_recipe(name, settings)
    model = build(shape, kept, device, dtype)
    parameters = model.num_parameters()
    lora = recipe.lora
    attach_lora(model, find_groups(model).linears, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout)
    ids_BT = torch.randint(model.config.vocab_size, (batch, arguments.length))
    with ExitStack() as stack:
        step = prepare(stack, method, model, recipe, iter(lambda: Batch(ids_BT), None))
        begin_peak(device)
        seconds = []
        for _ in range(arguments.warm_up + arguments.steps):
            began = time.perf_counter()
            step()
            wait(device)
            seconds.append(time.perf_counter() - began)
        peak = (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else highest()) - before
        median = sorted(seconds[arguments.warm_up :])[arguments.steps // 2]
        return Step(parameters, held_bytes(model), peak, median, ids_BT.numel() / median, *ids_BT.shape)


def prepare(
    stack: ExitStack, method: str, model: PreTrainedModel, recipe: Recipe, data: Iterator[Batch]
) -> Callable[[], object]:
    """What a step of a method is."""
    learner = Learner(model, recipe.training, data)
    if method == "lora":
        return learner.step
    pruner = stack.enter_context(Pruner(model, find_groups(model), recipe, learner, data))
    if method == "llm-pruner":
        return pruner.calibrate
    if recipe.distillation.on:
        text, folder = Windows(next(data).ids_BT, "random", "none"), Path("not written")
        everything = partial(torch.arange, len(text))
        learner.objective = distil(recipe.distillation, learner, pruner.gates, text, everything, folder, Silent())
    return pruner.train_step


def cut_model(shape: str, sparsity: float, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model without a share of its units, chosen at random, the same number in each layer."""
    model = build(shape, "none", device, dtype)
    groups, chance = find_groups(model), torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.units, generator=chance) for group in groups}
    pruning = load_recipe("random", {"pruning.sparsity": sparsity, "pruning.schedule": "one-shot"}).pruning
    whole = Plan.whole(groups)
    cut(model, groups, choose(groups, whole, scores, pruning).positions_within(whole))
    return model


def measure_latency(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode of the dense model and of cut ones, in turns."""
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = {"dense": build(arguments.shape, "none", device, dtype)}
    for sparsity in SPARSITIES:
        models[f"{sparsity:.0%} cut"] = cut_model(arguments.shape, sparsity, device, dtype)
    prompt, batches = arguments.length // 2, (1, 8)
    found = measure_speed(models, batches=batches, prompt=prompt, new_tokens=16, repeats=3, warm_up=1)
    replayed = {name: [replayed_decoding(model, batch, prompt) for batch in batches] for name, model in models.items()}
    return {
        name: {
            "parameters": models[name].num_parameters(),
            "speed": [asdict(one) for one in each],
            "replayed": replayed[name],
        }
        for name, each in found.items()
    }


@torch.no_grad()
def replayed_decoding(model: PreTrainedModel, batch: int, prompt: int, new_tokens: int = 32) -> float | None:
    """New tokens a second where a step is one CUDA graph, as in serving engines: the median of five; None on a CPU.

    Launched one by one, a step's kernels cost the CPU more time than the GPU, whatever a cut has spared the latter.
    """
    device = model.device
    if device.type != "cuda":
        return None
    repeats, first_steps = 5, 4
    ids_BT = torch.randint(model.config.vocab_size, (batch, prompt), device=device)
    cache = StaticCache(config=model.config, max_cache_len=prompt + first_steps + repeats * new_tokens)
    kept = {cache_names(model)[0]: cache}
    model(input_ids=ids_BT, use_cache=True, **kept)
    next_B1, position_11 = ids_BT[:, -1:].clone(), torch.tensor([[prompt]], device=device)

    def step() -> None:
        logits_B1V = model(input_ids=next_B1, position_ids=position_11, use_cache=True, **kept).logits
        next_B1.copy_(logits_B1V[:, -1:].argmax(-1))
        position_11.add_(1)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(first_steps - 1):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    rates = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        for _ in range(new_tokens):
            graph.replay()
        wait(device)
        rates.append(batch * new_tokens / (time.perf_counter() - began))
    return sorted(rates)[repeats // 2]


def run_here(arguments: argparse.Namespace) -> dict[str, Any]:
    """In the child: one case."""
    if arguments.child == SPEED:
        return measure_latency(arguments)
    if arguments.child == LARGE:
        shape = "tiny" if arguments.shape == "tiny" else "65b"
        return asdict(measure_step(arguments, "loraprune nf4", shape, 1, recomputing=True))
    recomputing = arguments.child.endswith(RECOMPUTING)
    return asdict(measure_step(arguments, arguments.child, arguments.shape, arguments.batch, recomputing))


def attempt(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a case came to, or why it did not."""
    try:
        return run_here(arguments)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}


def run_on_gpu(arguments: argparse.Namespace, case: str) -> dict[str, Any]:
    """Run a case in this process, and leave nothing of it on the GPU."""
    device = torch.device(arguments.device)
    found = attempt(argparse.Namespace(**vars(arguments) | {"child": case}))
    gc.collect()
    torch.cuda.empty_cache()
    found["device_left_bytes"] = torch.cuda.memory_allocated(device)
    found["device"] = torch.cuda.get_device_name(device)
    found["device_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return found


def run(case: str, seconds: float, script: str = __file__) -> dict[str, Any]:
    """Run a case in a process of its own; what it came to, or why it did not."""
    command = [sys.executable, script, *sys.argv[1:], "--child", case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in the {seconds:.0f} s that were left"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def tables(found: dict[str, dict[str, Any]], paper: Mapping[str, float]) -> str:
    """Markdown: the steps, then the latencies."""
    lines = [
        "| step | base | batch | peak, GB | weights, GB | tokens/s | the paper's GB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for case, one in found.items():
        if case == SPEED:
            continue
        method, kept = method_and_base(case)
        told = [method + (RECOMPUTING if case.endswith(RECOMPUTING) else ""), "whole" if kept == "none" else kept]
        if "failed" in one:
            lines.append(f"| {' | '.join([*told, '', one['failed'], '', '', ''])} |")
            continue
        told += [f"{one['batch']} × {one['length']}", f"{one['peak_bytes'] / 1e9:.2f}"]
        told += [f"{one['held_bytes'] / 1e9:.2f}", f"{one['tokens_per_second']:,.0f}", str(paper.get(case, ""))]
        lines.append(f"| {' | '.join(told)} |")
    speed = found.get(SPEED, {"failed": "not asked for"})
    if "failed" in speed:
        return "\n".join([*lines, "", f"Latency: {speed['failed']}"])
    phases = ("prefill, tokens/s", "decode, tokens/s", "decode as a CUDA graph")
    lines += ["", f"| model | parameters | batch | {' | '.join(f'{phase} | ÷ dense' for phase in phases)} |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    dense = speed["dense"]
    for name, one in ((name, one) for name, one in speed.items() if not name.startswith("device")):
        for number, (each, base) in enumerate(zip(one["speed"], dense["speed"], strict=True)):
            told = [name, f"{one['parameters']:,}", str(each["batch"])]
            rates = [(each[phase]["median"], base[phase]["median"]) for phase in ("prefill", "decode")]
            for rate, first in (*rates, (one["replayed"][number], dense["replayed"][number])):
                told += ["", ""] if rate is None else [f"{rate:,.1f}", f"{rate / first:.2f}"]
            lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--batch", type=int, default=1, help="sequences; the paper's is 1")
    parser.add_argument("--length", type=int, default=512, help="tokens in each; that of its authors' code is 512")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=570, help="for all cases; what does not fit is skipped")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("gpu.py: there is no CUDA device here; --shape tiny --device cpu shows that the cases work")
    if arguments.child:
        print(json.dumps(attempt(arguments)))
        return
    found, began = {}, time.monotonic()
    for case in arguments.cases:
        left = arguments.seconds - (time.monotonic() - began)
        short = left < LEAST_SECONDS.get(case, 15)
        if short:
            found[case] = {"failed": f"skipped, {left:.0f} s were left"}
        else:
            found[case] = run_on_gpu(arguments, case) if arguments.device.startswith("cuda") else run(case, left)
        print(f"{case}: {json.dumps(found[case])}", file=sys.stderr, flush=True)
    machine = describe_machine() | {"bitsandbytes": version("bitsandbytes"), "CUDA": torch.version.cuda}
    machine["device"] = next((one["device"] for one in found.values() if "device" in one), "cpu")
    told = {key: value for key, value in vars(arguments).items() if key not in ("child", "out")}
    text = "\n".join(
        [
            tables(found, PAPER if arguments.shape == "7b" else {}),
            "",
            *(f"* {key}: {value}" for key, value in (machine | told).items()),
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gpu.md").write_text(text + "\n")
        record = {"cases": found, "machine": machine, "arguments": told}
        (arguments.out / "gpu.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
