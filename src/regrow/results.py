"""What a finished run is told by: `results.json`, and what Python gets."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regrow.checkpoint.files import parse_json
from regrow.planning.plan import Plan
from regrow.processes import Processes
from regrow.recipe import Recipe
from regrow.reuse import read_plan


@dataclass(frozen=True)
class Result:
    """A finished run."""

    folder: Path
    plan: Plan
    results: dict[str, Any]
    """What `results.json` holds."""

    @property
    def model(self) -> Path:
        """The checkpoint's folder."""
        return self.folder / "model"

    @classmethod
    def read(cls, folder: Path) -> "Result":
        """That of a run that has been finished in a folder."""
        file = folder / "results.json"
        text = file.read_text(encoding="utf-8", errors="replace")
        results = parse_json(text, f"{file}: --fresh does the run again")
        return cls(folder, read_plan(folder / "plan.json"), results)


def everywhere(result: Result | None, folder: Path, processes: Processes) -> Result:
    """The main process' result, in all processes: for the others this is where they wait for it."""
    if processes.count == 1 and result is not None:
        return result
    found = None if result is None else {"plan": result.plan.model_dump(mode="json"), "results": result.results}
    told = processes.same(found)
    assert told is not None
    return result or Result(folder, Plan.model_validate(told["plan"]), told["results"])


def tell_results(
    model: str,
    recipe: Recipe,
    plan: Plan,
    *,
    measured: Mapping[str, Any],
    training: Mapping[str, Any],
    verification: Mapping[str, Any],
    seconds: Mapping[str, float],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """The tree of `results.json`; own text and targets have branches of their own.

    Args:
        measured: dense, cut and recovered, compared.
        seconds: by stage; parts of training (score, plan, search, compensate, cut, validate, …) are not in its own.
    """
    return {
        "regrow": version("regrow"),
        "model": model,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "sparsity": {"requested": recipe.pruning.sparsity, "basis": recipe.pruning.basis} | plan.sparsity.model_dump(),
        "widths": {name: len(group.keep) for name, group in (plan.parts if plan.narrows else plan.groups).items()},
        **measured,
        "training": training,
        "verification": verification,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 3)},
        "machine": machine,
    }
