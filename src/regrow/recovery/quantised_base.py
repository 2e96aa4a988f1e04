"""Training on a quantised base: what a recipe must be like for it, and how its result reaches the original weights."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from regrow.criteria.registry import find_criterion
from regrow.errors import InputError
from regrow.planning.plan import Plan
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.structure.biases import add_missing_biases
from regrow.structure.cut import cut
from regrow.structure.groups import Groups, find_groups


def settle_quantization(recipe: Recipe, progress: Progress) -> Recipe:
    """The recipe as a base that cannot be written to lets it be run: a refit goes into the adapters.

    Raises:
        InputError: if it asks for what such a base cannot do.
    """
    kind, compensation = recipe.training.quantization, recipe.compensation
    if not recipe.training.quantized:
        return recipe
    check_criterion("pruning.criterion", recipe.pruning.criterion, kind)
    if recipe.analysis.enabled:
        check_criterion("analysis.criterion", recipe.analysis.criterion, kind)
    if compensation.method != "least-squares" or compensation.carrier == "adapter":
        return recipe
    if recipe.pruning.schedule != "one-shot":
        raise InputError(
            f"compensation.method=least-squares writes to the base weights at every cut, which "
            f"training.quantization={kind} does not let it; set compensation.method=none, or pruning.schedule=one-shot"
        )
    progress.say(f"{kind} weights are not written to: the adapters carry the refit (compensation.carrier=adapter)")
    return recipe.override({"compensation.carrier": "adapter"})


def check_criterion(setting: str, name: str, quantization: str) -> None:
    """Refuse a criterion that wants gradients of weights that have none.

    Args:
        setting: where the criterion is named.

    Raises:
        InputError: if it does and the base is quantised, or there is no such criterion.
    """
    found = find_criterion(name)
    if quantization != "none" and "weight" in found.needs:
        raise InputError(
            f"{setting}={name} needs gradients of the base weights, which training.quantization={quantization} has "
            "not; choose another criterion (gate-fisher, lora), or quantization=none"
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
