"""Before a run: whether its settings go together, and whether memory and files will do."""

import sys
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from regrow.checkpoint.files import amount, check_room
from regrow.checkpoint.load import (
    check_length,
    check_unquantised,
    compute_dtype,
    load_config,
    load_tokenizer,
    pick_device,
    weights_folder,
)
from regrow.checkpoint.source import Source
from regrow.checkpoint.stock import check_fewer_layers
from regrow.criteria.registry import find_criterion
from regrow.data.corpus import list_sources, writes_own_text
from regrow.errors import InputError
from regrow.evaluation.tasks import check_known, check_tasks
from regrow.launcher import HOW
from regrow.planning.memory import Sizes, estimate_memory
from regrow.planning.target import parse_target
from regrow.processes import ALONE, Processes
from regrow.recipe import Recipe
from regrow.recovery.cached import cache_bytes
from regrow.recovery.distillation import check_distillation
from regrow.recovery.quantised_base import is_streamed
from regrow.recovery.self_text import start_token, tokens_to_write
from regrow.recovery.tracking import check_tracker
from regrow.structure.groups import Groups
from regrow.text import training_tokens


def check_settings(recipe: Recipe) -> None:
    """Refuse a recipe whose parts contradict one another.

    Raises:
        InputError: naming the settings.
    """
    find_criterion(recipe.pruning.criterion).check_kinds(recipe.pruning.kinds)
    if recipe.analysis.enabled:
        find_criterion(recipe.analysis.criterion).check_widths("analysis.criterion")
    elif recipe.pruning.allocation == "curves":
        raise InputError("pruning.allocation=curves needs measured curves: set analysis.enabled=true too")
    if "expert" in recipe.pruning.kinds and recipe.pruning.shape == "free" and recipe.search.evaluations:
        raise InputError("search.evaluations exchanges widths only: with expert in pruning.kinds use shape=uniform")
    check_hidden(recipe)
    check_one_shot(recipe)
    check_masks(recipe)
    check_fade(recipe)
    check_prefix(recipe)
    check_distillation(recipe)
    check_tracker(recipe.output.tracker)
    list_sources(recipe.data)
    check_tasks(recipe.evaluation.tasks)


def check_one_shot(recipe: Recipe) -> None:
    """Refuse a progressive schedule for what is only done once.

    Raises:
        InputError: if the recipe asks for it.
    """
    pruning, needs = recipe.pruning, find_criterion(recipe.pruning.criterion).needs
    asked = {
        "search.evaluations": recipe.search.evaluations > 0,
        "compensation.carrier=adapter": recipe.compensation.carrier == "adapter"
        and recipe.compensation.method != "none",
        "pruning.interactions": pruning.interactions > 1,
        f"pruning.criterion={pruning.criterion}": bool(needs & {"inputs", "probes"}),
    }
    if pruning.schedule != "one-shot" and (setting := next((name for name, wanted in asked.items() if wanted), None)):
        raise InputError(f"{setting} goes with pruning.schedule=one-shot only, not {pruning.schedule}")
    if pruning.interactions > 1 and "gate" not in needs:
        raise InputError(f"pruning.interactions needs gate scores; criterion {pruning.criterion} has none")


def check_fade(recipe: Recipe) -> None:
    """Refuse a refit of units that then fade: while they do, what is lost with them would be there twice.

    Raises:
        InputError: naming the settings.
    """
    pruning, method = recipe.pruning, recipe.compensation.method
    fading = {
        "pruning.schedule=lhspg": pruning.schedule == "lhspg",
        f"pruning.decay_steps={pruning.decay_steps}": pruning.decay_steps > 0 and pruning.schedule != "learned-mask",
    }
    if method != "none" and (setting := next((name for name, fades in fading.items() if fades), None)):
        raise InputError(
            f"{setting} lets units fade that compensation.method={method} has already made up for; set that to none, "
            "or " + ("another schedule" if pruning.schedule == "lhspg" else "pruning.decay_steps=0")
        )


def check_masks(recipe: Recipe) -> None:
    """Refuse learned masks that nothing learns or reads, or that what they would be put on does not have.

    Raises:
        InputError: naming the setting.
    """
    pruning, needs = recipe.pruning, find_criterion(recipe.pruning.criterion).needs
    learned = pruning.schedule == "learned-mask"
    if learned != ("mask" in needs) or (learned and needs != {"mask"}):
        raise InputError(
            f"pruning.schedule={pruning.schedule} does not go with pruning.criterion={pruning.criterion}: masks that "
            "are learned are what is read, so set both to learned-mask, or neither"
        )
    if not learned:
        return
    for kind in sorted({"expert", "hidden"} & set(pruning.kinds)):
        raise InputError(
            f"pruning.schedule=learned-mask does not go with {kind} in pruning.kinds, which is there whole or not at "
            f"all: take {kind} out"
        )
    if pruning.basis == "units" and "layer" in pruning.kinds and len(set(pruning.kinds)) > 1:
        raise InputError(
            "pruning.schedule=learned-mask weighs layers against widths by their parameters: set pruning.basis=block "
            "or total, or take layer out of pruning.kinds"
        )


def check_processes(recipe: Recipe, count: int) -> None:
    """Refuse what several processes cannot share.

    Raises:
        InputError: naming the setting.
    """
    search, compensation = recipe.search, recipe.compensation
    shared = {
        "training.batch_size": recipe.training.batch_size,
        **({"search.windows": search.windows} if search.evaluations else {}),
        **({"compensation.windows": compensation.windows} if compensation.walks else {}),
    }
    for setting, windows in shared.items():
        if windows < count:
            raise InputError(
                f"{setting}={windows} is less than one for each of {count} processes; raise it, or start fewer"
            )
    if recipe.training.offload == "shards" and count == 1:
        raise InputError(
            "training.offload=shards parts the weights among several processes, and there is one: start with "
            + HOW.format(count=2)
            + ", or give --offload disk"
        )
    target = recipe.pruning.target
    if count > 1 and target is not None and parse_target(target).kind == "perplexity":
        raise InputError("--target perplexity makes trials in a single process; start one, or give --sparsity")


def check_prefix(recipe: Recipe) -> None:
    """Refuse selection on the pruned prefix by what is not measured there.

    Raises:
        InputError: naming the settings.
    """
    if recipe.compensation.selection == "prefix":
        criterion = find_criterion(recipe.pruning.criterion)
        if criterion.needs != {"channels"}:
            raise InputError(
                f"compensation.selection=prefix needs a criterion of inputs alone (wanda, flap), not {criterion.name}"
            )
        if recipe.search.evaluations:
            raise InputError("compensation.selection=prefix goes without a search: set search.evaluations=0 or obs")


def check_model(model: str, recipe: Recipe) -> PreTrainedTokenizerBase:
    """Refuse what config and tokenizer tell will not work.

    Returns:
        The tokenizer.

    Raises:
        InputError: naming what is in the way.
    """
    config = load_config(model)
    check_unquantised(model)
    if "layer" in recipe.pruning.kinds:
        check_fewer_layers(config)
    for length in (recipe.data.sequence_length, *recipe.evaluation.windows):
        check_length(config, length)
    tokenizer = load_tokenizer(model)
    if writes_own_text(recipe.data):
        check_length(config, recipe.generate.length)
        start_token(tokenizer)
        tokens_to_write(recipe, training_tokens(recipe))
    return tokenizer


def check_experts(recipe: Recipe, groups: Groups) -> None:
    """Refuse to prune experts where the criterion cannot score them.

    Raises:
        InputError: naming the setting.
    """
    adapted = bool(groups.expert_ranks(recipe.lora))
    find_criterion(recipe.pruning.criterion).check_experts(groups, recipe.pruning.kinds, adapted)
    if recipe.analysis.enabled:
        find_criterion(recipe.analysis.criterion).check_experts(groups, recipe.pruning.kinds, adapted)


def check_hidden(recipe: Recipe) -> None:
    """Refuse what does not go with a narrower residual stream.

    Raises:
        InputError: naming the setting.
    """
    if "hidden" not in recipe.pruning.kinds:
        return
    asked = {
        "pruning.shape=free": recipe.pruning.shape == "free",
        "distillation.hidden_weight": recipe.distillation.hidden_weight > 0,
    }
    if setting := next((name for name, wanted in asked.items() if wanted), None):
        raise InputError(f"{setting} does not go with fewer hidden channels; take hidden out of pruning.kinds")


def check_memory(
    model: str, skeleton: PreTrainedModel, groups: Groups, recipe: Recipe, processes: Processes = ALONE
) -> str:
    """Refuse a run that cannot fit; see `planning.memory` for how coarse the estimate is.

    Args:
        skeleton: the model without its weights.
        groups: its groups.
        processes: those that share the batches and, but for GPUs, a machine's memory, each with a model of its own.

    Returns:
        One line on what each stage will need.

    Raises:
        InputError: if the estimate is more than what is free, and `training.check_memory` has not been turned off.
    """
    device = pick_device(recipe.device)
    weights = compute_dtype(load_config(model), device)
    precision = recipe.training.precision
    lower = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    needs = find_criterion(recipe.pruning.criterion).needs
    if processes.count > 1:
        recipe = recipe.override({"training.batch_size": -(-recipe.training.batch_size // processes.count)})
    sizes = Sizes.of(skeleton, groups, recipe)
    if device.type == "cpu" and recipe.training.offload == "cpu":  # that takes nothing off it
        recipe = recipe.override({"training.offload": "none"})
    activations = torch.bfloat16 if lower else weights
    streamed = is_streamed(model, recipe)
    found = estimate_memory(sizes, recipe, frozenset(needs), weights, activations, processes.count, streamed)
    free = free_memory(device)
    if free is not None and device.type == "cpu":
        free //= processes.local
    if recipe.training.offload == "cpu":
        _check_host(sizes.matrices * weights.itemsize * processes.local, recipe)
    stage = max(found, key=lambda stage: found[stage])
    if free is not None and found[stage] > free and recipe.training.check_memory:
        raise InputError(
            f"{stage} will need about {amount(found[stage])} of memory, {device} has {amount(free)} free: "
            f"{_advice(recipe, stage, device, processes.count)}; or training.check_memory=false to try all the same"
        )
    told = ", ".join(f"{stage} {amount(size)}" for stage, size in found.items())
    return f"memory, estimated: {told}" + (f"; {amount(free)} free on {device}" if free is not None else "")


def check_disk(folder: Path, config: PretrainedConfig, recipe: Recipe, windows: int) -> None:
    """Refuse a new run whose cached teacher would fill the disk.

    Args:
        folder: of the run; it need not be there yet.
        windows: how many the text has.

    Raises:
        InputError: if it would.
    """
    if not recipe.distillation.on or recipe.distillation.teacher != "cached":
        return
    training, top_k = recipe.training, min(recipe.distillation.top_k, config.get_text_config().vocab_size)
    drawn = min(training.steps * training.accumulate * training.batch_size, windows)
    size = cache_bytes(drawn, recipe.data.sequence_length, top_k)
    check_room(
        folder,
        size,
        "the teacher's answers",
        "a smaller distillation.top_k, or distillation.teacher=auto, which takes memory instead",
    )


def check_files(model: str, recipe: Recipe, processes: Processes = ALONE) -> None:
    """Refuse a checkpoint that cannot be read tensor by tensor, if that will be wanted, and tasks that cannot be run.

    Raises:
        InputError: as `Source` and `check_known`.
    """
    if recipe.output.keep_adapter or recipe.training.offloaded:
        Source(model, weights_folder(model))
    processes.by_main(lambda: check_known(recipe.evaluation.tasks))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device now; None where that cannot be told (neither CUDA nor Linux)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or sys.platform != "linux":
        return None
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _check_host(size: int, recipe: Recipe) -> None:
    """Refuse weights that the host's memory cannot hold."""
    free = free_memory(torch.device("cpu"))
    if free is not None and size > free and recipe.training.check_memory:
        raise InputError(
            f"the offloaded weights take {amount(size)} of memory, {amount(free)} are free: give --offload disk; or "
            "training.check_memory=false to try all the same"
        )


def _advice(recipe: Recipe, stage: str, device: torch.device, processes: int) -> str:
    """What would need less, the most helpful first."""
    training, distillation = recipe.training, recipe.distillation
    advice = []
    if not training.offloaded and not training.quantized:
        if processes > 1:
            advice.append("--offload shards")
        advice.append("--offload disk" if device.type == "cpu" else "--offload cpu (or disk)")
    if stage == "train" and distillation.on and distillation.teacher in ("auto", "model"):
        advice.append("distillation.teacher=cached or self, which need no second model")
    if stage != "save" and not (training.gradient_checkpointing or training.offloaded):
        advice.append("training.gradient_checkpointing=true")
    if stage != "save" and training.batch_size > 1:
        advice.append("a smaller training.batch_size, with more training.accumulate")
    return "try " + (", ".join(advice) or "a smaller data.sequence_length or a larger machine")
