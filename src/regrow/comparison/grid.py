"""The grid of a comparison: contenders × sparsities × seeds; each cell a normal run in a process of its own.

A comparison's folder holds `cells/NAME/` (the run), `cells/NAME.json` (what was asked of it), `cells/NAME.cost.json`
(there once it is finished) and `cells/NAME.log`. A cell that is finished is not run again.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.checkpoint.files import parse_json, write_json
from regrow.errors import InputError
from regrow.preflight import check_settings
from regrow.progress import Progress
from regrow.recipe import Recipe, load_recipe, parse_assignments
from regrow.resume import describe_request, told_difference


@dataclass(frozen=True)
class Contender:
    """What takes part: a recipe, perhaps with another criterion or settings of its own."""

    label: str
    """`loraprune`, `loraprune+magnitude`, `regrow@compensation.method=none@search.evaluations=0`."""
    recipe: str
    settings: Mapping[str, Any]

    @classmethod
    def parse(cls, label: str) -> "Contender":
        """Read `RECIPE[+CRITERION][@key.path=value…]`.

        Raises:
            InputError: if a setting is not written as such.
        """
        name, *own = label.strip().split("@")
        recipe, _, criterion = name.partition("+")
        settings = {"pruning.criterion": criterion} if criterion else {}
        return cls(label.strip(), recipe, settings | parse_assignments(own))


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    contender: str
    sparsity: float
    seed: int
    recipe: Recipe
    folder: Path
    """Of the run."""

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name

    def beside(self, suffix: str) -> Path:
        """A file beside the run's folder: `.json`, `.cost.json`, `.log`."""
        return self.folder.with_name(self.name + suffix)

    def request(self, model: str, threads: int | None) -> dict[str, Any]:
        """All that its process needs, and by `asked` and `threads` what decides about what comes out."""
        recipe = self.recipe.model_dump(mode="json")
        return {"model": model, "threads": threads, "recipe": recipe, "asked": describe_request(model, self.recipe)}

    def check_same(self, model: str, threads: int | None) -> None:
        """Refuse to take what is there of the run for what another request asks; how a path is spelled is no matter.

        Raises:
            InputError: if it is of another request; the message says in what.
        """
        file, way_out = self.beside(".json"), "choose another --out"
        if not file.is_file():
            return
        before = parse_json(file.read_text(encoding="utf-8", errors="replace"), f"{file}: {way_out}")
        now = self.request(model, threads)
        told = told_difference(*({"threads": one["threads"], **one["asked"]} for one in (before, now)))
        if told:
            raise InputError(f"{self.folder} holds a run {told}; {way_out}")

    @property
    def finished(self) -> bool:
        """Whether its results are there."""
        return self.beside(".cost.json").is_file() and (self.folder / "results.json").is_file()

    def results(self) -> dict[str, Any]:
        """What the run's `results.json` holds, its history and its cost."""
        found: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        found["history"] = json.loads((self.folder / "history.json").read_text())
        found["cost"] = json.loads(self.beside(".cost.json").read_text())
        return found


def lay_out(
    contenders: Sequence[str],
    sparsities: Sequence[float],
    seeds: int,
    settings: Mapping[str, Any],
    out: Path,
) -> list[Cell]:
    """The cells of a grid, in the order in which they run: all contenders of a sparsity and seed, then the next.

    Args:
        settings: `key.path` -> value, for all; a contender's own come last.

    Raises:
        InputError: if a contender or a sparsity is named twice, a seed or sparsity is a setting of all or stands
            against several, or a recipe or setting is wrong.
    """
    taking_part = [Contender.parse(label) for label in contenders]
    if len({each.label for each in taking_part}) < len(taking_part):
        raise InputError("a contender is named twice; name each once")
    if len({f"{sparsity:g}" for sparsity in sparsities}) < len(sparsities):
        raise InputError("a sparsity is named twice; name each once")
    for key, option in (("seed", "--seeds"), ("pruning.sparsity", "--sparsity")):
        if key in settings:
            raise InputError(
                f"{key} is what a comparison goes through; give {option}, or RECIPE@{key}=… for one recipe"
            )
    for each in taking_part:
        for key, option, count in (("seed", "--seeds", seeds), ("pruning.sparsity", "--sparsity", len(sparsities))):
            if key in each.settings and count > 1:
                raise InputError(f"{each.label}: its {key} would be the same in {count} rounds; give {option} one only")
    cells = []
    for sparsity in sparsities:
        for seed in range(seeds):
            for each in taking_part:
                given = {**settings, "pruning.sparsity": sparsity, "seed": seed, **each.settings}
                recipe = load_recipe(each.recipe, given)
                check_settings(recipe)
                name = f"{each.label.replace('/', '_')}-{sparsity:g}-{seed}"
                cells.append(Cell(each.label, sparsity, seed, recipe, out / "cells" / name))
    return cells


def run_cells(cells: Sequence[Cell], model: str, threads: int | None, progress: Progress) -> dict[str, str]:
    """Run what is not finished.

    Returns:
        By cell's name, why it failed; the others go on all the same.

    Raises:
        InputError: if a cell's folder holds a run of another request.
    """
    for cell in cells:
        cell.check_same(model, threads)
    waiting = [cell for cell in cells if not cell.finished]
    if len(waiting) < len(cells):
        progress.say(f"{len(cells) - len(waiting)} of {len(cells)} runs are there already")
    progress.stage("runs", len(waiting))
    failed = {}
    for cell in waiting:
        progress.advance(0, cell.name)
        if reason := _run(cell, model, threads):
            failed[cell.name] = reason
            progress.say(f"{cell.name} failed: {reason}")
        progress.advance(1, cell.name)
    return failed


def _run(cell: Cell, model: str, threads: int | None) -> str:
    """Run a cell; why it failed, or nothing. If this is interrupted the cell stops, too, its state noted."""
    write_json(cell.beside(".json"), cell.request(model, threads))
    command = [sys.executable, "-m", "regrow.comparison.cell", str(cell.folder)]
    with (
        cell.beside(".log").open("w", encoding="utf-8") as log,
        # In a session of its own, where Ctrl-C does not reach it: asked twice to stop it would not wait for its step.
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        assert process.stdin is not None
        try:
            code = process.wait()
        finally:
            process.stdin.close()
            process.wait()
    if not code:
        return ""
    lines = cell.beside(".log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = lines[-1].removeprefix("regrow: ") if lines else f"ended by signal {-code}"
    return f"{said} ({cell.beside('.log')})"
