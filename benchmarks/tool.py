r"""Where a run's time goes: seconds and share of every part of it, for several recipes on one model.

The parts are those of `results.json` (see docs/report.md); what each came to is a table in Markdown. `--profile` runs
everything under cProfile, which slows Python down far more than torch, and writes for each recipe the functions that
took longest, by their own time and with all that they call: to find what to make faster, not to measure it.

    python benchmarks/tool.py MODEL --data TRAIN --eval-data TEST --recipes regrow loraprune --steps 400 \
        --sparsity 0.5 --threads 1 --out tool/
"""

import argparse
import cProfile
import io
import json
import pstats
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from environment import describe_machine

import regrow
from regrow.recipe import parse_assignments
from regrow.terminal import terminal_progress

RECIPES = ["loraprune", "lorashear", "llm-pruner", "regrow"]
LISTED = 40
"""Functions in a profile, each way."""


def run(arguments: argparse.Namespace, recipe: str, folder: Path) -> dict[str, float]:
    """One run from the start; its seconds by part."""
    profiler = cProfile.Profile() if arguments.profile else None
    with profiler or nullcontext(), terminal_progress() as progress:
        result = regrow.prune(
            arguments.model, folder / recipe.replace("/", "_"), recipe, data=arguments.data,
            eval_data=arguments.eval_data, sparsity=arguments.sparsity, steps=arguments.steps, fresh=True,
            overrides=parse_assignments(arguments.set), progress=progress,
        )  # fmt: skip
    if profiler:
        (folder / f"{recipe.replace('/', '_')}.profile.txt").write_text(top(profiler))
    return result.results["seconds"]


def top(profiler: cProfile.Profile) -> str:
    """The functions that took longest, by their own time, then with what they call."""
    text = io.StringIO()
    stats = pstats.Stats(profiler, stream=text)
    for key in ("tottime", "cumulative"):
        stats.sort_stats(key).print_stats(LISTED)
    return text.getvalue()


def table(seconds: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each part, in the order in which they came, a column for each recipe."""
    parts = dict.fromkeys(part for one in seconds.values() for part in one if part != "total")
    lines = [["part", *seconds], ["---", *["---:"] * len(seconds)]]
    for part in [*parts, "total"]:
        shares = [(one.get(part), one["total"]) for one in seconds.values()]
        lines.append([part, *("" if s is None else f"{s:.1f} s, {s / total:.1%}" for s, total in shares)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="key.path=value")
    parser.add_argument("--profile", action="store_true", help="write what took longest, for each recipe")
    parser.add_argument("--out", type=Path, help="keep the runs, the figures and the profiles here")
    arguments = parser.parse_args()
    if arguments.profile and not arguments.out:
        parser.error("--profile writes files; give --out")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        seconds = {recipe: run(arguments, recipe, folder) for recipe in arguments.recipes}
    print(table(seconds))
    if arguments.out:
        record = {"seconds": seconds, "machine": describe_machine(), "arguments": vars(arguments)}
        (arguments.out / "tool.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        lines = [f"* {key}: {value}" for key, value in (record["machine"] | vars(arguments)).items()]
        (arguments.out / "tool.md").write_text("\n".join([table(seconds), "", *lines]) + "\n")


if __name__ == "__main__":
    main()
