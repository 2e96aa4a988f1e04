"""`regrow.compare`: lay out the grid, run it, leave the tables."""

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.checkpoint.files import storage_errors, write_json, write_text
from regrow.checkpoint.load import pick_device
from regrow.checkpoint.lock import alone_in
from regrow.comparison.grid import Cell, lay_out, run_cells
from regrow.comparison.page import html, markdown
from regrow.comparison.table import Row, rows_of, to_csv, to_json
from regrow.data.corpus import check_there
from regrow.errors import InputError
from regrow.evaluation.machine import machine
from regrow.given import gathered, listed
from regrow.launcher import read_launch
from regrow.preflight import check_files, check_model
from regrow.progress import Progress, Silent
from regrow.recipe import Recipe
from regrow.report.words import short_name


@dataclass(frozen=True)
class Comparison:
    """A finished grid."""

    folder: Path
    rows: list[Row]
    failed: dict[str, str]
    """By cell's name, why it has no result."""


def compare(
    model: str | Path,
    out: str | Path,
    recipes: str | Sequence[str],
    *,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    sparsities: Sequence[float] = (0.2, 0.5),
    seeds: int = 3,
    steps: int | None = None,
    tasks: str | Path | Sequence[str | Path] = (),
    threads: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run several recipes on one model, text, number of steps and evaluation, and put the results side by side.

    Leaves `comparison.md`, `.csv`, `.json` and `.html` in `out`, anew after each call; every run lies in `out/cells`.
    The same call again runs only what is missing. Perplexity and tasks of the dense model are measured once, and
    kept in `dense.json`.

    Args:
        model: a folder, or a repository on the hub.
        recipes: `RECIPE[+CRITERION][@key.path=value…]`, for example `loraprune`, `loraprune+magnitude`,
            `regrow@compensation.method=none`.
        seeds: so many seeds, from 0.
        steps: of training; by default each recipe's own, which are then not comparable.
        tasks: zero-shot tasks; see `regrow.evaluation.tasks.run_tasks`.
        threads: of the processor, for every run.
        overrides: `key.path` -> value, for all recipes.

    Raises:
        InputError: if something given cannot work, another process works in `out`, or no run succeeds.
    """
    if (count := read_launch().count) > 1:
        raise InputError(f"compare: {count} processes have been launched; start it once, it starts its runs by itself")
    model, recipes = str(model), listed(recipes)
    if seeds < 1 or not recipes or not sparsities:
        raise InputError("compare: give at least one recipe, one sparsity and one seed")
    given = {
        "data.source": data,
        "data.eval_source": eval_data,
        "training.steps": steps,
        "evaluation.tasks": listed(tasks) or None,
    }
    settings = gathered(given, overrides)
    folder, progress = Path(out), progress or Silent()
    if folder.is_file():
        raise InputError(f"{folder} is a file; give a folder for the results")
    cells = lay_out(recipes, sparsities, seeds, settings, folder)
    _check_any(model, list({cell.contender: cell.recipe for cell in cells}.values()))
    with storage_errors(), alone_in(folder):
        (folder / "cells").mkdir(exist_ok=True)
        failed = run_cells(cells, model, threads, progress)
        rows = rows_of(cells)
        if not rows:
            raise InputError(f"no run succeeded; the first: {next(iter(failed.values()))}")
        _leave(folder, rows, failed, _facts(model, cells[0], threads))
    return Comparison(folder, rows, failed)


def _check_any(model: str, contenders: Sequence[Recipe]) -> None:
    """Refuse what no contender can run with; what one alone cannot is told beside the others' results.

    Raises:
        InputError: as the first of them would.
    """
    reasons = []
    for recipe in contenders:
        try:
            check_model(model, recipe)
            check_files(model, recipe)
            check_there(recipe.data)
            return
        except InputError as error:
            reasons.append(error)
    raise reasons[0]


def _facts(model: str, cell: Cell, threads: int | None) -> dict[str, Any]:
    """What the figures hold for."""
    recipe, device = cell.recipe, pick_device(cell.recipe.device)
    return {
        "model": short_name(model),
        "text": Path(recipe.data.source).name if recipe.data.source else "written by the model itself",
        "evaluated on": Path(recipe.data.eval_source).name if recipe.data.eval_source else "documents held out of it",
        "batch": f"{recipe.training.batch_size * recipe.training.accumulate} × {recipe.data.sequence_length} tokens",
        "steps": recipe.training.steps,
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        **machine(device),
        "threads": threads or "not pinned",
    }


def _leave(folder: Path, rows: list[Row], failed: dict[str, str], facts: dict[str, Any]) -> None:
    write_text(folder / "comparison.md", markdown(rows, facts, failed))
    write_text(folder / "comparison.csv", to_csv(rows))
    write_json(folder / "comparison.json", {"facts": facts, "failed": failed, **to_json(rows)})
    write_text(folder / "comparison.html", html(rows, facts, failed))
