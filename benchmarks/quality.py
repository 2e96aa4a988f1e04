r"""Recipes and criteria on one model, text, number of steps and evaluation; several seeds; one table.

A contender is a recipe (`regrow`), a recipe with another criterion (`loraprune+magnitude`), or a recipe with settings
of its own (`regrow@compensation.method=none@search.evaluations=0`). Every cell is a run of `regrow.prune` in a process
of its own, so that its peak memory can be told; a finished one is not run again. Δ is ln(perplexity) − ln(dense
perplexity).

    python benchmarks/quality.py MODEL --data TRAIN --eval-data TEST --contenders loraprune regrow random \
        --sparsity 0.5 --steps 200 --seeds 3 --threads 1 --out quality/
"""

import argparse
import json
import math
import multiprocessing
import resource
import statistics
from pathlib import Path
from typing import Any

from environment import describe_machine

HEAD = (
    "| contender | asked | removed | rank | trainable | dense | cut, not recovered | recovered | Δ | whole run, s "
    "| peak memory, MiB |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def run(arguments: argparse.Namespace, contender: str, sparsity: float, seed: int, folder: Path) -> None:
    """One cell, in a process of its own; leaves `cost.json` beside the run's results."""
    import torch

    import regrow
    from regrow.recipe import parse_assignments

    torch.set_num_threads(arguments.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name, *own = contender.split("@")
    recipe, _, criterion = name.partition("+")
    settings = {"evaluation.speed": False, "evaluation.memory": False} | dict(
        assignment.split("=", 1) for assignment in (*arguments.set, *own)
    )
    regrow.prune(
        arguments.model, folder, recipe, data=arguments.data, eval_data=arguments.eval_data, sparsity=sparsity,
        steps=arguments.steps, seed=seed, criterion=criterion or None,
        overrides=parse_assignments([f"{key}={value}" for key, value in settings.items()]),
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    (folder / "cost.json").write_text(json.dumps({"peak_kib_above_imports": peak}))


def cell(arguments: argparse.Namespace, contender: str, sparsity: float, seed: int) -> dict[str, Any]:
    """The results of a cell, run now or found finished."""
    folder = arguments.out / f"{contender.replace('/', '_')}-{sparsity}-{arguments.steps}-{seed}"
    if not (folder / "results.json").is_file():
        child = multiprocessing.get_context("spawn").Process(
            target=run, args=(arguments, contender, sparsity, seed, folder)
        )
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"{contender} at {sparsity}, seed {seed}, failed")
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    cost = folder / "cost.json"
    results["peak_mib"] = json.loads(cost.read_text())["peak_kib_above_imports"] / 1024 if cost.is_file() else math.nan
    return results


def spread(values: list[float]) -> str:
    middle = statistics.mean(values)
    return f"{middle:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{middle:.2f}"


def row(contender: str, sparsity: float, cells: list[dict[str, Any]]) -> str:
    protocol = next(iter(cells[0]["perplexity"]["dense"]))
    quality = {kind: [c["perplexity"][kind][protocol]["value"] for c in cells] for kind in ("dense", "cut", "pruned")}
    delta = statistics.mean(math.log(p) - math.log(d) for p, d in zip(quality["pruned"], quality["dense"], strict=True))
    training = cells[0]["training"]
    seconds = statistics.mean(each["seconds"]["total"] - each["seconds"]["evaluate"] for each in cells)
    return (
        f"| {contender} | {sparsity:.0%} | {cells[0]['sparsity']['block']:.2%} | {training['rank']} "
        f"| {training['trainable_parameters_at_the_end']:,} | {statistics.mean(quality['dense']):.2f} "
        f"| {spread(quality['cut'])} | {spread(quality['pruned'])} | {delta:.3f} | {seconds:.0f} "
        f"| {statistics.mean(each['peak_mib'] for each in cells):.0f} |"
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
    print(HEAD, flush=True)
    lines = [HEAD]
    for sparsity in arguments.sparsity:
        for contender in arguments.contenders:
            cells = [cell(arguments, contender, sparsity, seed) for seed in range(arguments.seeds)]
            lines.append(row(contender, sparsity, cells))
            print(lines[-1], flush=True)
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n")
    (arguments.out / "machine.json").write_text(json.dumps(describe_machine(), indent=2))


if __name__ == "__main__":
    main()
