r"""Recipes and criteria on one model, text, number of steps and evaluation; several seeds; one table.

A contender is a recipe (`regrow`), or a recipe with another criterion (`loraprune+magnitude`). Every cell is
a run of `regrow.prune`; a finished one is not run again. Δ is ln(perplexity) − ln(dense perplexity).

    python benchmarks/quality.py MODEL --data TRAIN --eval-data TEST --contenders loraprune regrow random \
        --sparsity 0.5 --steps 200 --seeds 3 --threads 1 --out quality/
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from environment import describe_machine

import regrow


def run_cell(arguments: argparse.Namespace, contender: str, sparsity: float, seed: int) -> dict[str, Any]:
    folder = arguments.out / f"{contender.replace('/', '_')}-{sparsity}-{arguments.steps}-{seed}"
    if (folder / "results.json").is_file():
        return json.loads((folder / "results.json").read_text())
    recipe, _, criterion = contender.partition("+")
    settings = {"evaluation.speed": False, "evaluation.memory": False} | dict(
        assignment.split("=", 1) for assignment in arguments.set
    )
    result = regrow.prune(
        arguments.model,
        folder,
        recipe,
        data=arguments.data,
        eval_data=arguments.eval_data,
        sparsity=sparsity,
        steps=arguments.steps,
        seed=seed,
        criterion=criterion or None,
        overrides=settings,
    )
    return result.results


def spread(values: list[float]) -> str:
    middle = statistics.mean(values)
    return f"{middle:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{middle:.2f}"


def row(contender: str, sparsity: float, cells: list[dict[str, Any]]) -> str:
    protocol = next(iter(cells[0]["perplexity"]["dense"]))
    quality = {kind: [c["perplexity"][kind][protocol]["value"] for c in cells] for kind in ("dense", "cut", "pruned")}
    delta = statistics.mean(math.log(p) - math.log(d) for p, d in zip(quality["pruned"], quality["dense"], strict=True))
    reached = cells[0]["sparsity"]["block"]
    seconds = statistics.mean(cell["seconds"]["train"] for cell in cells)
    return (
        f"| {contender} | {sparsity:.0%} | {reached:.2%} | {statistics.mean(quality['dense']):.2f} "
        f"| {spread(quality['cut'])} | {spread(quality['pruned'])} | {delta:.3f} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--contenders", nargs="+", default=["loraprune", "llm-pruner", "regrow", "magnitude", "random"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="key.path=value")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [
        "| contender | asked | removed | dense | cut, not recovered | recovered | Δ | training, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines), flush=True)
    for sparsity in arguments.sparsity:
        for contender in arguments.contenders:
            cells = [run_cell(arguments, contender, sparsity, seed) for seed in range(arguments.seeds)]
            lines.append(row(contender, sparsity, cells))
            print(lines[-1], flush=True)
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n")
    (arguments.out / "machine.json").write_text(json.dumps(describe_machine(), indent=2))


if __name__ == "__main__":
    main()
