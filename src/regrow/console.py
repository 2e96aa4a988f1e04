"""What all verbs of the command line share."""

import errno
import io
import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from regrow.errors import InputError, LostOther
from regrow.interrupt import interruptible
from regrow.launcher import rank, read_launch

if TYPE_CHECKING:
    from regrow.progress import Progress

SPIN_COUNT = "10000"
SECONDS_TO_END = 5.0
"""A launcher has by then ended the other processes of one that has failed."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python files that come with the model.")]


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let an idle OpenMP thread soon give its core away, unless the user has said how long it is to wait.

    To be called before torch is loaded. libgomp's threads look out for work some 300,000 times before they sleep, and
    if the machine is busy they do so on the core of one that has work (`benchmarks/threads.py`).
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def print_anything() -> None:
    """Let standard output show a question mark for what its encoding (a C locale's, say) has no character for."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error does so by itself
        sys.stdout.reconfigure(errors="replace")


def expand_home() -> None:
    """Read `~` in `--out=~/x` and `--set data.source=~/x`, too; shells do so only where a word begins with it."""
    home = os.path.expanduser("~")
    sys.argv[1:] = [re.sub(r"^([-\w.]+=)~(?=/|$)", lambda found: f"{found[1]}{home}", word) for word in sys.argv[1:]]


@contextmanager
def printed() -> Iterator[None]:
    """Within this context what is printed is written out.

    Raises:
        InputError: if standard output, or a file that nobody else speaks for, is on a full disk.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest would fail at exit, once more
        # Writing to an open file, as to standard output, names none; opening one does.
        raise InputError(
            f"no space left to write {error.filename or 'what is printed'}; free some and run again"
        ) from error


def quiet() -> None:
    """Keep the libraries' chatter off the screen; what matters of it comes back as an error."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-evaluation-harness has no other switch for its bars
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where it is installed, peft imports it, and it talks
    warnings.simplefilter("ignore")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def going_on_later() -> AbstractContextManager[None]:
    """Within this context Ctrl-C and SIGTERM end the command with a line that says how to go on, and exit code 130."""
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    again = shlex.join(["regrow", *words]) if read_launch().count == 1 else "launch the same again"
    return _ending(f"to go on: {again}")


def given_up() -> AbstractContextManager[None]:
    """Within this context Ctrl-C and SIGTERM end the command with a line, and exit code 130: nothing is left of it."""
    return _ending("nothing was written")


@contextmanager
def _ending(told: str) -> Iterator[None]:
    try:
        with interruptible():
            yield
    except KeyboardInterrupt as stopped:
        if rank() == 0:
            print(f"regrow: {stopped or 'stopped'}; {told}", file=sys.stderr)
        raise typer.Exit(130) from stopped


def tell(error: InputError) -> None:
    """Say in a line what is wrong. Others than the main process only if it has not just said so, and ended them all."""
    if rank() != 0 and isinstance(error, LostOther):
        return
    line = " ".join(str(error).split())  # libraries' reasons may have several lines
    if rank() == 0:
        print("regrow:", line, file=sys.stderr)
        return
    time.sleep(SECONDS_TO_END)
    print(f"regrow: process {rank()}: {line}", file=sys.stderr)


@contextmanager
def shown_progress() -> "Iterator[Progress]":
    """Progress on the terminal, of one process."""
    from regrow.progress import Silent
    from regrow.terminal import terminal_progress

    if rank() != 0:
        yield Silent()
        return
    with terminal_progress() as progress:
        yield progress
