"""The demo: a small LLaMA, trained on Python's own documentation, pruned and regrown on the same."""

import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from regrow.demo.corpus import write_corpus
from regrow.progress import Progress
from regrow.results import Result
from regrow.run import prune

PROMPTS = ("Return a list of", "Raised when")


def model_folder() -> Path:
    """Where the demo's checkpoint lies in the package."""
    folder = resources.files("regrow") / "demo" / "model"
    assert isinstance(folder, Path)
    return folder


def run_demo(
    out: Path, recipe: str, sparsity: float, steps: int, progress: Progress, argv: Sequence[str] = ()
) -> Result:
    """Prune the demo's model on the documentation that every Python carries.

    Args:
        argv: as for `regrow.prune`.

    Raises:
        InputError: as `regrow.prune` does.
    """
    with tempfile.TemporaryDirectory() as scratch:
        train, held_out = write_corpus(Path(scratch))
        return prune(
            str(model_folder()),
            out,
            recipe,
            data=str(train),
            eval_data=str(held_out),
            sparsity=sparsity,
            steps=steps,
            overrides={"evaluation.max_windows": 256, "evaluation.prompts": list(PROMPTS)},
            progress=progress,
            argv=argv,
        )
