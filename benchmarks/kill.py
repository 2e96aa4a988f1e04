r"""`kill -9` at random moments: whether what is resumed comes to the same bytes as what nothing has stopped.

One run to the end; then again and again a run that is killed, resumed, sometimes killed once more and resumed again.
The moments are spread evenly over the time of the whole run, by chance within their share of it. Every run is a process
of its own, forked from one that has imported everything: so no kill is wasted on the imports. Nor on those of the fresh
process that checks the checkpoint, most of so short a run: it is left out unless `--verify` asks for it. The SHA-256 is
of all weight files of the result. On a CPU, whatever else there is.

    python benchmarks/kill.py MODEL --data TRAIN --eval-data TEST --recipe regrow --kills 20 --out kills/ \
        --set training.steps=40 search.evaluations=16
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU cannot be used in a fork: tests/test_cuda.py kills runs on one

import regrow.report.terminal
import regrow.run
import regrow.terminal
import regrow.walk
from regrow import cli
from regrow.checkpoint.verify import Verification

HEAD = "| kill | after, s | stage | resumed | same bytes |\n|---:|---|---|---|---|"
AGAIN = 1 / 3
"""Share of the resumed runs that are killed too."""
STAGE = re.compile(r"(\w[\w, -]*) …")
RESUMING = re.compile(r"resuming (.*)")


@dataclass(frozen=True)
class Ended:
    """What became of a process."""

    killed: bool
    seconds: float
    stage: str
    """The last that it named."""
    resumed: str
    """Where it said it went on."""


def start(arguments: argparse.Namespace, out: Path, seconds: float | None) -> Ended:
    """`regrow prune` in a process of its own, killed after so many seconds if it still runs."""
    words = ["prune", arguments.model, "--out", out, "--recipe", arguments.recipe, "--data", arguments.data]
    words += ["--eval-data", arguments.eval_data, *(f"--set={assignment}" for assignment in arguments.set)]
    log = out.with_suffix(".log")
    began = time.monotonic()
    child = os.fork()
    if not child:
        regrow_in_this_process([str(word) for word in words], log)
    code = None
    while code is None:
        if seconds is not None and time.monotonic() - began >= seconds:
            os.kill(child, signal.SIGKILL)
            seconds = None
        done, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else time.sleep(0.01)
    text = log.read_text()
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run failed:\n{text}")
    stages, resumed = STAGE.findall(text), RESUMING.findall(text)
    return Ended(
        code != 0, time.monotonic() - began, stages[-1] if stages else "before the first", resumed[0] if resumed else ""
    )


def regrow_in_this_process(words: list[str], log: Path) -> NoReturn:
    """The command line, in a process that has just been forked."""
    for number, name in enumerate((os.devnull, os.devnull, log)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["regrow", *words]
    code: Any = 1
    try:
        cli.main()
    except SystemExit as done:
        code = done.code
    finally:
        sys.stderr.flush()
        os._exit(code)


def weights_sha256(out: Path) -> str:
    """Of the result."""
    digest = hashlib.sha256()
    for file in sorted((out / "model").glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--recipe", default="regrow")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="key.path=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    if not arguments.verify:
        passed = Verification("left out", "", 0.0, 1.0, False)
        regrow.walk.verify_checkpoint = lambda *_: passed
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    whole = arguments.out / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    length = start(arguments, whole, None).seconds
    expected = weights_sha256(whole)
    lines = [f"recipe {arguments.recipe}, uninterrupted: {length:.0f} s, {expected[:16]}", "", HEAD]
    print("\n".join(lines), flush=True)
    chance, same = random.Random(arguments.seed), 0
    for number in range(arguments.kills):
        out = arguments.out / "killed"
        shutil.rmtree(out, ignore_errors=True)
        moment = (number + chance.random()) / arguments.kills * length
        runs = [start(arguments, out, moment)]
        if chance.random() < AGAIN and runs[0].killed:
            runs.append(start(arguments, out, chance.random() * length))
        if runs[-1].killed:
            runs.append(start(arguments, out, None))
        equal = weights_sha256(out) == expected
        same += equal
        hit = [one for one in runs if one.killed]
        lines.append(
            f"| {number + 1} | {', '.join(f'{one.seconds:.1f}' for one in hit) or 'had finished'} "
            f"| {'; '.join(one.stage for one in hit)} | {'; '.join(one.resumed or 'anew' for one in runs[1:])} "
            f"| {'yes' if equal else 'NO'} |"
        )
        print(lines[-1], flush=True)
    lines += ["", f"{same} of {arguments.kills} the same"]
    print(lines[-1])
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
