"""Settle who teaches, and begin."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from regrow.checkpoint.journal import Forgetful
from regrow.checkpoint.originals import Originals
from regrow.checkpoint.state import State
from regrow.criteria.registry import find_criterion
from regrow.data.tokens import Windows
from regrow.errors import InputError
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.recovery.cached import CachedTeacher, write_cache
from regrow.recovery.learner import Learner
from regrow.recovery.objective import Objective
from regrow.recovery.teacher import AutoTeacher, Kept, ModelTeacher, SelfTeacher, Teacher, Wish
from regrow.settings import Distillation
from regrow.structure.gates import Gates
from regrow.structure.quantise import check_bitsandbytes
from regrow.structure.trace import decoder_layers


def check_distillation(recipe: Recipe) -> None:
    """Refuse settings that contradict one another.

    Raises:
        InputError: if they do.
    """
    settings = recipe.distillation
    if settings.hidden_weight > 0 and settings.teacher == "cached":
        raise InputError(
            "distillation.hidden_weight: a cached teacher has no hidden states; choose another teacher, or 0"
        )
    refit = recipe.compensation
    writes = refit.method == "bias" or (refit.method == "least-squares" and refit.carrier == "base")
    if settings.on and settings.teacher == "self" and writes:
        raise InputError(
            "distillation.teacher=self learns from the model's own weights, which compensation would change: set "
            "compensation.method=none (or least-squares with compensation.carrier=adapter), or another teacher"
        )
    if settings.on and settings.teacher_dtype in ("int8", "nf4"):
        check_bitsandbytes("distillation.teacher_dtype", settings.teacher_dtype)
    pruning = recipe.pruning
    unscored = pruning.schedule != "one-shot" and pruning.calibration_batches == 0
    if settings.weight == 1 and unscored and find_criterion(pruning.criterion).needs - {"mask"}:
        raise InputError(
            "distillation.weight=1: a whole model does not differ from its teacher, so no step before the first cut "
            "would score anything; set pruning.calibration_batches, or a lower weight"
        )


def distil(
    settings: Distillation,
    learner: Learner,
    gates: Gates,
    text: Windows,
    upcoming: Callable[[], Tensor],
    folder: Path,
    progress: Progress,
    journal: Forgetful = Forgetful(),  # noqa: B008  (it holds nothing)
    originals: Originals | None = None,
) -> Objective:
    """The objective of a learner whose model is still whole (scored, perhaps, but neither cut nor trained).

    Args:
        gates: of the model.
        text: what is trained on.
        upcoming: numbers of the windows of it that may be drawn, ascending.
        folder: where a cached teacher writes.
        journal: knows whether it has written.
        originals: with which weights a cached teacher answers, if not with the model's own.
    """
    layers = decoder_layers(learner.model)[0] if settings.hidden_weight > 0 else None
    wish = Wish(settings.temperature, layers)
    kept: Kept | None
    match settings.teacher_dtype:
        case "auto":
            kept = None
        case "int8" | "nf4":
            kept = settings.teacher_dtype
        case _:
            kept = getattr(torch, settings.teacher_dtype)
    teacher: Teacher
    match settings.teacher:
        case "self":
            teacher = SelfTeacher(learner.model, gates, wish)
        case "model":
            teacher = ModelTeacher(learner.model, wish, kept)
        case "auto":
            teacher = AutoTeacher(learner.model, gates, wish, kept)
        case "cached":
            processes = learner.processes
            if journal.read("teach") is None:
                whole = SelfTeacher(learner.model, gates, wish)
                with originals.borrowed(learner.model, gates) if originals else nullcontext():
                    _write(folder, settings, learner, whole, text, upcoming(), progress)
                journal.write("teach", State(), files=sorted(folder.iterdir()) if processes.is_main else [])
            if not folder.is_dir():
                raise InputError(f"process {processes.rank} does not see {folder}: put --out on a disk that all share")
            teacher = CachedTeacher(folder, processes.is_main)
    return Objective(settings, teacher, layers)


def _write(
    folder: Path,
    settings: Distillation,
    learner: Learner,
    whole: SelfTeacher,
    text: Windows,
    numbers_N: Tensor,
    progress: Progress,
) -> None:
    def logits(ids_BT: Tensor) -> Tensor:
        with learner.autocast:
            return whole.logits(ids_BT.to(learner.model.device))

    progress.stage("ask the teacher", len(numbers_N))
    write_cache(
        folder, logits, text, numbers_N, batch_size=learner.training.batch_size, top_k=settings.top_k,
        temperature=settings.temperature, on_batch=progress.advance, processes=learner.processes,
    )  # fmt: skip
