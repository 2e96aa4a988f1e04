r"""How good each recipe, criterion or setting is: `regrow.compare`, with the settings that README.md's tables share.

What is measured with: steps of 8 × 256 tokens, one thread, no speed (models so small are bound by the launching of
operators) and no memory of the result. A finished run is not run again.

    python benchmarks/quality.py MODEL --data TRAIN --eval-data TEST --contenders loraprune regrow random \
        --sparsity 0.5 --steps 200 --seeds 3 --out quality/
"""

import argparse
import json
from pathlib import Path

from environment import describe_machine

import regrow
from regrow.recipe import parse_assignments
from regrow.terminal import terminal_progress

PEERS = ["random", "magnitude", "llm-pruner", "loraprune", "lorashear", "regrow"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--contenders", nargs="+", default=PEERS)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="key.path=value")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    settings = {"evaluation.speed": False, "evaluation.memory": False} | parse_assignments(given.set)
    with terminal_progress() as progress:
        found = regrow.compare(
            given.model, given.out, given.contenders, data=given.data, eval_data=given.eval_data,
            sparsities=given.sparsity, seeds=given.seeds, steps=given.steps, threads=given.threads,
            overrides=settings, progress=progress,
        )  # fmt: skip
    (given.out / "machine.json").write_text(json.dumps(describe_machine(), indent=2))
    print((found.folder / "comparison.md").read_text())


if __name__ == "__main__":
    main()
