"""Checkpoints as they are: the verbs `evaluate`, `bench` and `analyze`, and what `inspect` draws (floor 4)."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.analysis.stage import analyse, conditions_of
from regrow.checkpoint.files import storage_errors, write_json, write_text
from regrow.checkpoint.load import (
    check_length,
    check_unquantised,
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
)
from regrow.checkpoint.lock import alone_in
from regrow.checkpoint.offloaded import load
from regrow.criteria.registry import find_criterion
from regrow.data.source import load_documents, split_documents
from regrow.data.tokens import Windows, batches, make_windows
from regrow.errors import InputError
from regrow.evaluation.compare import local_folder, measure_perplexities
from regrow.evaluation.memory import measure_memory
from regrow.evaluation.size import measure_size
from regrow.evaluation.speed import measure_speed, ratios
from regrow.given import gathered, listed, numbered
from regrow.planning.sensitivity import Conditions, Sensitivity
from regrow.progress import Progress, Silent
from regrow.recipe import Recipe, load_recipe
from regrow.recovery.learner import attach
from regrow.recovery.quantised_base import check_criterion
from regrow.report.graph import draw_graph
from regrow.report.picture import check_picture_name, to_svg, write_picture
from regrow.report.sensitivity import draw_sensitivity
from regrow.settings import Bos, Lora
from regrow.structure.finding import find_groups
from regrow.structure.graph import layer_graph
from regrow.structure.groups import Groups

SENSITIVITY = "sensitivity.json"


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    windows: int | Sequence[int] = (256,),
    bos: Bos = "document",
    text_field: str = "text",
    max_windows: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of a checkpoint on a text, by window length, and the checkpoint's size.

    Args:
        model: a folder, or a repository on the hub.
        data: text; see `regrow.data.source.load_documents`.
        bos: where the tokenizer's BOS goes; `once` with windows of 128 or 2048 is the literature's protocol.

    Raises:
        InputError: if something given cannot work.
    """
    model, data, lengths = str(model), str(data), numbered(windows)
    _check_protocols(lengths, bos, max_windows)
    for length in lengths:
        check_length(load_config(model, trust_remote_code), length)
    tokenizer = load_tokenizer(model, trust_remote_code)
    documents = load_documents(data, text_field, split="test")
    protocols = [
        make_windows(documents, tokenizer, length, bos=bos, source=data).first(max_windows) for length in lengths
    ]
    loaded = load_model(model, pick_device(device), trust_remote_code=trust_remote_code)
    check_vocabulary(loaded, tokenizer, model)
    return {
        "model": model,
        "perplexity": measure_perplexities(loaded, protocols, progress or Silent()),
        "tokenizer": {"class": type(tokenizer).__name__, "vocabulary": len(tokenizer)},
        "size": asdict(measure_size(loaded)),
    }


def _check_protocols(windows: Sequence[int], bos: str, max_windows: int | None) -> None:
    """Refuse to measure what would be no perplexity."""
    if min(windows, default=0) < 2:
        raise InputError(f"--window {min(windows, default='')}: a window needs at least 2 tokens")
    if bos not in get_args(Bos):
        raise InputError(f"--bos {bos!r}: choose document, once or none")
    if max_windows is not None and max_windows < 1:
        raise InputError(f"--max-windows {max_windows}: evaluate at least one")


def bench(
    models: str | Path | Sequence[str | Path],
    *,
    batches: int | Sequence[int] = (1, 4),
    prompt: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    threads: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Size, speed and peak memory of checkpoints, measured in turns; ratios are to the first one.

    Raises:
        InputError: if a model cannot be loaded or is named twice, or there is nothing to measure.
    """
    models, prompts = listed(models), numbered(batches)
    if len(set(models)) != len(models):
        raise InputError("bench: the same model is named twice; ratios to itself say nothing")
    counts = {
        "models": len(models),
        "batch": min(prompts, default=0),
        "prompt": prompt,
        "new-tokens": new_tokens,
    }
    for name, count in {**counts, "repeats": repeats}.items():
        if count < 1:
            raise InputError(f"bench: {name} = {count}; give at least 1")
    progress = progress or Silent()
    if threads:
        torch.set_num_threads(threads)
    where = pick_device(device)
    progress.stage("load models")
    loaded = {name: load_model(name, where, trust_remote_code=trust_remote_code) for name in models}
    sizes = {name: asdict(measure_size(model)) for name, model in loaded.items()}
    progress.stage("speed")
    speed = measure_speed(loaded, batches=prompts, prompt=prompt, new_tokens=new_tokens, repeats=repeats)
    del loaded
    progress.stage("memory", len(models))
    memory = {}
    for name in models:
        memory[name] = asdict(measure_memory(local_folder(name), where, trust_remote_code=trust_remote_code))
        progress.advance()
    first = models[0]
    return {
        "size": sizes,
        "speed": {name: [asdict(one) for one in each] for name, each in speed.items()},
        "speedup": {name: [asdict(one) for one in ratios(speed[first], speed[name])] for name in models[1:]},
        "memory": memory,
    }


def analyze(
    model: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    shares: Sequence[float] | None = None,
    windows: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """How sensitive each group of a checkpoint is: what pruning it alone does to the loss on held-out text.

    With `out`, `sensitivity.json` and `sensitivity.svg` are left there, and an analysis that lies there already is
    not made again.

    Args:
        model: a folder, or a repository on the hub.
        data: text to score and measure on; see `regrow.data.source.load_documents`.
        shares: of each group's units, to remove in turn; by default the recipe's.
        windows: of held-out text.
        overrides: `key.path` -> value of a recipe's settings.

    Raises:
        InputError: if something given cannot work, or another process works in `out`.
    """
    given = {"data.source": data, "analysis.shares": shares and list(shares), "analysis.windows": windows}
    recipe = load_recipe("regrow", gathered(given, overrides))
    find_criterion(recipe.analysis.criterion).check_widths("analysis.criterion")
    check_criterion("analysis.criterion", recipe.analysis.criterion, recipe.training.quantization)
    if recipe.training.offloaded:
        if recipe.training.offload == "shards":
            raise InputError(
                "analyze works in one process, among which training.offload=shards cannot part the weights: use disk"
            )
        check_criterion("analysis.criterion", recipe.analysis.criterion, recipe.training.offload, "offload")
        recipe = recipe.override({"training.gradient_checkpointing": True})
    folder, progress = Path(out) if out is not None else None, progress or Silent()
    if folder is not None and folder.is_file():
        raise InputError(f"{folder} is a file; give a folder for the results")
    with storage_errors(), nullcontext() if folder is None else alone_in(folder):
        return _analyze(str(model), str(data), folder, recipe, progress)


def _analyze(model: str, data: str, folder: Path | None, recipe: Recipe, progress: Progress) -> Sensitivity:
    check_length(load_config(model), recipe.data.sequence_length)
    check_unquantised(model)
    tokenizer = load_tokenizer(model)
    progress.stage("read text")
    held_out, calibration = _analysis_text(data, tokenizer, recipe)
    progress.stage("load model")
    torch.manual_seed(recipe.seed)
    training = recipe.training
    loaded = load(model, pick_device(recipe.device), offload=training.offload, quantization=training.quantization)
    check_vocabulary(loaded, tokenizer, model)
    conditions = conditions_of(local_folder(model), loaded.dtype, recipe, held_out, calibration)
    if folder is not None and (known := _stored(folder / SENSITIVITY, conditions)) is not None:
        progress.say(f"{folder / SENSITIVITY} holds this analysis already; not measured again")
        _leave(folder, known, recipe)
        return known
    whole = find_groups(loaded)
    criterion, adapted = find_criterion(recipe.analysis.criterion), bool(whole.expert_ranks(recipe.lora))
    criterion.check_experts(whole, recipe.pruning.kinds, adapted)
    attach(loaded, whole, recipe.lora)
    scored_on = batches(calibration, training.batch_size, recipe.seed + 1)
    found = analyse(loaded, find_groups(loaded), recipe, held_out, scored_on, conditions, progress)
    if folder is not None:
        write_json(folder / SENSITIVITY, found.to_json())
        _leave(folder, found, recipe)
    return found


def _leave(folder: Path, found: Sensitivity, recipe: Recipe) -> None:
    """The picture, also of an analysis that is there: what is protected may be another share now."""
    write_text(folder / "sensitivity.svg", to_svg(draw_sensitivity(found, found.protected(recipe.analysis.protect))))


def _analysis_text(data: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[Windows, Windows]:
    """Windows to measure on, and to score on."""
    wanted, length, bos = recipe.data, recipe.data.sequence_length, recipe.data.bos
    use = (recipe.analysis.calibration_batches * recipe.training.batch_size + 1) * length
    documents = load_documents(data, wanted.text_field)
    held_out, rest = split_documents(documents, [wanted.held_out], recipe.seed)
    return (
        make_windows(held_out, tokenizer, length, bos=bos, source=f"{data} (held out)").first(recipe.analysis.windows),
        make_windows(rest, tokenizer, length, bos=bos, source=data, max_tokens=wanted.max_tokens or use),
    )


def _stored(file: Path, conditions: Conditions) -> Sensitivity | None:
    """What an earlier analysis left, if it is the one wanted."""
    if not file.is_file():
        return None
    try:
        found = Sensitivity.parse(file.read_text(encoding="utf-8", errors="replace"))
    except InputError:
        return None
    return found if found.conditions == conditions else None


def draw_layer(model: PreTrainedModel, groups: Groups, layer: int, path: Path) -> None:
    """Draw one decoder layer's dependency graph as it is once LoRA is attached, which this does.

    Args:
        model: on any device, the meta device included; without LoRA.
        groups: of the model.
        path: an .svg or .html file.

    Raises:
        InputError: if there is no such layer, or the file cannot be written or is of another kind.
    """
    check_picture_name(path)
    attach(model, groups, Lora())
    graph = layer_graph(model, find_groups(model), layer)
    with storage_errors():
        write_picture(path, draw_graph(graph), f"{graph.model}, decoder layer {layer}")
