"""The walk: load → trace → attach LoRA and gates → analyse → [score → plan → cut → adapt]* → recover → merge → save →
verify → evaluate → report.

A run's folder holds `recipe.yaml`, `run.json` (what is being done), `groups.json`, `scores.safetensors`,
`history.json`, `adapters.safetensors`, `sensitivity.json` and its picture if there was an analysis, and the results:
`plan.json`, `model/`, `results.json`, `report.md`.
Every file appears whole or not at all.
"""

import json
import platform
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.analysis.stage import analyse, conditions_of, read_sensitivity
from regrow.checkpoint.files import RUN_FILE, check_folder, write_bytes, write_json, write_text
from regrow.checkpoint.load import (
    check_length,
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    stored_dtype,
)
from regrow.checkpoint.save import save_checkpoint
from regrow.checkpoint.shape import check_expressible, pruned_config
from regrow.checkpoint.verify import Verification, verify_checkpoint
from regrow.criteria.registry import find_criterion
from regrow.data.source import load_documents, split_documents
from regrow.data.tokens import Windows, make_windows
from regrow.errors import InputError
from regrow.evaluation.compare import compare, local_folder, protocol_windows
from regrow.planning.allocation import check_reach
from regrow.planning.plan import Plan
from regrow.planning.sensitivity import Prior, Sensitivity
from regrow.progress import Progress
from regrow.recipe import Recipe, dump_recipe
from regrow.recovery.pruner import CutEvent
from regrow.recovery.train import Trained, train
from regrow.report.markdown import model_card, write_report
from regrow.report.picture import to_svg
from regrow.report.sensitivity import draw_sensitivity
from regrow.structure.adapters import attach_lora, merge_lora
from regrow.structure.groups import Groups, find_groups

VALIDATION_AND_TEST = 2
CHARACTERS_PER_TOKEN = 12
"""More than any tokenizer's average: how much of an endless data set to read for a number of tokens."""


@dataclass(frozen=True)
class Text:
    """Windows for training, for the validation loss, and documents to evaluate on."""

    train: Windows
    validation: Windows
    test_documents: list[str]
    test_source: str


@dataclass(frozen=True)
class Result:
    """A finished run."""

    folder: Path
    plan: Plan
    results: dict[str, Any]
    """What `results.json` holds."""

    @property
    def model(self) -> Path:
        """The checkpoint's folder."""
        return self.folder / "model"


class Walk:
    """One walk. Stages are methods, in the order in which `walk` calls them."""

    def __init__(self, model: str, folder: Path, recipe: Recipe, progress: Progress) -> None:
        self.name = model
        self.folder = folder
        self.recipe = recipe
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()
        self._stage = ("", self._started)

    def walk(self) -> Result:
        """Everything, start to end."""
        recipe = self.recipe
        find_criterion(recipe.pruning.criterion)
        if recipe.analysis.enabled:
            find_criterion(recipe.analysis.criterion)
        elif recipe.pruning.allocation == "curves":
            raise InputError("pruning.allocation=curves needs measured curves: set analysis.enabled=true too")
        if recipe.data.source is None:
            raise InputError("no text to train on: give --data FILE (.txt, .jsonl, .json, .parquet) or a hub data set")
        if Path(self.name).resolve() == (self.folder / "model").resolve():
            raise InputError(f"{self.name} is where the result would go; choose another --out")
        if check_folder(self.folder):
            self.progress.say(f"{self.folder} holds an earlier run; doing it afresh")
        config = load_config(self.name)
        check_expressible(config)
        for length in (recipe.data.sequence_length, *recipe.evaluation.windows):
            check_length(config, length)
        tokenizer = load_tokenizer(self.name)

        self.begin("read text")
        text = self.read_text(tokenizer)
        self.begin("load model")
        torch.manual_seed(recipe.seed)
        device = pick_device(recipe.device)
        model = load_model(self.name, device)
        check_vocabulary(model, tokenizer, self.name)
        self.begin("trace groups")
        whole = find_groups(model)
        check_reach(whole, recipe.pruning)
        known = self.known_sensitivity(whole)
        self.begin("attach LoRA")
        lora = recipe.lora
        attach_lora(model, whole.linears, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)
        self.claim(whole)
        prior = self.analyse(model, text, known)
        trained = self.train(model, text, prior)
        self.begin("merge and save")
        merge_lora(model)
        model.config = pruned_config(model.config, whole, trained.groups)
        self.save(model, tokenizer, trained.plan)
        self.begin("verify in a fresh process")
        verification = self.verify(model, text)
        del model
        results = self.evaluate(trained, tokenizer, text, verification)
        return self.report(trained, results)

    def begin(self, stage: str, total: int | None = None) -> None:
        """Close the books of the stage before, open the next."""
        now = time.perf_counter()
        name, since = self._stage
        if name:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + now - since, 3)
        self._stage = (stage, now)
        if stage:
            self.progress.stage(stage, total)

    def read_text(self, tokenizer: PreTrainedTokenizerBase) -> Text:
        """Documents, parted once by the seed, as windows."""
        data, training = self.recipe.data, self.recipe.training
        assert data.source is not None
        use = (training.steps * training.accumulate + self.recipe.pruning.calibration_batches) * training.batch_size
        limit = data.max_tokens or (use + 1) * data.sequence_length
        documents = load_documents(data.source, data.text_field, max_characters=CHARACTERS_PER_TOKEN * limit)
        if data.eval_source is not None:
            validation, train = split_documents(documents, [data.held_out], self.recipe.seed)
            test, source = load_documents(data.eval_source, data.text_field, split="test"), data.eval_source
        else:
            shares = [data.held_out] * VALIDATION_AND_TEST
            validation, test, train = split_documents(documents, shares, self.recipe.seed)
            source = f"{data.source} (held-out documents)"
        protocol_windows(test, tokenizer, source, self.recipe)  # too short a text is better found now than at the end
        length, bos = data.sequence_length, data.bos
        return Text(
            make_windows(train, tokenizer, length, bos=bos, source=data.source, max_tokens=limit),
            make_windows(validation, tokenizer, length, bos=bos, source=f"{data.source} (held out)").first(
                training.eval_windows
            ),
            test,
            source,
        )

    def known_sensitivity(self, groups: Groups) -> Sensitivity | None:
        """The analysis that the recipe names, if it does."""
        file = self.recipe.analysis.from_file
        if file is None or not self.recipe.analysis.enabled:
            return None
        return read_sensitivity(Path(file), local_folder(self.name), groups)

    def claim(self, groups: Groups) -> None:
        """Take the folder and write down what is about to happen."""
        write_json(
            self.folder / RUN_FILE,
            {"state": "running", "model": self.name, "recipe": self.recipe.name, "regrow": version("regrow")},
        )
        write_text(self.folder / "recipe.yaml", dump_recipe(self.recipe))
        write_json(self.folder / "groups.json", groups.to_json())

    def analyse(self, model: PreTrainedModel, text: Text, known: Sensitivity | None) -> Prior | None:
        """How sensitive each group is, if the recipe wants to know; leaves it as data and as a picture."""
        recipe = self.recipe
        if not recipe.analysis.enabled:
            return None
        self.begin("analyse")
        groups = find_groups(model)
        if known is None:
            held_out = text.validation.first(recipe.analysis.windows)
            conditions = conditions_of(local_folder(self.name), model.dtype, recipe, held_out, text.train)
            known = analyse(model, groups, recipe, held_out, text.train, conditions, self.progress)
        prior = known.prior(recipe.analysis.protect)
        write_json(self.folder / "sensitivity.json", known.to_json())
        write_text(self.folder / "sensitivity.svg", to_svg(draw_sensitivity(known, prior.protected)))
        check_reach(groups, recipe.pruning, prior)
        return prior

    def train(self, model: PreTrainedModel, text: Text, prior: Prior | None) -> Trained:
        """`[score → plan → cut → adapt]*`, then recovery; leaves scores, plan, history and adapters."""
        self.begin("train")
        trained = train(
            model,
            find_groups(model),
            self.recipe,
            text.train,
            text.validation,
            self.progress,
            on_cut=self.record_cut,
            on_validation=lambda history: write_json(self.folder / "history.json", vars(history)),
            prior=prior,
        )
        write_bytes(self.folder / "adapters.safetensors", tensors_to_bytes(trained.adapters))
        return trained

    def record_cut(self, event: CutEvent) -> None:
        """Write down an event's plan and scores."""
        write_bytes(self.folder / "scores.safetensors", tensors_to_bytes(event.scores))
        write_json(self.folder / "plan.json", event.plan.to_json())

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> None:
        """The checkpoint, with its plan and card inside."""
        save_checkpoint(
            model,
            tokenizer,
            self.folder / "model",
            dtype=self.output_dtype(),
            shard_size=self.recipe.output.shard_size,
            extras={
                "README.md": model_card(self.name, self.recipe, plan),
                "plan.json": json.dumps(plan.to_json(), indent=2) + "\n",
            },
        )

    def verify(self, model: PreTrainedModel, text: Text) -> Verification:
        """Let a fresh process load what was saved; a checkpoint that fails is not left behind."""
        folder = self.folder / "model"
        try:
            verification = verify_checkpoint(model, folder, text.validation.ids_NT[:2, :128])
            if not verification.passed:
                raise InputError(
                    f"the saved checkpoint does not compute what the model in memory does: logits differ by "
                    f"{verification.difference:.3g}, allowed {verification.allowed:.3g}"
                )
        except InputError:
            shutil.rmtree(folder)
            raise
        return verification

    def output_dtype(self) -> torch.dtype:
        """What the checkpoint is stored in."""
        wanted = self.recipe.output.dtype
        dtype = stored_dtype(self.name) if wanted == "auto" else getattr(torch, wanted)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def evaluate(
        self, trained: Trained, tokenizer: PreTrainedTokenizerBase, text: Text, verification: Verification
    ) -> dict[str, Any]:
        """Dense, cut and recovered, all measured alike."""
        self.begin("evaluate")
        plan = trained.plan
        device = pick_device(self.recipe.device)
        measured = compare(
            self.name, str(self.folder / "model"), plan, text.test_documents, text.test_source, tokenizer,
            self.recipe, device, self.progress,
        )  # fmt: skip
        self.begin("")
        return {
            "regrow": version("regrow"),
            "model": self.name,
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "sparsity": {"requested": self.recipe.pruning.sparsity, "basis": self.recipe.pruning.basis}
            | plan.sparsity.model_dump(),
            "widths": {name: len(group.keep) for name, group in plan.groups.items()},
            **measured,
            "training": trained.summary,
            "verification": verification.to_json(),
            "seconds": {**self.seconds, "total": round(time.perf_counter() - self._started, 3)},
            "machine": machine(device),
        }

    def report(self, trained: Trained, results: dict[str, Any]) -> Result:
        """Leave the results in files a person can open."""
        write_json(self.folder / "results.json", results)
        text = write_report(results, trained.history.cuts, trained.history.validations)
        write_text(self.folder / "report.md", text)
        write_text(self.folder / "model" / "README.md", model_card(self.name, self.recipe, trained.plan, results))
        write_json(
            self.folder / RUN_FILE,
            {"state": "finished", "model": self.name, "recipe": self.recipe.name, "regrow": version("regrow")},
        )
        return Result(self.folder, trained.plan, results)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
