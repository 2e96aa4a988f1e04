"""A finished run as its files tell it: all that reports are made of, so that they can be made again."""

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from regrow.checkpoint.files import RUN_FILE, parse_json
from regrow.errors import InputError
from regrow.planning.plan import Plan
from regrow.planning.sensitivity import Sensitivity
from regrow.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Facts:
    """What a run has left."""

    results: dict[str, Any]
    history: dict[str, Any]
    """As `recovery.train.History`."""
    plan: Plan
    scores: dict[str, NDArray[np.float64]]
    """One per original unit (and layer), by group; as they were when the last plan was made."""
    recipe: Recipe
    recipe_sha256: str
    """Of `recipe.yaml`."""
    sensitivity: Sensitivity | None
    command: str
    """What makes the run again: a line for the shell, or for Python."""


def check_finished(folder: Path) -> None:
    """See whether a folder holds what a report is made of, without reading it.

    Raises:
        InputError: if it holds no finished run.
    """
    if not (folder / RUN_FILE).is_file() or not (folder / "results.json").is_file():
        raise InputError(f"{folder} holds no finished run; give the folder of a run of regrow prune")


def read_facts(folder: Path) -> Facts:
    """A run's facts from its files.

    Raises:
        InputError: if the folder holds no finished run, or a file in it is damaged.
    """
    check_finished(folder)
    file = folder / "recipe.yaml"
    recipe = load_recipe(str(file))
    analysis = Sensitivity.parse(_read(folder / "sensitivity.json")) if recipe.analysis.enabled else None
    return Facts(
        results=_read_json(folder / "results.json"),
        history=_read_json(folder / "history.json"),
        plan=Plan.parse(_read(folder / "plan.json")),
        scores=_read_scores(folder / "scores.safetensors"),
        recipe=recipe,
        recipe_sha256=hashlib.sha256(_read(file).encode()).hexdigest(),
        sensitivity=analysis,
        command=_command(_read_json(folder / RUN_FILE)),
    )


def _command(run: dict[str, Any]) -> str:
    if run.get("argv"):
        return shlex.join(["regrow", *run["argv"]])
    return f"regrow.prune({run['model']!r}, 'out', 'recipe.yaml')"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; the report needs what the run left there") from error


def _read_scores(file: Path) -> dict[str, NDArray[np.float64]]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read ({error}); the report needs it as the run left it") from error


def _read_json(file: Path) -> Any:
    return parse_json(_read(file), f"{file}: the report needs it as the run left it")
