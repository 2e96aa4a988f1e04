r"""Whole runs on one GPU, start to end: a LLaMA of 7B's shape with random weights, pruned by half in a few steps.

A random checkpoint is written in bfloat16 and pruned with each recipe on a base kept whole, in 8 bits (int8) and in 4
(nf4), each run in a process of its own. For every part of a run: seconds, the most that torch's allocator handed out,
and, where the estimate before a run says something of it, that. What is trained in so few steps is worth nothing; what
a step of each method costs once it runs is `gpu.py`'s question.

    python benchmarks/gpu_run.py --data TRAIN --eval-data TEST --folder SCRATCH --out gpu-run/
    python benchmarks/gpu_run.py --shape tiny --device cpu --data TRAIN --eval-data TEST --folder SCRATCH
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from environment import describe_machine
from gpu import SHAPES, run
from random_checkpoint import write_random_checkpoint
from transformers import LlamaConfig

import regrow
from regrow.checkpoint.load import compute_dtype, load_config, load_skeleton
from regrow.criteria.registry import find_criterion
from regrow.planning.memory import Sizes, estimate_memory
from regrow.recipe import Recipe, load_recipe, parse_assignments
from regrow.structure.finding import find_groups

CASES = ["regrow", "regrow int8", "regrow nf4", "loraprune", "loraprune int8", "loraprune nf4"]
SETTINGS: dict[str, Any] = {
    "pruning.sparsity": 0.5, "training.steps": 8, "training.batch_size": 2, "training.eval_windows": 4,
    "evaluation.max_windows": 8, "evaluation.speed": False, "evaluation.memory": False,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "loraprune": {"pruning.interval": 2},
    "regrow": {
        "pruning.calibration_batches": 4, "search.evaluations": 8, "search.windows": 4, "search.judge_windows": 8,
        "search.trial_steps": 4, "compensation.windows": 16,
    },
}  # fmt: skip


class Parts(Silent):
    """A `Progress` that reads and resets the peak where a part of the run begins."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self.told: list[str] = []
        self._part = ""
        self._began = time.monotonic()

    def stage(self, name: str, total: int | None = None) -> None:
        """Close the books of the part before."""
        told = f"{time.monotonic() - self._began:7.1f} s  {name} …"
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peaks[self._part] = max(self.peaks.get(self._part, 0), peak)
            torch.cuda.reset_peak_memory_stats(self.device)
            told += f" ({self._part or 'before'}: {peak / 1e9:.2f} GB)"
        print(told, file=sys.stderr, flush=True)
        self._part = name

    def say(self, message: str) -> None:
        """Keep it, and pass it on."""
        self.told.append(message)
        print(message, file=sys.stderr, flush=True)


def recipe_of(case: str, arguments: argparse.Namespace) -> Recipe:
    name, _, kept = case.partition(" ")
    files = {"data.source": arguments.data, "data.eval_source": arguments.eval_data, "device": arguments.device}
    settings = (
        SETTINGS | OWN[name] | files | {"training.quantization": kept or "none"} | parse_assignments(arguments.set)
    )
    return load_recipe(name, settings)


def estimated(model: str, recipe: Recipe, device: torch.device) -> dict[str, int]:
    """Bytes by part of the run, as told before it."""
    skeleton, weights = load_skeleton(model), compute_dtype(load_config(model), device)
    sizes = Sizes.of(skeleton, find_groups(skeleton), recipe)
    needs = frozenset(find_criterion(recipe.pruning.criterion).needs)
    return estimate_memory(sizes, recipe, needs, weights, torch.bfloat16 if device.type == "cuda" else weights)


def run_here(arguments: argparse.Namespace) -> dict[str, Any]:
    """In the child: one run."""
    device, model = torch.device(arguments.device), str(arguments.folder / "dense")
    recipe, parts = recipe_of(arguments.child, arguments), Parts(device)
    out = arguments.folder / arguments.child.replace(" ", "-")
    result = regrow.prune(model, out, recipe, fresh=True, progress=parts)
    parts.stage("the end")
    return {
        "seconds": result.results["seconds"],
        "peaks": parts.peaks,
        "estimated": estimated(model, recipe, device),
        "size": result.results["size"],
        "told": parts.told,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def tables(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: of each run, its parts."""
    lines = ["| run | part | seconds | peak, GB | estimated, GB |", "|---|---|---:|---:|---:|"]
    for case, one in found.items():
        if "failed" in one:
            lines.append(f"| {case} | {one['failed']} | | | |")
            continue
        parts = dict.fromkeys([*one["seconds"], *one["peaks"]])
        for part in (part for part in parts if part not in ("", "the end")):
            row = [f"{one['seconds'][part]:.1f}" if part in one["seconds"] else ""]
            row += [f"{one[key][part] / 1e9:.2f}" if part in one[key] else "" for key in ("peaks", "estimated")]
            lines.append(f"| {case} | {part} | {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="key.path=value")
    parser.add_argument("--seconds", type=float, default=3600, help="for all runs")
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint (made once) and the runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_here(arguments), default=str))
        return
    dense = arguments.folder / "dense"
    if not (dense / "model.safetensors.index.json").is_file():
        config = LlamaConfig(**SHAPES[arguments.shape], vocab_size=32000, dtype="bfloat16")
        write_random_checkpoint(config, dense, "4GB", arguments.device)
    found, began = {}, time.monotonic()
    for case in arguments.cases:
        found[case] = run(case, arguments.seconds - (time.monotonic() - began), __file__)
        print(f"{case}: {json.dumps(found[case])}", file=sys.stderr, flush=True)
    hidden = ("child", "folder", "data", "eval_data", "out")
    told = {key: value for key, value in vars(arguments).items() if key not in hidden}
    text = "\n".join([tables(found), "", *(f"* {key}: {value}" for key, value in (describe_machine() | told).items())])
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gpu_run.md").write_text(text + "\n")
        record = {"cases": found, "machine": describe_machine(), "arguments": told}
        (arguments.out / "gpu_run.json").write_text(json.dumps(record, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
