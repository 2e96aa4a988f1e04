"""Training on a base that is not written to, for it is quantised or lies elsewhere.

What a recipe must be like for it, and how its result reaches the original weights.
"""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.load import weights_folder
from regrow.checkpoint.source import Source, reads_by_tensor
from regrow.criteria.registry import find_criterion
from regrow.errors import InputError
from regrow.planning.plan import Plan
from regrow.planning.target import parse_target
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.structure.biases import add_missing_biases
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.groups import Groups

ORIGINAL_SHARE = 0.5
"""What share of the steps train on the original weights if the recipe does not say and it pays."""


def settle_quantization(recipe: Recipe, progress: Progress) -> Recipe:
    """The recipe as a base that cannot be written to lets it be run: a refit goes into the adapters.

    Raises:
        InputError: if it asks for what such a base cannot do.
    """
    kind = recipe.training.quantization
    return _not_written_to(recipe, "quantization", kind, progress) if recipe.training.quantized else recipe


def settle_offload(recipe: Recipe, progress: Progress) -> Recipe:
    """The recipe as weights that lie elsewhere let it be run: also with activation checkpointing, speed not measured.

    Raises:
        InputError: if it asks for what they cannot do.
    """
    place, target = recipe.training.offload, recipe.pruning.target
    if not recipe.training.offloaded:
        return recipe
    if recipe.training.quantized:
        raise InputError(
            f"training.offload={place} brings the weights as they are stored, training.quantization="
            f"{recipe.training.quantization} keeps them all on the device; set one of them to none"
        )
    if target is not None and parse_target(target).kind == "speedup":
        raise InputError(
            f"target {target!r}: the speed of weights that are brought from elsewhere (training.offload={place}) is "
            "not the model's; give --sparsity or another target, or set training.offload=none"
        )
    recipe = _not_written_to(recipe, "offload", place, progress)
    if recipe.evaluation.speed or recipe.evaluation.memory:
        progress.say("speed and peak memory are not measured: they would be those of bringing the weights")
    off = {"evaluation.speed": False, "evaluation.memory": False}
    return recipe.override({"training.gradient_checkpointing": True, **off})


def settle_originals(model: str, recipe: Recipe, progress: Progress) -> Recipe:
    """The recipe with the share of the steps that train on the original weights of a quantised base.

    Args:
        model: a folder, or a repository on the hub.

    Raises:
        InputError: if a share is asked for of a checkpoint that cannot be read tensor by tensor.
    """
    if not recipe.training.quantized:
        return recipe
    asked = recipe.training.original_share
    refitted = recipe.compensation.method == "least-squares"  # on the original weights then
    pays = recipe.training.quantization == "nf4" or refitted
    share = (ORIGINAL_SHARE if pays else 0.0) if asked is None else asked
    if share:
        try:
            Source(model, weights_folder(model))
        except InputError as error:
            if asked is not None:
                raise
            progress.say(f"training will not end on the original weights (training.original_share=0): {error}")
            share = 0.0
    return recipe.override({"training.original_share": share})


def is_streamed(model: str, recipe: Recipe) -> bool:
    """Whether the result is made from the original files tensor by tensor, and not of a model in memory.

    Args:
        model: a folder, or a repository on the hub.
    """
    return recipe.training.offloaded or (recipe.training.quantized and reads_by_tensor(model))


def _not_written_to(recipe: Recipe, key: str, kept: str, progress: Progress) -> Recipe:
    compensation = recipe.compensation
    check_criterion("pruning.criterion", recipe.pruning.criterion, kept, key)
    if recipe.analysis.enabled:
        check_criterion("analysis.criterion", recipe.analysis.criterion, kept, key)
    if compensation.method != "least-squares" or compensation.carrier == "adapter":
        return recipe
    if recipe.pruning.schedule != "one-shot":
        raise InputError(
            f"compensation.method=least-squares writes to the base weights at every cut, which "
            f"training.{key}={kept} does not let it; set compensation.method=none, or pruning.schedule=one-shot"
        )
    told = f"{kept} weights" if key == "quantization" else "offloaded weights"
    progress.say(f"{told} are not written to: the adapters carry the refit (compensation.carrier=adapter)")
    return recipe.override({"compensation.carrier": "adapter"})


def check_criterion(setting: str, name: str, kept: str, key: str = "quantization") -> None:
    """Refuse a criterion that wants gradients of weights that have none.

    Args:
        setting: where the criterion is named.
        kept: how the base is kept, by `training.quantization` or whichever `key` says so.

    Raises:
        InputError: if it does and the base is not as it is by default, or there is no such criterion.
    """
    found = find_criterion(name)
    if kept != "none" and "weight" in found.needs:
        raise InputError(
            f"{setting}={name} needs gradients of the base weights, which training.{key}={kept} has not; choose "
            f"another criterion (gate-fisher, lora), or {key}=none"
        )


def rebuild(model: PreTrainedModel, plan: Plan, trained: Mapping[str, Tensor]) -> Groups:
    """Make a plan and what was trained under it true in another model.

    Args:
        model: whole, LoRA-wrapped as the one that was trained.
        trained: adapters, and other parameters written to, by their names in the cut model.

    Returns:
        The groups of the model, now cut.
    """
    groups = find_groups(model)
    groups = cut(model, groups, plan.positions_within(Plan.whole(groups)))
    add_missing_biases(model, frozenset(name for name in trained if name.endswith(".bias")))
    for name, values in trained.items():
        model.get_parameter(name).data.copy_(values)
    return groups
