"""What a run's folder says of the run: what it was asked for, and whether that is what is asked for now.

`run.json` marks the folder and holds the request; what is done of it stands in the journal (`checkpoint/journal.py`).
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regrow.checkpoint.files import RUN_FILE, check_folder, sha256_of, sweep, write_bytes, write_json
from regrow.checkpoint.fingerprint import checkpoint_sha256, folder_sha256
from regrow.checkpoint.journal import FORMAT, Forgetful, Journal
from regrow.checkpoint.load import pick_device, weights_folder
from regrow.checkpoint.shared import shared
from regrow.clock import Clock
from regrow.errors import InputError
from regrow.evaluation.tasks import task_files, task_fingerprint
from regrow.planning.target import parse_bytes, parse_target
from regrow.processes import ALONE, Processes
from regrow.progress import Progress, Silent
from regrow.recipe import Recipe
from regrow.recovery.tracking import FOLDER as TRACKER_FOLDER
from regrow.text import Text

TEXTS = ("source", "eval_source", "instructions")
FILES_NAMED = (*TEXTS, "from_file", "criterion")
"""Settings that may name a file (a text also a folder): what is in it counts, not where it lies."""
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "*.jinja", "vocab.*", "merges.txt", "added_tokens.json")
"""Its files in a model's folder."""
TASKS = "evaluation.tasks"
"""May change until the result is measured: what is wrong with one is perhaps seen only then."""
WAY_OUT = "give a new --out, or --fresh to do it again from the start"
OF_A_RUN = ("checkpoint", "trials", "teacher", "base", "adapter", TRACKER_FOLDER)
"""Folders that a run done from the start finds empty. Its model is replaced when there is a new one."""
FILES_OF_A_RUN = (
    "results.json", "report.md", "report.html", "plan.json", "scores.safetensors", "adapters.safetensors",
    "history.json", "sensitivity.json", "sensitivity.svg",
)  # fmt: skip
"""Files that it does not find, the first to go being what says that a run is finished: none shall tell of another."""
DESCRIPTIONS = ("recipe.yaml", "groups.json")
"""Files that a run writes anew whenever it goes on."""


def describe_request(model: str, recipe: Recipe) -> dict[str, Any]:
    """`key.path` -> value of all that a run depends on. Model and files are told by hashes of what they hold."""
    target, shard_size = recipe.pruning.target, recipe.output.shard_size
    return {
        "model": checkpoint_sha256(weights_folder(model)),
        **{path: _content(value, key in TEXTS) if key in FILES_NAMED else value for path, key, value in _flat(recipe)},
        "pruning.target": None if target is None else parse_target(target).plain,
        "output.shard_size": f"{parse_bytes(shard_size)}B",
        **{f"evaluation.tasks.{n}": task_fingerprint(task) for n, task in enumerate(recipe.evaluation.tasks)},
        "tokenizer": folder_sha256(Path(model), TOKENIZER) if Path(model).is_dir() else "",
        "device": pick_device(recipe.device).type,
        "regrow": version("regrow"),
    }


def check_spared(folder: Path, model: str, recipe: Recipe, file: str, fresh: bool) -> None:
    """Refuse to make a run of what it would delete, or put its result in the place of.

    Args:
        folder: the run's.
        file: the recipe's; a name if it has none.
        fresh: whether what an earlier run has left goes.

    Raises:
        InputError: if the model, or a file that is given or named in the recipe, lies there, perhaps by a link.
    """
    tasks = [str(path) for task in recipe.evaluation.tasks for path in task_files(task)]
    named = [str(value) for _, key, value in _flat(recipe) if key in FILES_NAMED and value is not None]
    places = ("model", *(OF_A_RUN + FILES_OF_A_RUN if fresh else ()))
    going = {(folder / place).resolve(): folder / place for place in places}
    for name in (model, file, *named, *tasks):
        path = next((path for path, _ in _paths(name) if path.exists()), None)
        if path is None:
            continue
        parts = (path, *path.iterdir()) if path.is_dir() else (path,)
        # A link that lies in a folder that goes is lost as well, wherever it leads.
        steps = {step for part in parts for end in (part.absolute(), part.resolve()) for step in (end, *end.parents)}
        if lost := next(iter({step.resolve() for step in steps} & going.keys()), None):
            raise InputError(f"{name}: this run would replace or delete {going[lost]}; choose another --out")


def told_difference(before: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The first key in which an earlier request is another than this one, in words; empty if none is."""
    key = next((key for key in {**asked, **before} if asked.get(key) != before.get(key)), None)
    if key is None:
        return ""
    values = [each.get(key) for each in (before, asked)]
    if key in ("model", "tokenizer") or any(str(value).startswith("sha256 ") for value in values):
        return f"of another {key}"
    return f"with {key} = {values[0]!r}, not {values[1]!r}"


def open_run(folder: Path, asked: Mapping[str, Any], fresh: bool) -> bool:
    """Look into a folder before any work is done for it, without touching it.

    Returns:
        Whether there is a run to go on with, perhaps with other tasks, or to find finished.

    Raises:
        InputError: if the folder cannot be a run's, or holds a run that another version of regrow has begun, or that
            was asked for something else.
    """
    if not check_folder(folder) or fresh:
        return False
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        before, began = run["asked"], (run["asked"]["regrow"], run.get("format"))
        difference = told_difference(before, asked)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder / RUN_FILE} is damaged or of an older regrow; {WAY_OUT}") from error
    if began != (asked["regrow"], FORMAT):
        raise InputError(f"{folder} holds a run that another version of regrow has begun; {WAY_OUT}")
    if difference and _is_saved(folder):  # with other tasks it still goes on
        difference = told_difference(*(_without_tasks(each) for each in (before, asked)))
    if difference:
        raise InputError(f"{folder} holds a run {difference}; {WAY_OUT}")
    return True


def _without_tasks(request: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if not key.startswith(TASKS)}


def _is_saved(folder: Path) -> bool:
    """Whether a run has its checkpoint, and nothing has been measured of it yet."""
    latest = Journal(folder, Silent().say).latest()
    return latest is not None and latest[0] in ("save", "keep-adapter")


class Books:
    """What a run writes down of itself: what it was asked for, how far it is, and how long each stage has taken."""

    def __init__(self, folder: Path, model: str, argv: Sequence[str], progress: Progress, processes: Processes) -> None:
        """Open them; nothing is read or written yet.

        Args:
            argv: the command line that asked for the run, without the program's name; perhaps none.
            processes: those that do the run; the main one keeps the books for all.
        """
        self.processes = processes
        self.took_part = processes.count
        """The most processes that have worked at the run."""
        self.folder = folder
        self.model = model
        self.argv = list(argv)
        self.progress = progress
        self.clock = Clock()
        self.own_journal = Journal(folder, progress.say, self.clock)
        self.journal: Forgetful = shared(self.own_journal, processes)
        """What all processes go by."""
        self.goes_on = False
        """Whether the folder holds a part of this run."""
        self._asked: dict[str, Any] = {}

    def look(self, recipe: Recipe, fresh: bool) -> None:
        """See what is in the folder; without `fresh` a run of the same request goes on.

        Raises:
            InputError: if the folder cannot be a run's, or holds a run that was asked for something else.
        """
        self._asked = describe_request(self.model, recipe)
        self._check_others(self.processes.same(self._asked))
        self.goes_on = self.processes.by_main(lambda: open_run(self.folder, self._asked, fresh))

    def _check_others(self, asked: Mapping[str, Any]) -> None:
        """Refuse to do another run than the main process does."""
        own = json.loads(json.dumps(self._asked))
        difference = next((key for key in {**asked, **own} if asked.get(key) != own.get(key)), None)
        if difference is not None:
            values = ", the main one ".join(repr(each.get(difference)) for each in (own, asked))
            raise InputError(f"process {self.processes.rank} has {difference} = {values}; all need the same")

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether the folder holds the result whole. If it holds a part of the way there, that is said."""
        return self.goes_on and self.processes.by_main(lambda: self._is_finished(recipe))

    def _is_finished(self, recipe: Recipe) -> bool:
        journal, steps = self.own_journal, recipe.training.steps
        adapter = ["keep-adapter"] if recipe.output.keep_adapter else []
        if all([journal.read(stage) is not None for stage in ("report", "save", *adapter)]):
            self.progress.say(f"{self.folder} holds this run, finished; --fresh does it again")
            return True
        if not os.access(self.folder, os.W_OK):
            raise InputError(f"{self.folder} holds a run to go on with and cannot be written; copy it to where it can")
        self.progress.say(f"resuming {where(journal, steps)}")
        before = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8")).get("processes", 1)
        self.took_part = max(before, self.took_part)
        if before != self.processes.count:
            self.progress.say(
                f"begun with {before} processes, goes on with {self.processes.count}; alike but for rounding, dropout"
            )
        self.clock.go_on(journal.seconds_before())
        return False

    def is_trained(self) -> bool:
        """Whether several processes go on with a run of which only the main one's part is left."""
        return self.processes.count > 1 and self.goes_on and self.journal.read("trained") is not None

    def part(self) -> None:
        """From here on the main process keeps the books for itself."""
        self.processes, self.journal = ALONE, self.own_journal

    def claim(self, recipe: Recipe) -> None:
        """Take the folder: for a run that goes on as it is, else without what an earlier run has left."""
        if not self.processes.is_main:
            return
        if not self.goes_on:
            for left_over in OF_A_RUN:
                shutil.rmtree(self.folder / left_over, ignore_errors=True)
            for file in FILES_OF_A_RUN:
                (self.folder / file).unlink(missing_ok=True)
        self.mark("running", recipe)
        sweep(self.folder)

    def mark(self, state: str, recipe: Recipe) -> None:
        """Write down what is being done, or has been: `run.json`."""
        run = {"state": state, "model": self.model, "recipe": recipe.name, "regrow": version("regrow")}
        several = {"processes": self.took_part} if self.took_part > 1 else {}
        request = {"format": FORMAT, "argv": self.argv, "asked": self._asked}
        write_json(self.folder / RUN_FILE, {**run, **several, **request})

    def leave(self, file: Path, content: str | bytes | dict[str, Any]) -> None:
        """Write a file of the run, once for all processes: text, bytes, or JSON."""
        if not self.processes.is_main:
            return
        if isinstance(content, dict):
            write_json(file, content)
        else:
            write_bytes(file, content.encode() if isinstance(content, str) else content)

    def begin(self, stage: str, total: int | None = None) -> None:
        """Close the account of the stage before, open the next."""
        self.clock.begin(stage)
        if stage:
            self.progress.stage(stage, total)

    def check_text(self, text: Text) -> None:
        """Refuse to go on with another text than was begun with.

        Raises:
            InputError: if it is another.
        """
        present = [part.sha256 for source in text.corpus.sources for part in (source.train, source.validation)]
        if self.journal.once("read-text", lambda: present) != present:
            raise InputError(f"the text is not what it was when {self.folder} was begun; {WAY_OUT}")


def where(journal: Journal, steps: int) -> str:
    """How far a run has come, in words."""
    latest = journal.latest()
    if latest is None:
        return "from the start"
    stage, step = latest
    return f"after stage {stage}" if step is None else f"at step {step} of {steps}; stage {stage}"


def _flat(recipe: Recipe) -> Iterator[tuple[str, str, Any]]:
    """`key.path`, its last key, and value of all that decides what a run does."""
    yield from _leaves(recipe.model_dump(mode="json", exclude={"name", "description"}), "")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in pairs:
            yield from _leaves(each, f"{path}.{key}" if path else str(key))
    else:
        yield path, path.rpartition(".")[2], value


def _paths(name: str) -> Iterator[tuple[Path, str]]:
    """What may be the path in a name, and what is left of it: `FILE.py:FUNCTION` names a file as well."""
    file, colon, function = name.rpartition(":")
    yield Path(name), ""
    if file:
        yield Path(file), colon + function


def _content(name: str | None, is_text: bool) -> str | None:
    if name is None:
        return None
    for path, rest in _paths(name):
        if path.is_file():
            return f"sha256 {sha256_of(path)}{rest}"
    if is_text and name and Path(name).is_dir():
        return f"sha256 {folder_sha256(Path(name))}"
    return name
