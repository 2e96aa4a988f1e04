"""Dense against pruned: the same text, windows, prompts and clock for both."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.checkpoint.fingerprint import checkpoint_sha256
from regrow.checkpoint.offloaded import load
from regrow.checkpoint.save import needs_remote_code
from regrow.data.tokens import Windows, make_windows
from regrow.errors import InputError
from regrow.evaluation.dense import DenseFigures
from regrow.evaluation.generate import complete
from regrow.evaluation.machine import machine
from regrow.evaluation.memory import Memory, measure_memory
from regrow.evaluation.perplexity import perplexity, window_losses
from regrow.evaluation.size import measure_size
from regrow.evaluation.speed import Speed, measure_speed, ratios
from regrow.evaluation.tasks import run_tasks, task_fingerprint
from regrow.planning.plan import Plan
from regrow.processes import ALONE, Processes
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.structure.gates import Gates
from regrow.structure.groups import RESIDUAL, Groups

PROMPT_TOKENS = 16
EVAL_BATCH = 8


def held_out_nll(model: PreTrainedModel, windows: Windows, batch_size: int, processes: Processes = ALONE) -> float:
    """Mean NLL per scored token, nats; not finite if the model is broken (the caller decides what that means).

    Args:
        processes: those that share the windows.
    """
    rows = processes.rows(len(windows))
    scored_NT = None if windows.scored_NT is None else windows.scored_NT[rows]
    losses, own_NT = 0.0, windows.ids_NT[rows]
    with processes.uneven():
        if len(own_NT):
            losses = float(window_losses(model, own_NT, batch_size, None, scored_NT).sum())
    return processes.sum([losses])[0] / windows.tokens


def protocol_windows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, source: str, recipe: Recipe
) -> list[Windows]:
    """The text to evaluate, cut as each of the recipe's protocols says."""
    wanted = recipe.evaluation
    return [
        make_windows(documents, tokenizer, length, bos=wanted.bos, source=source).first(wanted.max_windows)
        for length in wanted.windows
    ]


def measure_perplexities(model: PreTrainedModel, protocols: Sequence[Windows], progress: Progress) -> dict[str, Any]:
    """Perplexity by protocol name (`window-256`), with what is needed to compare it with others'."""
    found = {}
    for windows in protocols:
        progress.stage(f"perplexity, window {windows.length}", len(windows))
        measured = perplexity(model, windows.ids_NT, EVAL_BATCH, progress.advance)
        found[f"window-{windows.length}"] = {
            **asdict(measured),
            "bos": windows.bos,
            "source": windows.source,
            "tokens_sha256": windows.sha256,
        }
    return found


def plan_as_gates(model: PreTrainedModel, groups: Groups, plan: Plan) -> Gates:
    """The gates that make a whole model, of these groups, compute what it would after the plan's cut."""
    gone = [layer for layer in groups.layers if layer.number in plan.removed_layers]
    gates = Gates(model, groups.groups, gone, groups.residual if plan.narrows else None)
    for layer in gone:
        gates.set(layer.unit, torch.zeros(1))
    for group in groups:
        if group.layer in plan.removed_layers:
            continue
        gates.keep(group.name, plan.groups[group.name].keep)
    if plan.narrows and plan.residual is not None:
        gates.keep(RESIDUAL, plan.residual.keep)
    return gates


def compare(
    dense_name: str,
    pruned_name: str,
    groups: Groups,
    plan: Plan,
    documents: Sequence[str],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    device: torch.device,
    progress: Progress,
    dense_file: Path | None = None,
) -> dict[str, Any]:
    """Perplexity, size, speed, memory and completions of the dense and the pruned checkpoint.

    Perplexity is also measured of the plan alone: the dense weights with the removed units gated off, without
    any recovery.

    Args:
        groups: of the dense model.
        dense_file: where perplexity and tasks of the dense model are kept for others who measure them alike.
    """
    wanted = recipe.evaluation
    protocols = protocol_windows(documents, tokenizer, source, recipe)
    prompts = wanted.prompts or [start_of(text, tokenizer) for text in documents[: wanted.completions]]
    folders = {"dense": (dense_name, False), "pruned": (pruned_name, needs_remote_code(Path(pruned_name)))}
    found: dict[str, dict[str, Any]] = {"perplexity": {}, "size": {}, "tasks": {}}
    completions: dict[str, list[str]] = {}
    shared = DenseFigures(dense_file, {"model": checkpoint_sha256(local_folder(dense_name)), **machine(device)})
    own = DenseFigures(None, {})
    for name, (checkpoint, own_code) in folders.items():  # one at a time: together they may be too large
        model = _load_or_offload(checkpoint, device, recipe, own_code, progress)
        for kind in ("dense", "cut") if name == "dense" else ("pruned",):
            with plan_as_gates(model, groups, plan) if kind == "cut" else nullcontext():
                found["perplexity"][kind] = (shared if kind == "dense" else own).once(
                    "perplexity",
                    [(windows.length, windows.bos, windows.source, windows.sha256) for windows in protocols],
                    partial(measure_perplexities, model, protocols, progress),
                )
                completions[kind] = [complete(model, tokenizer, prompt) for prompt in prompts]
        found["size"][name] = asdict(measure_size(model))
        if wanted.tasks:
            found["tasks"][name] = (shared if name == "dense" else own).once(
                "tasks",
                [version("lm_eval"), wanted.task_limit, *map(task_fingerprint, wanted.tasks)],
                partial(_task_scores, model, tokenizer, recipe, progress),
            )
        del model
    results: dict[str, Any] = {part: each for part, each in found.items() if each}
    results["tokenizer"] = {"class": type(tokenizer).__name__, "vocabulary": len(tokenizer)}
    results["completions"] = [
        {"prompt": prompt, **{kind: texts[number] for kind, texts in completions.items()}}
        for number, prompt in enumerate(prompts)
    ]
    if wanted.speed and (speed := _speeds(folders, device, recipe, progress)):
        results["speed"] = {name: [asdict(one) for one in each] for name, each in speed.items()}
        results["speedup"] = [asdict(one) for one in ratios(speed["dense"], speed["pruned"])]
    if wanted.memory and (memory := _memories(folders, device, progress)):
        results["memory"] = {name: asdict(each) for name, each in memory.items()}
    return results


def _task_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, progress: Progress
) -> dict[str, Any]:
    progress.stage("tasks")
    scores = run_tasks(model, tokenizer, recipe.evaluation.tasks, limit=recipe.evaluation.task_limit)
    return {task: asdict(score) for task, score in scores.items()}


def _load_or_offload(
    name: str, device: torch.device, recipe: Recipe, own_code: bool, progress: Progress
) -> PreTrainedModel:
    """A checkpoint as it is, however much smaller what was trained of it (a quantised base, say) may have been."""
    offload = recipe.training.offload_alone
    try:
        return load(name, device, offload=offload, trust_remote_code=own_code)
    except torch.OutOfMemoryError:
        progress.say(f"{name} does not fit {device}: evaluated layer by layer from its files")
    torch.cuda.empty_cache()  # not before: the exception held on to what there was
    return load(name, device, offload="disk", trust_remote_code=own_code)


def _speeds(
    folders: Mapping[str, tuple[str, bool]], device: torch.device, recipe: Recipe, progress: Progress
) -> dict[str, tuple[Speed, ...]]:
    """Of all models in turns, or one after another where they do not fit at once; of none if one does not fit."""
    offload, batches = recipe.training.offload_alone, recipe.evaluation.speed_batches
    for together in (list(folders),), tuple([name] for name in folders):
        progress.stage("speed")
        speeds: dict[str, tuple[Speed, ...]] = {}
        try:
            for names in together:
                models = {
                    name: load(folders[name][0], device, offload=offload, trust_remote_code=folders[name][1])
                    for name in names
                }
                speeds |= measure_speed(models, batches=batches)
                models = {}
            return speeds
        except torch.OutOfMemoryError:
            models = {}
        torch.cuda.empty_cache()  # not before: the exception held on to what there was
    progress.say(f"speed is not measured: the models do not fit {device}")
    return {}


def _memories(folders: Mapping[str, tuple[str, bool]], device: torch.device, progress: Progress) -> dict[str, Memory]:
    """Of all models, each in a process of its own; of none if one cannot be served there."""
    progress.stage("memory")
    try:
        return {
            name: measure_memory(local_folder(checkpoint), device, trust_remote_code=own_code)
            for name, (checkpoint, own_code) in folders.items()
        }
    except InputError as error:
        progress.say(f"peak memory is not measured: {error}")
    return {}


def local_folder(name: str) -> Path:
    """Where a model's files lie on this machine; they have been loaded before."""
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name, local_files_only=True))


def start_of(document: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first tokens of a document, as text to complete."""
    ids = tokenizer(document, add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
    return str(tokenizer.decode(ids))
