"""Zero-shot tasks, by lm-evaluation-harness: its own by name, one in a YAML file, or records in a JSONL file."""

import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Sequence
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
        InputError: if the extra is not installed, or a file is missing or of no known form.
    """
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need lm-evaluation-harness; pip install 'regrow[eval]'")
    for task in tasks:
        if _is_file(task):
            _settle(task)


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
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    settled = {task: _settle(task) for task in tasks}
    names = {task: told if isinstance(told, str) else told["task"] for task, told in settled.items()}
    if len(set(names.values())) < len(names):
        raise InputError(f"two of the tasks have the same name: {', '.join(names.values())}; rename a file")
    folders = sorted({str(Path(task).parent) for task in tasks if _is_yaml(task)})
    by_name = any(not _is_file(task) for task in tasks)  # the harness' own are thousands of files to look through
    try:
        manager = TaskManager(include_path=folders or None, include_defaults=by_name)
        with evaluation_mode(model), torch.inference_mode():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = simple_evaluate(
                wrapped,
                tasks=list(settled.values()),
                limit=limit,
                bootstrap_iters=1000,
                task_manager=manager,
                log_samples=False,
            )
    except InputError:
        raise
    except Exception as error:  # the harness and the hub raise whatever comes
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"the tasks {', '.join(tasks)} cannot be run: {type(error).__name__}: {reason}") from error
    assert found is not None
    return {name: _score(found["results"][name], found["n-samples"][name]["effective"]) for name in names.values()}


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
    return Path(task).suffix in (".yaml", ".yml")


def _is_file(task: str) -> bool:
    return _is_yaml(task) or Path(task).suffix == ".jsonl"


def _settle(task: str) -> str | dict[str, Any]:
    """A task as the harness takes it: a name, or a description."""
    path = Path(task)
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
    told = dict(FORMS[form])
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in told.pop("metrics")]
    return {
        "task": path.stem,
        "custom_dataset": lambda **_: {"test": _as_dataset(records)},
        "test_split": "test",
        "metric_list": metrics,
        **told,
    }


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
