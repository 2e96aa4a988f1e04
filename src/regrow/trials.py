"""Target perplexity: whole trainings at several sparsities, of which the smallest model that holds is kept.

Whether a model holds is judged by its recovered perplexity on the validation windows; the text that the report is
about decides nothing. Each trial leaves a folder in `trials/`; one that is finished there is not trained again when an
interrupted run goes on, nor is anything measured twice.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from regrow.checkpoint.files import parse_json, write_bytes, write_json
from regrow.checkpoint.journal import Forgetful
from regrow.checkpoint.originals import Originals
from regrow.checkpoint.stock import prunable_groups
from regrow.data.corpus import Corpus
from regrow.errors import InputError
from regrow.planning.bracket import Search
from regrow.planning.demand import reach
from regrow.planning.sensitivity import Prior
from regrow.planning.target import Target, share_of
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.recovery.average import Average
from regrow.recovery.forecast import cut_losses, measure_scores
from regrow.recovery.mixing import validation_loss
from regrow.recovery.outcome import FILES, Trained, read_trained
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups
from regrow.structure.quantised import release

CURVE_POINTS = 8

TrainInto = Callable[[PreTrainedModel, Recipe, Path, Average | None], Trained]
"""Carries a LoRA-wrapped model through a recipe and leaves `FILES` in a folder."""


@dataclass(frozen=True)
class Trial:
    """One training."""

    sparsity: float
    """Of the block parameters, asked for."""
    dense: float
    """Validation perplexity of the dense model."""
    recovered: float
    """Validation perplexity after recovery."""
    holds: bool


@dataclass
class Trials:
    """The search: a loop around the training part of the walk."""

    name: str
    """The model's."""
    folder: Path
    """The run's."""
    recipe: Recipe
    corpus: Corpus
    progress: Progress
    journal: Forgetful
    prior: Prior | None = None
    originals: Originals | None = None
    """Of a quantised model that ends on them: what it is measured with before."""

    def search(
        self, target: Target, model: PreTrainedModel, fresh: Callable[[], PreTrainedModel], train_into: TrainInto
    ) -> tuple[PreTrainedModel, Trained, list[Trial]]:
        """Find the smallest model that holds the target.

        Args:
            model: dense, LoRA-wrapped. Its memory is given to the trials: afterwards it holds no weights.
            fresh: another such model.

        Returns:
            The model, recovered, adapters attached; what its training found; and all trials, in their order.

        Raises:
            InputError: if no trial holds; the message says which came closest.
        """
        recipe, groups = self.recipe, prunable_groups(model)
        with self.originals.borrowed(model, Gates(model, groups.groups)) if self.originals else nullcontext():
            dense, scores, curve = self._measure(target, model, groups)
        release(model)
        most = target.most_perplexity(math.exp(dense))
        search, trials = Search(dense, math.log(most), curve), list[Trial]()
        known = None if recipe.pruning.scores_anew else scores
        while len(trials) < recipe.pruning.target_trials and (share := search.propose()) is not None:
            folder = self._folder(len(trials))
            loss = self._trial(folder, share, dense, known, fresh, train_into)
            trial = Trial(share, math.exp(dense), math.exp(loss), search.learn(share, loss))
            trials.append(trial)
            write_json(folder / "trial.json", {**asdict(trial), "loss": loss, "of": self._mark(share, dense)})
            self.progress.say(
                f"trial {len(trials)}: sparsity {share:.3f}, validation perplexity {trial.recovered:.3f}: "
                f"{'holds' if trial.holds else 'too much'}"
            )
        if not trials:
            raise InputError(
                f"target {target.text!r}: at most {max(curve[-1][0], 0):.1%} of the blocks can be removed, too little "
                "for a trial; raise pruning.cap, or widen pruning.kinds"
            )
        if not any(trial.holds for trial in trials):
            raise _none_holds(trials, target, most)
        best = smallest(trials)
        for left_over in (self.folder / "trials").iterdir():  # of an earlier run that needed more
            if left_over not in [self._folder(number) for number in range(len(trials))]:
                shutil.rmtree(left_over)
        return *self._load(self._folder(trials.index(best)), fresh()), trials

    def _measure(
        self, target: Target, model: PreTrainedModel, groups: Groups
    ) -> tuple[float, Average, list[tuple[float, float]]]:
        """What is known of the whole model, which every trial shares: its loss, its scores, what cuts would do."""
        recipe = self.recipe
        dense = self.journal.once("dense-loss", lambda: validation_loss(model, self.corpus, recipe))
        perplexity = math.exp(dense)
        self.progress.say(
            f"validation perplexity: dense {perplexity:.3f}, to hold {target.most_perplexity(perplexity):.3f}"
        )
        scores = measure_scores(model, groups, recipe, self.corpus, self.progress, self.journal)
        largest = share_of(reach(groups, recipe.pruning, prior=self.prior), groups)
        shares = [float(share) for share in np.linspace(0, largest, CURVE_POINTS + 1)[1:]]
        curve = self.journal.once(
            "forecast",
            lambda: cut_losses(
                model, groups, recipe, scores.scores, self.corpus, shares, self.progress, self.prior
            )
        )  # fmt: skip
        return dense, scores, [(share, loss) for share, loss in curve]

    def _folder(self, number: int) -> Path:
        return self.folder / "trials" / str(number + 1)

    def _mark(self, share: float, dense: float) -> str:
        """Tells whether a trial found in the folder is this one: recipe, model, text and sparsity."""
        sections = self.recipe.model_dump(mode="json", exclude={"evaluation", "output", "name", "description"})
        del sections["pruning"]["target"], sections["pruning"]["target_trials"], sections["pruning"]["sparsity"]
        parts = [
            version("regrow"),
            self.name,
            dense,
            share,
            sections,
            self.corpus.train.sha256,
            self.corpus.validation.sha256,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _trial(
        self,
        folder: Path,
        share: float,
        dense: float,
        scores: Average | None,
        fresh: Callable[[], PreTrainedModel],
        train_into: TrainInto,
    ) -> float:
        """The recovered validation loss at a sparsity, nats: trained now, or as it was left there before."""
        record = folder / "trial.json"
        if record.is_file():
            told = f"{record}: delete it, and the trial is done anew"
            earlier = parse_json(record.read_text(encoding="utf-8", errors="replace"), told)
            if isinstance(earlier, dict) and earlier.get("of") == self._mark(share, dense):
                return float(earlier["loss"])
            record.unlink()
        trained = train_into(fresh(), self.recipe.with_sparsity(share), folder, scores)
        write_json(folder / "summary.json", trained.summary)
        return float(trained.summary["best_validation_loss"])

    def _load(self, folder: Path, model: PreTrainedModel) -> tuple[PreTrainedModel, Trained]:
        """Build what a trial left anew, and copy its files to where a run has them."""
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        for file in FILES:
            write_bytes(self.folder / file, (folder / file).read_bytes())
        return model, read_trained(folder, model, summary)


def smallest(trials: list[Trial]) -> Trial:
    """Of the trials that hold, the one with the highest sparsity."""
    return max((trial for trial in trials if trial.holds), key=lambda trial: trial.sparsity)


def _none_holds(trials: list[Trial], target: Target, most: float) -> InputError:
    best = min(trials, key=lambda trial: trial.recovered)
    return InputError(
        f"target {target.text!r}: none of {len(trials)} trials holds it; the best is validation perplexity "
        f"{best.recovered:.3f} at sparsity {best.sparsity:.3f}, to hold is {most:.3f} (dense {best.dense:.3f}); "
        "ask for less, train longer (--steps), or allow more pruning.target_trials"
    )
