"""From a target to a sparsity, within a walk: what can be settled before training, and what came of it."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from regrow.checkpoint.biases import added_biases
from regrow.checkpoint.journal import Forgetful
from regrow.checkpoint.originals import Originals
from regrow.checkpoint.save import bytes_besides_parameters, weight_bytes
from regrow.checkpoint.shape import zero_biases
from regrow.checkpoint.stock import prunable_groups
from regrow.data.corpus import Corpus
from regrow.errors import InputError
from regrow.evaluation.latency import Latency, measure_latency, probe_turns
from regrow.planning.plan import Plan
from regrow.planning.sensitivity import Prior
from regrow.planning.target import Target, check_speedup, sparsity_for, sparsity_for_speedup
from regrow.processes import ALONE, Processes
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.recovery.average import Average
from regrow.recovery.forecast import measure_scores
from regrow.recovery.outcome import Trained
from regrow.recovery.preparation import Allows, anything
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups
from regrow.trials import TrainInto, Trial, Trials, smallest

LATENCY_FILE = "latency.json"
SCORELESS = "local"
"""The allocation that settles widths without looking at scores."""


@dataclass
class Aim:
    """A target, and what becomes known of it on the way."""

    target: Target
    name: str
    """The model's."""
    folder: Path
    """The run's."""
    progress: Progress
    journal: Forgetful = field(default_factory=Forgetful)
    processes: Processes = ALONE
    latency: Latency | None = None
    """Target speedup: this machine's table."""
    trials: list[Trial] = field(default_factory=list)
    """Target perplexity: the trainings made."""

    @property
    def is_settled(self) -> bool:
        """Whether `prepare` gives the sparsity."""
        return self.target.kind in ("params", "size")

    def prepare(
        self, recipe: Recipe, model: PreTrainedModel, groups: Groups, dtype: torch.dtype, machine: dict[str, Any]
    ) -> Recipe:
        """What the target asks of the recipe, as far as the untouched model tells; nothing is written.

        Parameters and bytes give the sparsity at once. For a speed-up the latency table is measured, or taken from
        the run's folder if it is of the same machine and model.

        Args:
            groups: of the whole model.
            dtype: what the result will be saved in.
            machine: what the latency table is of, the model apart.

        Raises:
            InputError: if the target is out of reach.
        """
        if "hidden" in recipe.pruning.kinds and self.target.kind == "speedup":
            raise InputError(
                f"target {self.target.text!r}: the latency table knows no other hidden sizes; take hidden out of "
                "pruning.kinds, or give --sparsity"
            )
        match self.target.kind:
            case "params" | "size":
                added = zero_biases(model.config, groups)
                if recipe.compensation.method == "bias":
                    added |= added_biases(model.config, groups)
                other = bytes_besides_parameters(model, dtype, recipe.output.shard_size, added)
                saved = replace(groups, total_parameters=groups.total_parameters + sum(added.values()))
                share = sparsity_for(
                    self.target, saved, recipe.pruning, bytes_per_parameter=dtype.itemsize, other_bytes=other
                )
                if "hidden" not in recipe.pruning.kinds:
                    return recipe.with_sparsity(share)
                return recipe.with_sparsity(share * saved.total_parameters / groups.total_parameters, "total")
            case "speedup":
                found = self.processes.by_main(lambda: self._table(model, groups, machine).to_json())
                self.latency = Latency.parse(json.dumps(found), {group.kind for group in groups})
                scoreless = recipe.pruning.model_copy(update={"allocation": SCORELESS})  # no analysis has been made
                check_speedup(self.target, groups, scoreless, self._seconds(recipe))
                return recipe.override({"evaluation.speed": True, "evaluation.speed_batches": _with_one(recipe)})
            case "perplexity":
                return recipe

    def recover(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        corpus: Corpus,
        fresh: Callable[[], PreTrainedModel],
        train_into: TrainInto,
        prior: Prior | None = None,
    ) -> tuple[PreTrainedModel, Trained, Recipe]:
        """Settle what the sparsity is, and train to it.

        Args:
            recipe: as `prepare` gave it.
            model: whole, LoRA-wrapped. For a perplexity another takes its place, and it is left without weights.
            corpus: to train on, and for the validation.
            fresh: another such model.
            prior: what an analysis has found.

        Returns:
            The cut and recovered model, adapters attached; what training found; the recipe with the sparsity.

        Raises:
            InputError: if no trial holds a perplexity, or a speed-up is out of reach after all.
        """
        scores, originals = None, Originals.wanted(self.name, recipe.training)
        if self.target.kind == "perplexity":
            trials = Trials(self.name, self.folder, recipe, corpus, self.progress, self.journal, prior, originals)
            model, trained, self.trials = trials.search(self.target, model, fresh, train_into)
            return model, trained, recipe.with_sparsity(smallest(self.trials).sparsity)
        if self.target.kind == "speedup":
            recipe, scores = self._settle_speedup(recipe, model, corpus, prior, originals)
        return model, train_into(model, recipe, self.folder, scores), recipe

    def _settle_speedup(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        corpus: Corpus,
        prior: Prior | None,
        originals: Originals | None,
    ) -> tuple[Recipe, Average | None]:
        """The recipe with the least sparsity whose predicted speed-up is the target; scores, if they were needed."""
        groups, scores = prunable_groups(model), None
        if recipe.pruning.allocation != SCORELESS or "layer" in recipe.pruning.kinds:
            with originals.borrowed(model, Gates(model, groups.groups)) if originals else nullcontext():
                scores = measure_scores(model, groups, recipe, corpus, self.progress, self.journal, self.processes)
        known = scores.scores if scores else {group.name: torch.zeros(group.units) for group in groups}
        seconds = self._seconds(recipe)
        predicted = partial(sparsity_for_speedup, self.target, groups, recipe.pruning, seconds, known, prior)
        share = self.journal.once("sparsity", predicted)  # a run that goes on elsewhere has another latency table
        self.progress.say(f"{self.target.text}: sparsity {share:.4f} by the latency table")
        return recipe.with_sparsity(share), None if recipe.pruning.scores_anew else scores

    def allows(self, recipe: Recipe, groups: Groups) -> Allows:
        """What a search has to mind: a model that has lost so much is, by the latency table, as fast as asked.

        Args:
            groups: of the whole model.
        """
        if self.latency is None:
            return anything
        seconds, units = self._seconds(recipe), {group.name: group.units for group in groups}
        whole, least = seconds(units), self.target.value
        return lambda lost: whole / seconds({name: n - lost[name] for name, n in units.items()}) >= least

    def outcome(self, recipe: Recipe, plan: Plan, results: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
        """What was asked, what it came to, and what was reached: for `results.json` and the report.

        Args:
            results: of the finished run, sizes and speeds in them.
        """
        told: dict[str, Any] = {
            "asked": self.target.text,
            "kind": self.target.kind,
            "sparsity": recipe.pruning.sparsity,
            "basis": recipe.pruning.basis,
            "limit": self.target.value,
        }
        match self.target.kind:
            case "params":
                told["reached"] = results["size"]["pruned"]["total"]
            case "size":
                told["reached"] = weight_bytes(checkpoint)
            case "speedup":
                seconds, phase = self._seconds(recipe), recipe.pruning.speed_phase
                whole = seconds({name: group.units for name, group in plan.groups.items()})
                left = seconds({name: len(group.keep) for name, group in plan.groups.items()})
                told |= {"phase": phase, "predicted": whole / left}
                measured = (one[phase] for one in results.get("speedup", ()) if one["batch"] == 1)
                told["reached"] = next(measured, None)  # there is none if the models do not fit
            case "perplexity":
                best = smallest(self.trials)
                told |= {"limit": self.target.most_perplexity(best.dense), "dense": best.dense}
                told |= {"reached": best.recovered, "trials": [asdict(trial) for trial in self.trials]}
        return told

    def _seconds(self, recipe: Recipe) -> Callable[[Mapping[str, int]], float]:
        assert self.latency is not None
        return partial(self.latency.seconds, recipe.pruning.speed_phase)

    def _table(self, model: PreTrainedModel, groups: Groups, machine: dict[str, Any]) -> Latency:
        file = self.folder / LATENCY_FILE
        config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
        measured_on = {
            **machine,
            "host": _short_hash(platform.node()),
            "model": _short_hash(json.dumps(config, sort_keys=True, default=str)),
            "dtype": str(model.dtype),
        }
        if file.is_file():
            try:
                text = file.read_text(encoding="utf-8", errors="replace")
                earlier = Latency.parse(text, {group.kind for group in groups})
            except InputError as error:
                raise InputError(f"{file}: {error}; delete it, and it is measured anew") from error
            if earlier.measured_on == measured_on:
                self.progress.say(f"latency table of this machine and model: {file}")
                return earlier
        self.progress.stage("measure latency", probe_turns(groups))
        return measure_latency(model, groups, measured_on, lambda _: self.progress.advance())


def _with_one(recipe: Recipe) -> list[int]:
    """The batch sizes to measure, one text at a time among them: what the table predicts."""
    return sorted({1, *recipe.evaluation.speed_batches})


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
