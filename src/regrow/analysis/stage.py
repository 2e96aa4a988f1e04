"""The analysis as a whole: score the units, then measure; or take what an earlier analysis found."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.analysis.sensitivity import measure_sensitivity
from regrow.checkpoint.files import sha256_of
from regrow.checkpoint.fingerprint import checkpoint_sha256
from regrow.data.tokens import Batch, Windows
from regrow.errors import InputError
from regrow.evaluation.compare import local_folder
from regrow.planning.sensitivity import Conditions, Sensitivity
from regrow.processes import ALONE, Processes
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.recovery.learner import Learner
from regrow.recovery.pruner import Pruner
from regrow.structure.groups import Groups


def conditions_of(
    folder: Path, dtype: torch.dtype, recipe: Recipe, held_out: Windows, calibration: Windows
) -> Conditions:
    """What an analysis by this recipe is made of.

    Args:
        folder: of the checkpoint.
        dtype: what the model computes in.
    """
    quantization = recipe.training.quantization
    return Conditions(
        model_sha256=checkpoint_sha256(folder),
        dtype=str(dtype).removeprefix("torch.") + ("" if quantization == "none" else f", {quantization} base"),
        tokens_sha256=held_out.sha256,
        windows=len(held_out),
        length=held_out.length,
        calibration_sha256=calibration.sha256,
        calibration_batches=recipe.analysis.calibration_batches,
        batch_size=recipe.training.batch_size,
        seed=recipe.seed,
        criterion=recipe.analysis.criterion,
        scoring_sha256=_scoring_sha256(recipe),
        shares=recipe.analysis.shares,
    )


def _scoring_sha256(recipe: Recipe) -> str:
    settings = recipe.model_dump(mode="json")
    read = {"lora": settings["lora"]}
    read |= {key: settings["pruning"][key] for key in ("kinds", "perturbations", "labels", "ema")}
    read |= {key: settings["training"][key] for key in ("accumulate", "clip", "precision")}
    file = Path(recipe.analysis.criterion.rpartition(":")[0])
    own = sha256_of(file) if file.is_file() else ""
    return hashlib.sha256(json.dumps([read, own]).encode()).hexdigest()


def known_sensitivity(recipe: Recipe, model: str, groups: Groups) -> Sensitivity | None:
    """The analysis that the recipe names, if it does; see `read_sensitivity`."""
    file = recipe.analysis.from_file
    if file is None or not recipe.analysis.enabled:
        return None
    return read_sensitivity(Path(file), local_folder(model), groups)


def read_sensitivity(path: Path, folder: Path, groups: Groups) -> Sensitivity:
    """An earlier analysis, which must be of this checkpoint; shares, text and criterion may be any.

    Raises:
        InputError: if there is none, or it is no analysis (of this version's format), or of another model.
    """
    try:
        found = Sensitivity.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"analysis.from_file {path}: cannot be read: {error}") from error
    except InputError as error:
        raise InputError(f"analysis.from_file {path}: {error}; leave it out to measure this model anew") from error
    if found.conditions.model_sha256 != checkpoint_sha256(folder) or not found.describes(groups):
        raise InputError(f"analysis.from_file {path}: was measured on another model; leave it out to measure this one")
    return found


def analyse(
    model: PreTrainedModel,
    groups: Groups,
    recipe: Recipe,
    held_out: Windows,
    calibration: Iterator[Batch],
    conditions: Conditions,
    progress: Progress,
    processes: Processes = ALONE,
) -> Sensitivity:
    """Score all units by the analysis' criterion, then measure what losing the lowest costs each group.

    Args:
        model: with fresh adapters, which compute nothing yet.
        groups: of the whole model, adapters attached.
        held_out: text to measure on.
        calibration: batches to score on.

    Raises:
        InputError: if a loss or a score is not finite.
    """
    scores = _proxy_scores(model, groups, recipe, calibration, progress, processes)
    shares = recipe.analysis.shares
    return measure_sensitivity(
        model, groups, scores, held_out, shares, progress, conditions=conditions, processes=processes
    )


def _proxy_scores(
    model: PreTrainedModel,
    groups: Groups,
    recipe: Recipe,
    calibration: Iterator[Batch],
    progress: Progress,
    processes: Processes,
) -> dict[str, Tensor]:
    """What a one-shot run would choose by, had it the analysis' criterion."""
    proxy = recipe.override(
        {
            "pruning.criterion": recipe.analysis.criterion,
            "pruning.calibration_batches": recipe.analysis.calibration_batches,
            "pruning.schedule": "one-shot",
        }
    )
    learner = Learner(model, recipe.training, calibration, processes)
    with Pruner(model, groups, proxy, learner, calibration) as pruner:
        progress.stage("score", proxy.pruning.calibration_batches)
        pruner.calibrate(progress.advance)
        return pruner.scorer.average.scores
