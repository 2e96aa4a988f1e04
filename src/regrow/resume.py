"""What a run's folder says of the run: what it was asked for, and whether that is what is asked for now.

`run.json` marks the folder and holds the request; what is done of it stands in the journal (`checkpoint/journal.py`).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regrow.checkpoint.files import RUN_FILE, check_folder, sha256_of, sweep, write_json
from regrow.checkpoint.fingerprint import checkpoint_sha256
from regrow.checkpoint.journal import Journal
from regrow.checkpoint.load import pick_device, weights_folder
from regrow.errors import InputError
from regrow.recipe import Recipe
from regrow.recovery.tracking import FOLDER as TRACKER_FOLDER

FILES_NAMED = ("source", "eval_source", "instructions", "from_file", "criterion")
"""Settings that may name a file: what is in it counts, not where it lies."""
WAY_OUT = "give a new --out, or --fresh to do it again from the start"
OF_A_RUN = ("checkpoint", "trials", "teacher", "base", "adapter", TRACKER_FOLDER)
"""Folders that a run done from the start finds empty. Its model is replaced when there is a new one."""


def describe_request(model: str, recipe: Recipe) -> dict[str, Any]:
    """`key.path` -> value of all that a run depends on. Model and files are told by hashes of what they hold."""
    settings = recipe.model_dump(mode="json", exclude={"name", "description"})
    return {
        "model": checkpoint_sha256(weights_folder(model)),
        **dict(_flat(settings, "")),
        "device": pick_device(recipe.device).type,
        "regrow": version("regrow"),
    }


def open_run(folder: Path, asked: Mapping[str, Any], fresh: bool) -> bool:
    """Look into a folder before any work is done for it, without touching it.

    Returns:
        Whether there is a run to go on with, or to find finished.

    Raises:
        InputError: if the folder cannot be a run's, or holds a run that was asked for something else.
    """
    if not check_folder(folder) or fresh:
        return False
    try:
        before = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["asked"]
        difference = next((key for key in {**asked, **before} if asked.get(key) != before.get(key)), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / RUN_FILE} is damaged or of an older regrow; {WAY_OUT}") from error
    if difference is not None:
        raise InputError(f"{folder} holds a run {_told(difference, before, asked)}; {WAY_OUT}")
    return True


def claim(folder: Path, record: Mapping[str, Any], goes_on: bool) -> None:
    """Take the folder: for a run that goes on as it is, else without what an earlier run has left.

    Args:
        record: what `run.json` is to say.
    """
    if not goes_on:
        for left_over in OF_A_RUN:
            shutil.rmtree(folder / left_over, ignore_errors=True)
    write_record(folder, record)
    sweep(folder)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `run.json`; see `Walk.record`."""
    write_json(folder / RUN_FILE, dict(record))


def where(journal: Journal, steps: int) -> str:
    """How far a run has come, in words."""
    latest = journal.latest()
    if latest is None:
        return "from the start"
    stage, step = latest
    return f"after stage {stage}" if step is None else f"at step {step} of {steps}; stage {stage}"


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Leaves of a tree by their paths; those that name a file as the hash of what it holds."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in pairs:
            yield from _flat(each, f"{path}.{key}" if path else str(key))
    else:
        yield path, _content(value) if path.rpartition(".")[2] in FILES_NAMED else value


def _content(name: str | None) -> str | None:
    if name is None:
        return None
    file, colon, function = name.rpartition(":")
    for path, rest in ((Path(name), ""), (Path(file), colon + function)):
        if str(path) != "." and path.is_file():
            return f"sha256 {sha256_of(path)}{rest}"
    return name


def _told(key: str, before: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    values = [each.get(key) for each in (before, asked)]
    if key == "model" or any(str(value).startswith("sha256 ") for value in values):
        return f"of another {key}"
    return f"with {key} = {values[0]!r}, not {values[1]!r}"
