"""`regrow.prune`: settle the recipe, then walk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.checkpoint.files import storage_errors
from regrow.progress import Progress, Silent
from regrow.recipe import Recipe, load_recipe
from regrow.walk import Result, Walk


def prune(
    model: str,
    out: str | Path,
    recipe: str | Recipe = "regrow",
    *,
    data: str | None = None,
    instructions: str | None = None,
    eval_data: str | None = None,
    sparsity: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    criterion: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Prune a causal LM, regrow its skill, and leave a plain checkpoint and an honest report in `out`.

    Args:
        model: a folder, or a repository on the hub.
        out: a new or empty folder, or that of an earlier run, which is then done afresh.
        recipe: a shipped recipe's name, a YAML file, or a recipe.
        data: text to score and train on; see `regrow.data.source.load_documents`.
        instructions: records to train on after the text; see `regrow.data.instructions`.
        eval_data: text to evaluate on; by default documents held out of `data`.
        overrides: `key.path` -> value, applied to the recipe last.

    Raises:
        InputError: if something given cannot work; nothing half-written is left.
    """
    chosen = _settle_recipe(recipe, data, instructions, eval_data, sparsity, steps, seed, criterion, overrides)
    with storage_errors():
        return Walk(model, Path(out), chosen, progress or Silent()).walk()


def _settle_recipe(
    recipe: str | Recipe,
    data: str | None,
    instructions: str | None,
    eval_data: str | None,
    sparsity: float | None,
    steps: int | None,
    seed: int | None,
    criterion: str | None,
    overrides: Mapping[str, Any] | None,
) -> Recipe:
    given = {
        "data.source": data,
        "data.instructions": instructions,
        "data.eval_source": eval_data,
        "pruning.sparsity": sparsity,
        "training.steps": steps,
        "seed": seed,
        "pruning.criterion": criterion,
    }
    settings = {key: value for key, value in given.items() if value is not None} | dict(overrides or {})
    if isinstance(recipe, Recipe):
        return recipe.override(settings)
    return load_recipe(recipe, settings)
