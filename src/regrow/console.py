"""What all verbs of the command line share."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from regrow.interrupt import interruptible

if TYPE_CHECKING:
    from regrow.progress import Progress

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python files that come with the model.")]


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


@contextmanager
def going_on_later() -> Iterator[None]:
    """Within this context Ctrl-C and SIGTERM end the command with a line that says how to go on, and exit code 130."""
    try:
        with interruptible():
            yield
    except KeyboardInterrupt as stopped:
        words = [word for word in sys.argv[1:] if word != "--fresh"]
        print(f"regrow: {stopped or 'stopped'}; to go on: {shlex.join(['regrow', *words])}", file=sys.stderr)
        raise typer.Exit(130) from stopped


@contextmanager
def shown_progress() -> "Iterator[Progress]":
    """Progress on the terminal."""
    from regrow.terminal import terminal_progress

    with terminal_progress() as progress:
        yield progress
