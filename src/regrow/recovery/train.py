"""`[score → plan → cut → adapt]*` and recovery: one loop of LoRA steps, the best adapters kept."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from regrow.checkpoint.journal import Forgetful
from regrow.checkpoint.originals import Originals
from regrow.checkpoint.state import State
from regrow.data.corpus import Corpus
from regrow.errors import InputError
from regrow.evaluation.compare import held_out_nll
from regrow.evaluation.machine import memory_in_use
from regrow.interrupt import Stopped, stop_requests
from regrow.planning.sensitivity import Prior
from regrow.processes import ALONE, Processes
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.recovery.average import Average
from regrow.recovery.distillation import distil
from regrow.recovery.learner import Learner
from regrow.recovery.mixing import DataMix, calibration_batches
from regrow.recovery.outcome import Best, History, Trained
from regrow.recovery.preparation import Allows, anything, preparer
from regrow.recovery.pruner import CutEvent, Pruner
from regrow.recovery.tracking import Track, ignore
from regrow.structure.adapters import adapter_names
from regrow.structure.groups import Groups
from regrow.structure.quantised import held_bytes

RECENT = 20
"""Steps that the speed shown is the mean of."""


def train(
    model: PreTrainedModel,
    groups: Groups,
    recipe: Recipe,
    corpus: Corpus,
    progress: Progress,
    *,
    teacher_folder: Path,
    on_cut: Callable[[CutEvent], None],
    on_validation: Callable[[History], None],
    scores: Average | None = None,
    prior: Prior | None = None,
    track: Track = ignore,
    journal: Forgetful = Forgetful(),  # noqa: B008  (it holds nothing)
    processes: Processes = ALONE,
    originals: Originals | None = None,
    allows: Allows = anything,
) -> Trained:
    """Carry a LoRA-wrapped model to its target and recover it.

    Args:
        groups: of the whole model, adapters attached.
        teacher_folder: where a cached teacher may write; it is gone when training is over.
        on_cut: sees every plan as it is made.
        on_validation: sees the history whenever it is worth writing down.
        scores: as `measure_scores` found them before; by default they are measured here.
        prior: what an analysis has found, for the allocation.
        track: gets the figures of every step, validation and round.
        journal: knows what of it an interrupted run has done; the model is then as that run got it, too.
        processes: those that train together, each with a model and all the text.
        originals: of a quantised model, for `training.original_share` of the steps.
        allows: whether a search may settle on numbers of units lost by each group.

    Raises:
        InputError: if training diverges.
        Stopped: if a signal asks for it: after the step under way, its state noted.
    """
    loop = Loop(
        model, recipe, corpus, progress, on_cut=on_cut, on_validation=on_validation, track=track, journal=journal,
        processes=processes, originals=originals,
    )  # fmt: skip
    # A teacher may need the whole weights, and what is left of nf4 ones would have to be rounded anew at every cut.
    # What has been cut is not replaced by its original either.
    early = not (recipe.distillation.needs_whole_weights or recipe.training.quantization == "nf4" or originals)
    prepare = preparer(model, recipe, corpus, progress, journal, teacher_folder.parent, processes, originals, allows)
    with Pruner(
        model, groups, recipe, loop.learner, calibration_batches(corpus, recipe), on_event=loop.record_cut,
        cut_early=early, prepare=prepare, scores=scores, prior=prior, timing=journal.timing,
    ) as pruner:  # fmt: skip
        loop.score(pruner, known=scores is not None)
        if recipe.distillation.on and recipe.training.steps:
            with journal.timing("teach"):
                loop.learner.objective = distil(
                    recipe.distillation, loop.learner, pruner.gates, corpus.train, loop.mix.upcoming, teacher_folder,
                    progress, journal, originals,
                )  # fmt: skip
        loop.run(pruner, loop.begin(pruner))
        loop.end(pruner)
    return loop.trained(pruner)


class Loop:
    """The optimizer steps of a run, and what is remembered of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        corpus: Corpus,
        progress: Progress,
        *,
        on_cut: Callable[[CutEvent], None],
        on_validation: Callable[[History], None],
        track: Track,
        journal: Forgetful,
        processes: Processes,
        originals: Originals | None,
    ) -> None:
        """Arguments as for `train`."""
        self.processes = processes
        self.originals = originals
        """While they are still to come."""
        self.model = model
        self.recipe = recipe
        self.training = recipe.training
        self.progress = progress
        self.on_cut = on_cut
        self.on_validation = on_validation
        self.track = track
        self.journal = journal
        self.bytes = held_bytes(model)
        """Of the whole model, adapters included."""
        size = recipe.training.batch_size
        self.mix = DataMix(corpus, recipe, lambda windows: held_out_nll(model, windows, size, processes))
        self.learner = Learner(model, recipe.training, self.mix, processes)
        self.history = History(mixture=self.mix.history)
        self.best = Best()
        self._last_steps = deque[float](maxlen=RECENT + 1)
        self._tracked_rounds = 0
        self.original_from: int | None = None
        """The step from which on the model is trained on its original weights."""
        self.seconds = 0.0
        """Of training, before this process began with it."""

    def score(self, pruner: Pruner, known: bool) -> None:
        """Measure, while the model is whole, its losses and its units' worth; or take it from the journal."""
        done = self.journal.read("score")
        if done is not None:
            self.mix.go_on(done.part("mix"), 0)
            self.learner.go_on(done.part("learner"))
            pruner.scorer.go_on(done.part("scorer"))
            return
        with self._true_weights(pruner):
            with self.journal.timing("validate"):
                self.mix.remember_dense()
            if self.recipe.pruning.calibration_batches and not known:
                self.progress.stage("score", self.recipe.pruning.calibration_batches)
            with self.journal.timing("score"):
                pruner.calibrate(self.progress.advance)
        parts = {"mix": self.mix.state(), "learner": self.learner.state(), "scorer": pruner.scorer.state()}
        self.journal.write("score", State.of(**parts))

    @contextmanager
    def _true_weights(self, pruner: Pruner) -> Iterator[None]:
        """Within this context a model that ends on its original weights computes with them already."""
        if self.originals is None:
            yield
            return
        with self.originals.borrowed(self.model, pruner.gates), self.learner.recomputing():
            pruner.scorer.watch(pruner.groups)
            yield
        pruner.scorer.watch(pruner.groups)

    def begin(self, pruner: Pruner) -> int | None:
        """Do what comes before the first step, or take it from the journal.

        Returns:
            The step that is ready to be taken, if an interrupted run has come to one.
        """
        done = self.journal.read("train")
        if done is None:
            pruner.before_step(0)
            return None
        own = done.part("own").values
        if own["original_from"] is not None:
            self._bring_originals(own["original_from"], pruner)
        self.learner.objective.go_on(done.part("objective"))
        pruner.go_on(done.part("pruner"))
        self.learner.go_on(done.part("learner"))
        self.mix.go_on(done.part("mix"), own["ready"])
        self.best.go_on(done.part("best"))
        self.history.steps, self.history.validations, self.history.cuts = own["history"]
        self.seconds = own["seconds"]
        self._tracked_rounds = len(self.mix.history)
        return int(own["ready"])

    def state(self, pruner: Pruner, ready: int, seconds: float) -> State:
        """All that `begin` needs, with everything done that comes before step `ready`."""
        history = self.history.steps, self.history.validations, self.history.cuts
        own = {"ready": ready, "history": history, "seconds": seconds, "original_from": self.original_from}
        return State.of(
            own=State(own),
            objective=self.learner.objective.state(),
            pruner=pruner.state(),
            learner=self.learner.state(),
            mix=self.mix.state(),
            best=self.best.state(),
        )

    def record_cut(self, event: CutEvent) -> None:
        """Write an event into the history."""
        self.history.cuts.append({"step": event.step, "fraction": event.fraction, **event.plan.sparsity.model_dump()})
        self.on_cut(event)

    def validate(self, step: int) -> None:
        """Measure the held-out loss, and keep the adapters if they are the best since the last cut."""
        with self.journal.timing("validate"):
            loss = self.mix.validation_loss(step)
        self.history.validations.append({"step": step, "loss": loss})
        self.track({"validation_loss": loss}, step)
        self.best.offer(loss, step, self.learner)
        self.on_validation(self.history)

    def run(self, pruner: Pruner, ready: int | None) -> None:
        """Take the steps, until they are used up or nothing gets better.

        Args:
            ready: as `begin` said.

        Raises:
            Stopped: if asked to.
        """
        self.progress.stage("train", self.training.steps)
        self.progress.advance(ready or 0)
        began = time.perf_counter() - self.seconds
        self._last_steps.append(time.perf_counter())
        with stop_requests() as stop:
            for step in self.mix.steps(ready or 0):
                if step != ready and not self._prepare(step, pruner):
                    break
                if self.mix.has_ended(step):
                    self.progress.say(f"stage {self.mix.stage.name} has converged; ended at step {step}")
                    continue
                if step != ready:
                    self._note(step, pruner, time.perf_counter() - began, self.processes.any(stop()))
                self.learner.step_number = step  # after a stage that ended early the rate goes on with the next's
                skipped, loss = self.learner.skipped, pruner.train_step()
                if self.learner.skipped > skipped:
                    self.progress.say(f"step {step}: update skipped, the loss ({loss:.3g}) or a gradient is not finite")
                seconds = round(time.perf_counter() - began, 3)
                self.history.steps.append({"step": step, "loss": loss, **self.learner.terms, "seconds": seconds})
                self._tell(step, loss, pruner.settled_plan.sparsity.block)

    def _prepare(self, step: int, pruner: Pruner) -> bool:
        """Whatever comes before a step; whether training goes on."""
        if step:  # before the first one it has been done
            pruner.before_step(step)
        if self.originals and pruner.finished and step >= self._switch:
            self._go_over(step, pruner)
        # The last stage, like the patience, ends no earlier than the model is its true self.
        waits = self.originals is not None and step in self.mix.stages[-1].steps
        removed, aim = pruner.settled_plan.sparsity.block, self.recipe.pruning.sparsity
        self.mix.before_step(step, pruner.finished and not waits, removed, aim)
        self._track_rounds()
        return not self._has_ended(step, pruner)

    @property
    def _switch(self) -> int:
        """The step before which the original weights are due."""
        return self.training.steps - round((self.training.original_share or 0) * self.training.steps)

    def _go_over(self, step: int, pruner: Pruner) -> None:
        """Train on the original weights from here on; what was best until now was so of another model."""
        self._bring_originals(step, pruner)
        if pruner.cut_early:
            pruner.finish()
        self.best = Best()
        self.progress.say(f"step {step}: the original weights take the place of the {self.training.quantization} ones")

    def _bring_originals(self, step: int, pruner: Pruner) -> None:
        assert self.originals is not None
        self.originals.put(self.model, pruner.gates)
        self.originals, self.original_from = None, step
        pruner.cut_early = not self.recipe.distillation.needs_whole_weights
        self.learner.checkpoint_activations()
        self.learner.begun_anew = step

    def _note(self, step: int, pruner: Pruner, seconds: float, stop: bool) -> None:
        """Leave a checkpoint, if it is time to or somebody wants to stop here."""
        if stop or step % self.training.steps_between_checkpoints == 0:
            self.journal.write("train", self.state(pruner, step, seconds), step)
        if stop:
            raise Stopped(f"stopped before step {step} of {self.training.steps}")

    def _tell(self, step: int, loss: float, removed: float) -> None:
        """How it goes, to whoever watches."""
        self._last_steps.append(time.perf_counter())
        seconds = self._last_steps[-1] - self._last_steps[0]
        rate = (len(self._last_steps) - 1) * self.tokens_a_step / seconds
        held = memory_in_use(self.model.device)
        seen = f" · validation {self.history.validations[-1]['loss']:.3f}" if self.history.validations else ""
        self.progress.advance(
            1, f"loss {loss:.3f}{seen} · removed {removed:.1%} · {rate:,.0f} tokens/s · {held / 2**20:,.0f} MiB"
        )
        pace = {"learning_rate": self.learner.optimizer.param_groups[0]["lr"], "tokens_per_second": rate, "bytes": held}
        self.track({"loss": loss, **self.learner.terms, "sparsity": removed, **pace}, step)

    def _track_rounds(self) -> None:
        """Pass on what rounds of data have been noted since."""
        for one in self.mix.history[self._tracked_rounds :]:
            named = {f"data_weight/{name}": weight for name, weight in one["weights"].items()}
            self.track(named | {f"degradation/{name}": lost for name, lost in one["degradation"].items()}, one["step"])
        self._tracked_rounds = len(self.mix.history)

    @property
    def tokens_a_step(self) -> int:
        """What an optimizer step reads."""
        return self.training.batch_size * self.training.accumulate * self.mix.corpus.train.length

    def _has_ended(self, step: int, pruner: Pruner) -> bool:
        """Validate if it is time to; whether patience has run out then."""
        due = not step % self.training.eval_interval or self.mix.has_ended(step) or step == self.original_from
        if not (pruner.finished and due):
            return False
        self.validate(step)
        waited = self.best.waited
        if not self.training.patience or waited < self.training.patience:
            return False
        if self.originals:
            self._go_over(step, pruner)
            return False
        self.progress.say(f"no better validation loss for {waited} validations; stopped at step {step}")
        return True

    def end(self, pruner: Pruner) -> None:
        """Reach the target, whatever is still on the way there, and go back to the best adapters.

        Raises:
            InputError: if no validation loss was finite.
        """
        self.learner.objective.close()
        pruner.before_step(self.training.steps)
        pruner.settle()
        self.mix.record(self.learner.step_number)
        self._track_rounds()
        self.validate(self.learner.step_number)
        if not self.best.adapters:
            raise InputError("the validation loss is not finite; lower training.learning_rate, or check the model")
        self.learner.restore(self.best.adapters)
        pruner.finish()
        self.progress.say(f"best validation loss {self.best.loss:.4f}, at step {self.best.step}")

    def trained(self, pruner: Pruner) -> Trained:
        """What has come of it."""
        adapters = dict(zip(adapter_names(self.model), self.learner.snapshot(), strict=True)) | pruner.refitted()
        summary = self._summary()
        if pruner.preparation:
            summary |= {name: value for name, value in vars(pruner.preparation.done).items() if value}
        return Trained(pruner.plan, pruner.groups, adapters, self.history, summary)

    def _summary(self) -> dict[str, Any]:
        training, text, learner, steps = self.training, self.mix.corpus.train, self.learner, len(self.history.steps)
        return {
            "steps": steps,
            "tokens": steps * self.tokens_a_step,
            "learning_rate": learner.learning_rate,
            "rank": self.recipe.lora.rank,
            "compute_dtype": self.learner.compute_dtype,
            "trainable_parameters_at_the_end": sum(parameter.numel() for parameter in learner.parameters),
            "skipped_updates": learner.skipped,
            "best_step": self.best.step,
            "best_validation_loss": self.best.loss,
            "train_windows": len(text),
            "train_sha256": text.sha256,
            **({"distillation": learner.objective.summary()} if self.recipe.distillation.on else {}),
            **({"quantization": self._quantised()} if training.quantized else {}),
            **({"mixture": self.mix.summary()} if self.mix.in_rounds else {}),
        }

    def _quantised(self) -> dict[str, Any]:
        """How the base was kept, and until when."""
        from_step = {} if self.original_from is None else {"original_from": self.original_from}
        return {"kind": self.training.quantization, "bytes": self.bytes, **from_step}
