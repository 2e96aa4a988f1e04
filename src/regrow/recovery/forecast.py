"""What is known of a model before any of it is cut: its scores, and what cuts by them would do."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.journal import Forgetful
from regrow.data.corpus import Corpus
from regrow.data.tokens import Windows, batches
from regrow.planning.allocation import choose
from regrow.planning.plan import Plan
from regrow.planning.target import with_share
from regrow.processes import ALONE, Processes
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.recovery.average import Average
from regrow.recovery.learner import Learner
from regrow.recovery.mixing import validation_loss
from regrow.recovery.pruner import Pruner
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups


def measure_scores(
    model: PreTrainedModel,
    groups: Groups,
    recipe: Recipe,
    text: Windows,
    progress: Progress,
    journal: Forgetful,
    processes: Processes = ALONE,
) -> Average:
    """The scores on which a one-shot run of this recipe would act, measured without changing the model.

    Args:
        model: LoRA-wrapped and whole.
        groups: of it, adapters attached.
        text: what the run trains on.
        journal: knows whether they have been measured.
    """
    one_shot = recipe.model_copy(update={"pruning": recipe.pruning.model_copy(update={"schedule": "one-shot"})})
    size = recipe.training.batch_size
    learner = Learner(model, recipe.training, batches(text, size, recipe.seed), processes)
    calibration = batches(text, size, recipe.seed + 1)
    with Pruner(model, groups, one_shot, learner, calibration) as pruner:
        average = pruner.scorer.average
        done = journal.read("target-scores")
        if done is not None:
            average.go_on(done)
            return average
        progress.stage("score", max(recipe.pruning.calibration_batches, 1))
        with journal.timing("score"):
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
) -> list[tuple[float, float]]:
    """`(sparsity, loss)` of one-shot cuts without recovery: gates closed, tensors untouched.

    Args:
        scores: one per unit of each group.
        shares: of the block parameters to remove.

    Returns:
        For each share the validation loss, nats; not finite where the model breaks.
    """
    progress.stage("forecast", len(shares))
    whole, found = Plan.whole(groups), []
    layers = groups.layers if "layer" in recipe.pruning.kinds else ()
    with Gates(model, groups.groups, layers, groups.residual) as gates:
        for share in shares:
            plan = choose(groups, whole, scores, with_share(recipe.pruning, share))
            for name, group in plan.parts.items():
                gates.keep(name, group.keep)
            for layer in layers:
                gates.set(layer.unit, torch.tensor([float(layer.number not in plan.removed_layers)]))
            found.append((share, validation_loss(model, corpus, recipe)))
            progress.advance()
    return found
