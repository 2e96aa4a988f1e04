"""Training's figures sent to TensorBoard, Weights & Biases or trackio, by way of accelerate's trackers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from regrow.errors import InputError
from regrow.recipe import Recipe

PROJECT = "regrow"
FOLDER = "tracker"
"""Within the run's, for a tracker that writes files."""
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}

Track = Callable[[Mapping[str, float], int], None]
"""Takes figures by name, and the step that they belong to."""


def ignore(figures: Mapping[str, float], step: int) -> None:
    """Nobody is listening."""


def check_tracker(name: str) -> None:
    """See whether a tracker's package is there.

    Raises:
        InputError: if not.
    """
    packages = PACKAGES.get(name, ())
    if packages and not any(map(find_spec, packages)):
        raise InputError(
            f"output.tracker={name} needs {' or '.join(packages)}: pip install {packages[-1]}, or set "
            "output.tracker=none"
        )


@contextmanager
def tracking(recipe: Recipe, folder: Path, is_main: bool = True) -> Iterator[Track]:
    """Where a training's figures go, by the recipe's `output.tracker`.

    Args:
        folder: the training's; its name is the name of what is tracked.
        is_main: of several processes one tells.

    Raises:
        InputError: if the tracker cannot start, for example for want of a login.
    """
    if recipe.output.tracker == "none" or not is_main:
        yield ignore
        return
    PartialState()  # accelerate's trackers log, and its logging wants to know which process it is in
    tracker = _tracker(recipe.output.tracker, folder)
    try:
        tracker.start()
        tracker.store_init_configuration(flat(recipe))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"output.tracker={recipe.output.tracker} cannot start: {reason}") from error
    try:
        yield lambda figures, step: tracker.log(dict(figures), step=step)
    finally:
        tracker.finish()


def _tracker(name: str, folder: Path) -> GeneralTracker:
    match name:
        case "tensorboard":
            return TensorBoardTracker(FOLDER, folder)
        case "wandb":
            return WandBTracker(PROJECT, name=folder.resolve().name, dir=str(folder))
        case _:
            return TrackioTracker(PROJECT, name=folder.resolve().name)


def flat(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """A recipe as `key.path` -> plain value; lists and nothing as text."""

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str | int | float | bool]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value if isinstance(value, str | int | float | bool) else str(value)

    return dict(walk(recipe.model_dump(mode="json"), ""))
