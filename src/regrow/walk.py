"""The walk: load → trace → attach LoRA and gates → analyse → [score → plan → cut → adapt]* → recover → merge → save →
verify → evaluate → report.

A run's folder holds `recipe.yaml`, `run.json` (what is being done), `groups.json`, `scores.safetensors`,
`history.json`, `adapters.safetensors`, `sensitivity.json` and its picture if there was an analysis, and the results:
`plan.json`, `model/`, `results.json`, `report.md`, `report.html`. While a cached teacher teaches, it lies in
`teacher/`. `base/` and `adapter/` are there if the recipe keeps the adapter, `generated.jsonl` if the model wrote the
text, `latency.json` and `trials/` if the target needs them, `tracker/` if figures go to TensorBoard. An interrupted run
goes on from `checkpoint/`. Files appear whole or not at all. The main process writes; others walk as far as training.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.aim import LATENCY_FILE, Aim
from regrow.analysis.stage import analyse, conditions_of, known_sensitivity
from regrow.checkpoint.biases import check_biases
from regrow.checkpoint.files import write_json, write_text
from regrow.checkpoint.journal import Journal
from regrow.checkpoint.licence import licence_of
from regrow.checkpoint.load import check_vocabulary, load_skeleton, output_dtype, pick_device
from regrow.checkpoint.offer import allowed, check_offer
from regrow.checkpoint.offloaded import load
from regrow.checkpoint.originals import Originals
from regrow.checkpoint.save import save_checkpoint
from regrow.checkpoint.shape import describe
from regrow.checkpoint.state import State
from regrow.checkpoint.stock import prunable_groups
from regrow.checkpoint.stream import SCALING
from regrow.checkpoint.verify import Verification, merge, verify_checkpoint
from regrow.data.corpus import writes_own_text
from regrow.data.overlap import overlap
from regrow.evaluation.compare import compare, local_folder, protocol_windows
from regrow.evaluation.machine import environment, machine
from regrow.planning.allocation import check_reach
from regrow.planning.plan import Plan
from regrow.planning.sensitivity import Prior, Sensitivity
from regrow.planning.target import parse_target
from regrow.preflight import (
    check_disk,
    check_experts,
    check_files,
    check_memory,
    check_model,
    check_processes,
    check_settings,
)
from regrow.processes import ALONE, Processes
from regrow.progress import Progress
from regrow.recipe import Recipe, dump_recipe
from regrow.recovery.average import Average
from regrow.recovery.learner import attach
from regrow.recovery.mixing import calibration_batches
from regrow.recovery.outcome import FILES, Trained, read_trained
from regrow.recovery.preparation import anything
from regrow.recovery.pruner import CutEvent
from regrow.recovery.quantised_base import is_streamed, rebuild, settle_offload, settle_originals, settle_quantization
from regrow.recovery.self_text import OwnText, tokens_to_write, write_own_text
from regrow.recovery.tracking import tracking
from regrow.recovery.train import train
from regrow.report.card import model_card
from regrow.report.picture import to_svg
from regrow.report.sensitivity import draw_sensitivity
from regrow.results import Result, tell_results
from regrow.resume import DESCRIPTIONS, FILES_OF_A_RUN, Books, where
from regrow.reuse import keep_adapter, save_streamed, texts, write_reports
from regrow.structure.adapters import adapter_parameters, adapters_off
from regrow.structure.groups import Groups
from regrow.structure.offload import convert, let_go
from regrow.text import Text, read_text, training_tokens

OWN_TEXT_FILE = "generated.jsonl"


class Walk:
    """One walk. Stages are methods, in the order in which `walk` calls them."""

    def __init__(
        self, model: str, folder: Path, recipe: Recipe, progress: Progress, fresh: bool, argv: Sequence[str],
        processes: Processes, dense_file: Path | None = None
    ) -> None:  # fmt: skip
        self.name = model
        self.folder = folder
        self.recipe = recipe
        self.progress = progress
        self.fresh = fresh
        self.dense_file = dense_file
        self.together = self.processes = processes
        self.books = Books(folder, model, argv, progress, processes)
        self.journal = self.books.journal
        target = recipe.pruning.target
        self.aim = (
            None if target is None else Aim(parse_target(target), model, folder, progress, self.journal, processes)
        )
        self.own_text: OwnText | None = None

    def walk(self) -> Result | None:
        """Everything, start to end; the result, in the main process."""
        tokenizer = self.check()
        if self.books.is_finished(self.recipe):
            return Result.read(self.folder) if self.together.is_main else None
        if self.books.is_trained() and not self.part():
            return None
        check_files(self.name, self.recipe, self.processes)
        text = None
        if not writes_own_text(self.recipe.data):
            self.books.begin("read text")
            with self.processes.main_first():
                text = read_text(self.recipe, tokenizer)
        self.recipe = settle_originals(self.name, self.recipe, self.progress)
        self.books.begin("trace groups")
        skeleton = load_skeleton(self.name)
        whole = prunable_groups(skeleton)
        check_experts(self.recipe, whole)
        memory = check_memory(self.name, skeleton, whole, self.recipe, self.processes)
        self.books.begin("load model")
        model = self.load(tokenizer)
        notes = [*check_offer(model.config, whole, self.recipe.pruning), *allowed(whole, self.recipe.pruning), memory]
        if self.recipe.compensation.method == "bias":
            check_biases(model, whole)
        self.check_reach(model, whole)
        known = known_sensitivity(self.recipe, self.name, whole)
        self.books.begin("attach LoRA")
        self.attach(model, whole)
        self.claim(whole)
        is_new = self.processes.by_main(lambda: self.books.own_journal.latest() is None)
        if text is None:
            text = self.write_text(model, tokenizer)
        self.books.check_text(text)
        if is_new:
            with self.processes.main_first():
                check_disk(self.folder, model.config, self.recipe, len(text.corpus.train))
        for note in notes:
            self.progress.say(note)
        prior = self.analyse(model, text, known)
        model, trained = self.recover(model, tokenizer, whole, text, prior)
        if not self.part():
            return None
        let_go(model)
        verification = self.saved()
        if verification is None:
            self.books.begin("merge and save")
            streamed = is_streamed(self.name, self.recipe)
            if self.recipe.training.quantized:
                del model  # before the original takes its place
                model = self.attach(self.load(tokenizer, "disk" if streamed else "none"), whole)
                rebuild(model, trained.plan, trained.adapters)
            computed_in, losses = model.dtype, merge(model, text.probe)
            describe(model, whole, trained.groups)
            self.save(model, tokenizer, trained.plan, streamed)
            self.books.begin("verify in a fresh process")
            verification = self.verify(model, text, losses, computed_in)
        del model
        if self.recipe.output.keep_adapter and self.journal.read("keep-adapter") is None:
            self.books.begin("keep the adapter")
            kept = keep_adapter(self.name, self.folder, self.recipe, tokenizer, self.progress)
            self.journal.write("keep-adapter", State(), files=kept)
        results = self.evaluate(whole, trained, tokenizer, text, verification)
        return self.report(trained, results)

    def part(self) -> bool:
        """From here on the main process works by itself; whether this is it."""
        self.processes = ALONE
        self.books.part()
        self.journal = self.books.journal
        if self.aim is not None:
            self.aim.journal, self.aim.processes = self.journal, ALONE
        return self.together.is_main

    def check(self) -> PreTrainedTokenizerBase:
        """Fail early by whatever recipe, folder, config and tokenizer can tell; the tokenizer.

        Raises:
            InputError: if the run cannot work.
        """
        given = self.recipe
        with self.processes.main_first():
            recipe = self.recipe = settle_offload(settle_quantization(given, self.progress), self.progress)
            check_settings(recipe)
            check_processes(recipe, self.processes.count)
            tokenizer = check_model(self.name, recipe)
        self.books.look(given, self.fresh)
        return tokenizer

    def write_text(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Text:
        """Documents that the model writes itself, as windows."""
        recipe, tokens = self.recipe, tokens_to_write(self.recipe, training_tokens(self.recipe))
        self.progress.say("no text was given (--data): the model writes its own; text of your own is better")
        self.books.begin("write text", tokens)
        with adapters_off(model):
            work = partial(write_own_text, model, tokenizer, recipe.generate, tokens, recipe.seed, self.progress)
            by_main = partial(self.processes.by_main, lambda: asdict(work()))
            self.own_text = OwnText(**self.journal.once("write-text", by_main))
        lines = [json.dumps({recipe.data.text_field: document}) for document in self.own_text.documents]
        self.books.leave(self.folder / OWN_TEXT_FILE, "\n".join(lines) + "\n")
        return read_text(recipe, tokenizer, self.own_text.documents)

    def load(self, tokenizer: PreTrainedTokenizerBase, offload: str | None = None) -> PreTrainedModel:
        """The dense model as the recipe keeps it, or not quantised, offloaded as said; chance is the seed's again."""
        torch.manual_seed(self.recipe.seed)
        training, device = self.recipe.training, pick_device(self.recipe.device)
        kept = "none" if offload else training.quantization
        offload = offload or (training.offload_alone if self.processes is ALONE else training.offload)
        model = load(self.name, device, offload=offload, quantization=kept, processes=self.processes)
        check_vocabulary(model, tokenizer, self.name)
        return model

    def attach(self, model: PreTrainedModel, groups: Groups) -> PreTrainedModel:
        """Wrap the linears with LoRA, with the same factors in all processes; from here on each has its own chance."""
        attach(model, groups, self.recipe.lora)
        self.processes.begin_alike(adapter_parameters(model), self.recipe.seed)
        return model

    def check_reach(self, model: PreTrainedModel, groups: Groups) -> None:
        """Fail now, not after hours, if the target cannot be reached."""
        if self.aim is not None:
            dtype = output_dtype(self.name, self.recipe.output.dtype)
            self.recipe = self.aim.prepare(self.recipe, model, groups, dtype, machine(model.device))
            if not self.aim.is_settled:
                return
        check_reach(groups, self.recipe.pruning)

    def claim(self, groups: Groups) -> None:
        """Take the folder and write down what is about to happen."""
        self.books.claim(self.recipe)
        self.books.leave(self.folder / "recipe.yaml", dump_recipe(self.recipe))
        self.books.leave(self.folder / "groups.json", groups.to_json())
        if self.aim is not None and self.aim.latency is not None:
            self.books.leave(self.folder / LATENCY_FILE, self.aim.latency.to_json())

    def analyse(self, model: PreTrainedModel, text: Text, known: Sensitivity | None) -> Prior | None:
        """How sensitive each group is, if the recipe wants to know; leaves it as data and as a picture."""
        recipe, corpus = self.recipe, text.corpus
        if not recipe.analysis.enabled:
            return None
        self.books.begin("analyse")
        groups = prunable_groups(model)
        if known is None:
            held_out, scored_on = corpus.pretrain.held_out(recipe.analysis.windows), calibration_batches(corpus, recipe)
            conditions = conditions_of(local_folder(self.name), model.dtype, recipe, held_out, corpus.pretrain.train)
            measure = partial(analyse, model, groups, recipe, held_out, scored_on, conditions, self.progress)
            found = self.journal.once("analyse", lambda: measure(self.processes).to_json())
            known = Sensitivity.parse(json.dumps(found))
        prior = known.prior(recipe.analysis.protect)
        self.books.leave(self.folder / "sensitivity.json", known.to_json())
        self.books.leave(self.folder / "sensitivity.svg", to_svg(draw_sensitivity(known, prior.protected)))
        if self.aim is None or self.aim.is_settled:
            check_reach(groups, recipe.pruning, prior)
        return prior

    def recover(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, whole: Groups, text: Text, prior: Prior | None
    ) -> tuple[PreTrainedModel, Trained]:
        """Train to the sparsity asked for, or to the one that the target asks for.

        Returns:
            The cut and recovered model (for a perplexity not the one given, which then holds no weights).
        """
        self.books.begin("train")
        if self.aim is None:
            return model, self.train(model, text, self.recipe, self.folder, None, prior)
        model, trained, self.recipe = self.aim.recover(
            self.recipe,
            model,
            text.corpus,
            fresh=lambda: self.attach(self.load(tokenizer), whole),
            train_into=lambda each, recipe, folder, scores: self.train(each, text, recipe, folder, scores, prior),
            prior=prior,
        )
        self.books.leave(self.folder / "recipe.yaml", dump_recipe(self.recipe))
        return model, trained

    def train(
        self,
        model: PreTrainedModel,
        text: Text,
        recipe: Recipe,
        folder: Path,
        scores: Average | None,
        prior: Prior | None,
    ) -> Trained:
        """`[score → plan → cut → adapt]*`, then recovery; leaves scores, plan, history and adapters in `folder`."""
        journal = self.journal
        if folder != self.folder:
            journal = own = Journal(folder, self.progress.say, self.books.clock)
            if own.latest() is not None:
                self.progress.say(f"trial {folder.name}: resuming {where(own, recipe.training.steps)}")
        done = journal.read("trained")
        if done is not None:
            return read_trained(folder, model, done.values)
        self.journal.drop("save", "keep-adapter", "evaluate", "report")  # of a training whose files are damaged

        def record_cut(event: CutEvent) -> None:
            if gone := event.plan.removed_layers:
                self.progress.say(f"layers {', '.join(map(str, gone))} of {len(event.plan.layers)} removed")
            self.books.leave(folder / "scores.safetensors", tensors_to_bytes(event.scores))
            self.books.leave(folder / "plan.json", event.plan.to_json())

        with tracking(recipe, folder, self.processes.is_main) as track:
            groups = prunable_groups(model)
            trained = train(
                model, groups, recipe, text.corpus, self.progress, teacher_folder=folder / "teacher",
                on_cut=record_cut, on_validation=lambda seen: self.books.leave(folder / "history.json", vars(seen)),
                scores=scores, prior=prior, track=track, journal=journal, processes=self.processes,
                originals=Originals.wanted(self.name, recipe.training),
                allows=self.aim.allows(recipe, groups) if self.aim else anything,
            )  # fmt: skip
        scaling = {SCALING: repr(recipe.lora.alpha / recipe.lora.rank)}
        self.books.leave(folder / "adapters.safetensors", tensors_to_bytes(trained.adapters, scaling))
        journal.write("trained", State(trained.summary), files=[folder / file for file in FILES])
        journal.drop("score", "teach", "search", "train")
        return trained

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, streamed: bool) -> None:
        """The checkpoint, with its plan and card inside; streamed: tensor by tensor, from the original files."""
        dtype, output = output_dtype(self.name, self.recipe.output.dtype), self.recipe.output
        extras = texts(self.name, self.recipe, plan)
        if streamed:
            save_streamed(self.name, self.folder, output, tokenizer, extras, self.progress)
            convert(model, dtype)
        else:
            place, size = self.folder / "model", output.shard_size
            save_checkpoint(model, tokenizer, place, dtype=dtype, shard_size=size, extras=extras)

    def verify(
        self, model: PreTrainedModel, text: Text, losses: dict[str, float], computed_in: torch.dtype
    ) -> Verification:
        """Let a fresh process load what was saved; a checkpoint that was not seen to pass is not left behind.

        Args:
            losses: as `merge` gave them, of a model that was computed in a dtype then.
        """
        folder = self.folder / "model"
        try:
            verification = verify_checkpoint(model, folder, text.probe).after(losses, computed_in)
            verification.check(folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        # All but the card, which will tell of the results.
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "README.md"]
        self.journal.write("save", State(asdict(verification)), files=files)
        return verification

    def saved(self) -> Verification | None:
        """How the check went, if the checkpoint has been saved and is as it was then."""
        done = self.journal.read("save")
        return None if done is None else Verification(**done.values)

    def evaluate(
        self, whole: Groups, trained: Trained, tokenizer: PreTrainedTokenizerBase, text: Text,
        verification: Verification
    ) -> dict[str, Any]:  # fmt: skip
        """Dense, cut and recovered, all measured alike."""
        self.books.begin("evaluate")
        plan = trained.plan
        device = pick_device(self.recipe.device)
        measured = self.journal.once(
            "evaluate",
            lambda: compare(
                self.name, str(self.folder / "model"), whole, plan, text.test_documents, text.test_source, tokenizer,
                self.recipe, device, self.progress, self.dense_file
            )
        )  # fmt: skip
        seen = overlap(
            text.corpus.train, protocol_windows(text.test_documents, tokenizer, text.test_source, self.recipe)[0]
        )
        self.books.begin("")
        results = tell_results(
            self.name, self.recipe, plan, measured={**measured, "overlap": asdict(seen)}, training=trained.summary,
            verification=verification.to_json(), seconds=self.books.clock.so_far(),
            machine=environment(device, self.books.took_part)
        )  # fmt: skip
        if self.own_text is not None:
            results["own_text"] = {**self.own_text.to_json(), "file": OWN_TEXT_FILE}
            results["own_text"]["evaluated_on_it"] = self.recipe.data.eval_source is None
        if self.aim is not None:
            results["target"] = self.aim.outcome(self.recipe, plan, results, self.folder / "model")
        return results

    def report(self, trained: Trained, results: dict[str, Any]) -> Result:
        """Leave the results in files a person can open."""
        write_json(self.folder / "results.json", results)
        write_reports(self.folder)
        card = model_card(self.name, self.recipe, trained.plan, licence_of(self.name), results)
        write_text(self.folder / "model" / "README.md", card)
        self.books.mark("finished", self.recipe)
        files = [self.folder / file for file in (*FILES_OF_A_RUN, *DESCRIPTIONS)]
        self.journal.write("report", State(), files=[file for file in files if file.is_file()])
        return Result(self.folder, trained.plan, results)
