"""What offloading saves and costs: peak memory and time of a short run with all weights here, on disk, or in parts.

A random LLaMA (107M parameters by default) is pruned by half and trained for a few steps, on the text of Python's own
library, on a CPU, each run in a process of its own with the same settings. Memory is the most that the process had in a
stage, above what it had before the model was loaded; pages of files that are mapped at that moment count. Of two
processes it is the main one's. It is checked that runs of as many processes leave the same weights.

    python benchmarks/offload.py --threads 1
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from environment import describe_machine
from memory import COMMON, Peaks, write_inputs

import regrow
from regrow.launcher import rank
from regrow.recipe import load_recipe

SETTINGS = {
    **COMMON, "training.gradient_checkpointing": True, "training.steps": 2, "pruning.sparsity": 0.5,
    "data.sequence_length": 64, "evaluation.windows": [64], "evaluation.completions": 0,
}  # fmt: skip
RECIPES = {"loraprune": "no teacher", "regrow": "a teacher's answers on disk"}
RUNS = ((1, "none"), (1, "disk"), (2, "none"), (2, "shards"))
"""How many processes, and where the weights lie."""
FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Has glibc give weights back to the system once they are freed, instead of keeping their memory in pieces."""
STAGES = ("load model", "score", "train", "merge and save", "evaluate")


def run_here(arguments: argparse.Namespace) -> None:
    """In the child."""
    torch.set_num_threads(arguments.threads)
    scratch, place = arguments.folder, arguments.child[2]
    recipe = load_recipe(arguments.child[0], {**SETTINGS, "data.source": str(scratch / "text.txt")})
    peaks, out = Peaks(), scratch / "-".join(arguments.child)
    begun = time.perf_counter()
    regrow.prune(str(scratch / "model"), out, recipe, offload=place, progress=peaks)
    if rank():
        return
    peaks.stage("")
    found = {
        "seconds": time.perf_counter() - begun,
        "stages": json.loads((out / "results.json").read_text())["seconds"],
        "sha256": hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "peaks": peaks.found,
    }
    print(json.dumps(found))


def table(found: dict[str, dict[str, dict[str, dict[str, int]]]]) -> str:
    """MiB by stage; some stages begin others, whose peaks count there."""
    lines = [
        "| run | processes | weights | " + " | ".join(STAGES) + " | train, s |",
        "|---|---:|---|" + "---:|" * (len(STAGES) + 1),
    ]
    for recipe, runs in found.items():
        for run, one in runs.items():
            count, place = run.split()
            peaks = dict(one["peaks"])
            peaks["merge and save"] = max(peaks["merge and save"], peaks.get("write checkpoint", 0))
            peaks["evaluate"] = max(size for stage, size in peaks.items() if stage.startswith(("evaluate", "perplex")))
            cells = [f"{peaks[stage] / 2**20:,.0f}" for stage in STAGES]
            where = "here" if place == "none" else place
            cells.append(f"{one['stages']['train']:.0f}")
            lines.append(f"| {RECIPES[recipe]} | {count} | {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        run_here(arguments)
        return
    found: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(arguments, Path(folder))
        for recipe in arguments.recipes:
            found[recipe] = {}
            for count, place in RUNS:
                launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
                own = [*sys.argv[1:], "--folder", folder, "--child", recipe, str(count), place]
                command = [sys.executable, *launcher, __file__, *own]
                child = subprocess.run(command, env=os.environ | FREED, stdout=subprocess.PIPE, text=True, check=True)
                found[recipe][f"{count} {place}"] = json.loads(child.stdout.splitlines()[-1])
            weights = {(run.split()[0], one["sha256"]) for run, one in found[recipe].items()}
            assert len(weights) == len({count for count, _ in RUNS}), "offloading changed the result"
    print(table(found))
    if arguments.out:
        results = {**found, "machine": describe_machine(), "arguments": vars(arguments)}
        arguments.out.write_text(json.dumps(results, indent=2, default=str))


if __name__ == "__main__":
    main()
