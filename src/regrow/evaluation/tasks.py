"""Zero-shot tasks, by lm-evaluation-harness: its own by name, one in a YAML file, or records in a JSONL file."""

import difflib
import functools
import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.checkpoint.files import sha256_of
from regrow.data.source import load_records
from regrow.errors import InputError
from regrow.evaluation.perplexity import evaluation_mode

SHORT_NAMES = {"arc-e": "arc_easy", "arc-c": "arc_challenge", "obqa": "openbookqa"}
"""As papers write them -> as the harness does."""

ACCURACY = ("acc", "acc_norm")
FORMS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metrics": ACCURACY,
    },
    ("ctx", "endings", "label"): {
        "output_type": "multiple_choice",
        "doc_to_text": "ctx",
        "doc_to_choice": "endings",
        "doc_to_target": lambda record: int(record["label"]),
        "metrics": ACCURACY,
    },
    # The contexts differ and the ending is the same: what the harness takes from `doc_to_text` is the answer's number.
    ("context_options", "continuation", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": lambda record: record["gold"],
        "doc_to_choice": lambda record: record["context_options"],
        "doc_to_target": lambda record: record["continuation"],
        "metrics": ("acc",),
    },
    ("context", "continuation"): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation.strip()}}",
        "target_delimiter": "",
        "metrics": ("acc",),
    },
}
"""Fields of a JSONL file's records -> what the harness is told to do with them."""
CHOICES, ANSWER = ("choices", "endings", "context_options"), ("gold", "label")
"""Fields that hold several texts, and those that hold the number of one of these; all others hold a text."""


@dataclass(frozen=True)
class TaskScore:
    """What a model scores on a task."""

    metric: str
    """`acc_norm` (the log-likelihood divided by the ending's length) where the task has it, else `acc`, else its
    first."""
    value: float
    standard_error: float | None
    items: int


def check_tasks(tasks: Sequence[str]) -> None:
    """See that the harness is there, and files of tasks too, before any work is done.

    Raises:
        InputError: if the extra is not installed, a file is missing or of no known form, or two tasks have one name.
    """
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need lm-evaluation-harness; pip install 'regrow[eval]'")
    names = [_name(_settle(task)) for task in tasks]
    if len(set(names)) < len(names):
        raise InputError(f"two of the tasks have the same name: {', '.join(names)}; rename a file")


def check_known(tasks: Sequence[str]) -> None:
    """See that the harness knows tasks by their names and takes those in files; it takes a while to look for names.

    Raises:
        InputError: if it does not.
    """
    for task in tasks:
        if _is_file(task):
            with _harness_errors(task):
                _load(task)
            continue
        name, known = str(_settle(task)), _own_tasks()
        if name in known.all_subtasks:
            continue
        if name in known.all_tasks:
            raise InputError(f"{name!r} is a group of lm-evaluation-harness' tasks; name those of it that you want")
        close = difflib.get_close_matches(name, known.all_subtasks, n=3)
        advice = f"did you mean {' or '.join(close)}?" if close else "lm_eval ls tasks lists them"
        raise InputError(f"lm-evaluation-harness has no task {name!r}: {advice}")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, TaskScore]:
    """Zero-shot scores by the task's own name (a .jsonl file's is the file's, without suffix).

    Args:
        tasks: names that the harness knows (`boolq`, `piqa`, `hellaswag`, `winogrande`, `arc-e`, `arc-c`,
            `openbookqa`), a task's .yaml file, or a .jsonl file whose records have one of the forms in `FORMS`.
        limit: use the first so many items of each.

    Raises:
        InputError: if a task is not known or cannot be loaded.
    """
    check_tasks(tasks)
    check_known(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with _harness_errors(*tasks), evaluation_mode(model), torch.inference_mode():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            wrapped,
            tasks=[_load(task) for task in tasks],
            limit=limit,
            bootstrap_iters=1000,
            task_manager=TaskManager(include_defaults=False),
            log_samples=False,
        )
    assert found is not None
    names = [_name(_settle(task)) for task in tasks]
    return {name: _score(found["results"][name], found["n-samples"][name]["effective"]) for name in names}


@contextmanager
def _harness_errors(*tasks: str) -> Iterator[None]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the harness and the hub raise whatever comes
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"the tasks {', '.join(tasks)} cannot be run: {type(error).__name__}: {reason}; mend evaluation.tasks, or "
            "leave them out"
        ) from error


@functools.cache
def _own_tasks() -> Any:
    """The harness' own tasks: thousands of files that it looks through."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def _load(task: str) -> Any:
    """A task as the harness runs it, with its data."""
    from lm_eval.tasks import TaskManager

    if _is_file(task):
        manager = TaskManager(include_path=str(Path(task).parent) if _is_yaml(task) else None, include_defaults=False)
    else:
        manager = _own_tasks()
    settled = _settle(task)
    return manager.load([settled])["tasks"][_name(settled)]


def task_fingerprint(task: str) -> str:
    """A task's name; of a file, its own and a hash of its bytes and those of all files that a YAML file names in turn.

    Names with blanks in them are passed over, and folders other than those that its data are said to lie in.
    """
    files = task_files(task)
    if not files:
        return task
    hashes = "".join(map(sha256_of, files))
    return f"{files[0].name} {hashlib.sha256(hashes.encode()).hexdigest()}"


def task_files(task: str) -> list[Path]:
    """A task's file and all that a YAML file names in turn; none if it is the harness' own."""
    files = [Path(os.path.abspath(task))] if _is_file(task) else []
    for file in files:  # grows as it goes
        if _is_yaml(str(file)):
            files += [named for named in _named_in(file) if named not in files]
    return files


def _named_in(file: Path) -> list[Path]:
    """Files that a YAML file names: data, other YAML files, modules of its functions (`!function utils.read`)."""
    text = file.read_text(encoding="utf-8", errors="replace")
    words = re.findall(r"[^\s\"'#,\[\]{}]+", text)
    beside = (file.parent / name for word in words for name in (word, f"{word.partition('.')[0]}.py"))
    folders = re.findall(r"\b(?:dataset_path|data_dir):\s*[\"']?([^\s\"'#,}]+)", text)
    inside = (each for name in folders if os.path.isdir(name) for each in sorted(Path(name).rglob("*")))
    places = (os.path.abspath(place) for place in (*beside, *words, *inside))
    return [Path(place) for place in dict.fromkeys(places) if os.path.isfile(place)]


def _is_yaml(task: str) -> bool:
    return Path(task).suffix == ".yaml"


def _is_file(task: str) -> bool:
    return _is_yaml(task) or Path(task).suffix == ".jsonl"


def _settle(task: str) -> str | dict[str, Any]:
    """A task as the harness takes it: a name, or a description."""
    path = Path(task)
    if path.suffix == ".yml":
        raise InputError(f"{task}: the harness looks for .yaml files only; rename it")
    if not _is_file(task):
        return SHORT_NAMES.get(task, task)
    if not path.is_file():
        raise InputError(f"there is no task file {task}; check its path")
    if path.suffix != ".jsonl":
        return _name_of(path)
    records = load_records(task)
    form = next((fields for fields in FORMS if set(fields) <= set(records[0])), None)
    if form is None:
        known = "; ".join(", ".join(fields) for fields in FORMS)
        raise InputError(f"{task}: its records have the fields {', '.join(records[0])}; a task's have {known}")
    for number, record in enumerate(records, 1):
        if wrong := _wrong_in(record, form):
            raise InputError(f"{task}: record {number} {wrong}; mend it or take it out")
    told = dict(FORMS[form])
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in told.pop("metrics")]
    return {
        "task": path.stem,
        "custom_dataset": lambda **_: {"test": _as_dataset(records)},
        "test_split": "test",
        "metric_list": metrics,
        **told,
    }


def _wrong_in(record: dict[str, Any], form: Sequence[str]) -> str | None:
    """What keeps a record from being of a form, in words."""
    if missing := [field for field in form if record.get(field) is None]:
        return f"has no {missing[0]}"
    choices: list[str] = next((record[field] for field in form if field in CHOICES), [])
    for field in form:
        value = record[field]
        if field in CHOICES:
            if not (isinstance(value, list) and value and all(isinstance(each, str) for each in value)):
                return f"has {field} that are no list of texts"
        elif field in ANSWER:
            number = str(value)  # HellaSwag has its labels as text
            if not (isinstance(value, int) or field == "label") or not re.fullmatch("[0-9]+", number):
                return f"has the {field} {value!r}, which is no number of a choice"
            if int(number) >= len(choices):
                return f"has the {field} {value!r} of {len(choices)} choices, counted from 0"
        elif not isinstance(value, str):
            return f"has a {field} that is no text"
    return None


def _name(settled: str | dict[str, Any]) -> str:
    return settled if isinstance(settled, str) else str(settled["task"])


def _name_of(file: Path) -> str:
    """The task that a YAML file describes; read as text, since only the harness knows the file's own tags."""
    found = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    if found is None:
        raise InputError(f"{file} names no task; it needs a line such as task: my_task")
    return found[1]


def _as_dataset(records: Sequence[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(list(records))


def _score(found: dict[str, Any], items: int) -> TaskScore:
    values = {key.partition(",")[0]: value for key, value in found.items() if "," in key}
    metrics = [name for name in values if not name.endswith("_stderr")]
    metric = next((name for name in ("acc_norm", "acc") if name in values), metrics[0])
    error = values.get(f"{metric}_stderr")
    return TaskScore(metric, float(values[metric]), float(error) if isinstance(error, float) else None, items)
