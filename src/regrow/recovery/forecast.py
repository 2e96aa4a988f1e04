"""What is known of a model before any of it is cut: its scores, and what cuts by them would do."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.journal import Forgetful
from regrow.criteria.registry import find_criterion
from regrow.data.corpus import Corpus
from regrow.planning.allocation import choose
from regrow.planning.plan import Plan
from regrow.planning.sensitivity import Prior
from regrow.planning.target import with_share
from regrow.processes import ALONE, Processes
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.recovery.average import Average
from regrow.recovery.learner import Learner
from regrow.recovery.mixing import calibration_batches, validation_loss
from regrow.recovery.pruner import Pruner
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups
from regrow.structure.offload import is_offloaded


def measure_scores(
    model: PreTrainedModel,
    groups: Groups,
    recipe: Recipe,
    corpus: Corpus,
    progress: Progress,
    journal: Forgetful,
    processes: Processes = ALONE,
) -> Average:
    """The scores on which a one-shot run of this recipe would act, measured without changing the model.

    Learned masks there are none before training: units are then scored by the analysis' criterion.

    Args:
        model: LoRA-wrapped and whole.
        groups: of it, adapters attached.
        corpus: what the run trains on.
        journal: knows whether they have been measured.
    """
    changes: dict[str, object] = {"schedule": "one-shot"}
    if "mask" in find_criterion(recipe.pruning.criterion).needs:
        analysis = recipe.analysis
        changes |= {"criterion": analysis.criterion, "calibration_batches": analysis.calibration_batches}
    one_shot = recipe.model_copy(update={"pruning": recipe.pruning.model_copy(update=changes)})
    calibration = calibration_batches(corpus, recipe)
    learner = Learner(model, recipe.training, calibration, processes)
    with Pruner(model, groups, one_shot, learner, calibration) as pruner:
        average = pruner.scorer.average
        done = journal.read("target-scores")
        if done is not None:
            average.go_on(done)
            return average
        progress.stage("score", max(one_shot.pruning.calibration_batches, 1))
        # Weights that come layer by layer would otherwise stay until the backward pass, all of them.
        with journal.timing("score"), learner.recomputing() if is_offloaded(model) else nullcontext():
            pruner.calibrate(progress.advance)
        journal.write("target-scores", average.state())
        return average


def cut_losses(
    model: PreTrainedModel,
    groups: Groups,
    recipe: Recipe,
    scores: dict[str, Tensor],
    corpus: Corpus,
    shares: Sequence[float],
    progress: Progress,
    prior: Prior | None = None,
) -> list[tuple[float, float]]:
    """`(sparsity, loss)` of one-shot cuts without recovery: gates closed, tensors untouched.

    Args:
        scores: one per unit of each group.
        shares: of the block parameters to remove.
        prior: what an analysis has found.

    Returns:
        For each share the validation loss, nats; not finite where the model breaks.
    """
    progress.stage("forecast", len(shares))
    whole, found = Plan.whole(groups), []
    layers = groups.layers if "layer" in recipe.pruning.kinds else ()
    with Gates(model, groups.groups, layers, groups.residual) as gates:
        for share in shares:
            plan = choose(groups, whole, scores, with_share(recipe.pruning, share), prior=prior)
            for name, group in plan.parts.items():
                gates.keep(name, group.keep)
            for layer in layers:
                gates.set(layer.unit, torch.tensor([float(layer.number not in plan.removed_layers)]))
            found.append((share, validation_loss(model, corpus, recipe)))
            progress.advance()
    return found
