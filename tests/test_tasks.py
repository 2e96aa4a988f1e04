"""Zero-shot tasks through lm-evaluation-harness, offline."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK
from transformers import AutoModelForCausalLM, AutoTokenizer

import regrow
from regrow.errors import InputError
from regrow.evaluation import tasks
from regrow.evaluation.tasks import check_known, check_tasks, run_tasks

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"query": "the cat", "choices": ["sat", "a much longer ending of it"], "gold": 0},
    {"query": "a dog", "choices": ["ran", "jumped over"], "gold": 1},
    {"query": "one two", "choices": ["three", "four"], "gold": 0},
]


def write(path: Path, records: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)


def log_likelihood(loaded, context: str, ending: str) -> float:
    """Of the ending's tokens, by hand."""
    model, tokenizer = loaded
    whole = tokenizer(f"{context} {ending}", add_special_tokens=False)["input_ids"]
    before = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(log_p[place - 1, whole[place]]) for place in range(before, len(whole)))


def test_each_form_of_record_is_scored(loaded, tmp_path: Path) -> None:
    forms = {
        "choices": QUESTIONS,
        "endings": [{"ctx": q["query"], "endings": q["choices"], "label": str(q["gold"])} for q in QUESTIONS],
        "contexts": [{"context_options": ["the cat", "a dog"], "continuation": "sat", "gold": n} for n in (0, 1)],
        "last-word": [{"context": "the cat", "continuation": "sat"}],
    }
    described = tmp_path / "own.yaml"
    described.write_text(
        f"task: own_task\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'choices.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: query\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    files = [write(tmp_path / f"{name}.jsonl", records) for name, records in forms.items()]
    found = run_tasks(*loaded, [*files, str(described)])
    assert {name: (score.metric, score.items) for name, score in found.items()} == {
        "choices": ("acc_norm", 3),
        "endings": ("acc_norm", 3),
        "contexts": ("acc", 2),
        "last-word": ("acc", 1),
        "own_task": ("acc", 3),
    }
    picked = [
        max((0, 1), key=lambda n: log_likelihood(loaded, q["query"], q["choices"][n]) / len(q["choices"][n]))
        for q in QUESTIONS
    ]
    right = sum(choice == q["gold"] for choice, q in zip(picked, QUESTIONS, strict=True))
    assert found["choices"].value == found["endings"].value == pytest.approx(right / 3)
    assert found["contexts"].value == 0.5  # of two contexts for one ending, one is likelier whichever is right
    assert found["choices"].standard_error is not None


@pytest.mark.usefixtures("lean")
def test_a_run_scores_the_dense_and_the_pruned_model(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "questions.jsonl", QUESTIONS)
    overrides = {**QUICK, "evaluation.tasks": [file], "evaluation.task_limit": 2}
    result = regrow.prune(str(checkpoint), tmp_path / "out", "magnitude", data=str(text), steps=0, overrides=overrides)
    scores = result.results["tasks"]
    assert {kind: one["questions"]["items"] for kind, one in scores.items()} == {"dense": 2, "pruned": 2}
    assert "questions" in (result.folder / "report.md").read_text()
    write(tmp_path / "questions.jsonl", QUESTIONS[:2])
    with pytest.raises(InputError, match=r"holds a run with evaluation\.tasks\.0 = 'questions\.jsonl "):
        regrow.prune(str(checkpoint), tmp_path / "out", "magnitude", data=str(text), steps=0, overrides=overrides)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("odd.jsonl", '{"question": "x"}', "its records have the fields question; a task's have query, choices, gold"),
        ("odd.yaml", "output_type: multiple_choice", "names no task; it needs a line such as task: my_task"),
        ("odd.yml", "task: odd\ndataset_path: json\n", "looks for .yaml files only; rename it"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    file = tmp_path / name
    file.write_text(content + "\n")
    with pytest.raises(InputError, match=said):
        check_tasks([str(file)])


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"query": "x", "choices": ["a", "b"]}, "record 2 has no gold"),
        ({"query": None, "choices": ["a", "b"], "gold": 0}, "has no query"),
        ({"query": 7, "choices": ["a", "b"], "gold": 0}, "has a query that is no text"),
        ({"query": "x", "choices": [], "gold": 0}, "has choices that are no list of texts"),
        ({"query": "x", "choices": ["a", 2], "gold": 0}, "has choices that are no list of texts"),
        ({"query": "x", "choices": ["a", "b"], "gold": 2}, "has the gold 2 of 2 choices, counted from 0"),
        ({"query": "x", "choices": ["a", "b"], "gold": -1}, "has the gold -1, which is no number of a choice"),
    ],
)
def test_every_record_is_looked_at(tmp_path: Path, record: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_tasks([write(tmp_path / "own.jsonl", [QUESTIONS[0], record])])


def test_a_name_is_looked_up_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(all_subtasks=["piqa", "arc_easy"], all_tasks=["piqa", "arc_easy", "mmlu"])
    monkeypatch.setattr(tasks, "_own_tasks", lambda: known)
    check_known(["piqa", "arc-e"])
    with pytest.raises(InputError, match=r"has no task 'pika': did you mean piqa\?"):
        check_known(["piqa", "pika"])
    with pytest.raises(InputError, match="'mmlu' is a group of lm-evaluation-harness' tasks"):
        check_known(["mmlu"])


def test_a_described_task_is_loaded_before_any_work(tmp_path: Path) -> None:
    described = tmp_path / "own.yaml"
    described.write_text("task: own\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n")
    with pytest.raises(InputError, match=r"cannot be run: .*; mend evaluation\.tasks, or leave"):
        check_known([str(described)])


@pytest.mark.usefixtures("lean")
def test_a_saved_run_goes_on_with_other_tasks(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, **settings: object):
        overrides = {**QUICK, "evaluation.tasks": [write(tmp_path / name, QUESTIONS)], **settings}
        return regrow.prune(
            str(checkpoint), tmp_path / "out", "magnitude", data=str(text), steps=0, overrides=overrides
        )

    with monkeypatch.context() as patch:
        patch.setattr("regrow.evaluation.compare.run_tasks", raising)
        with pytest.raises(InputError, match="no connection"):
            run("first.jsonl")
    saved = (tmp_path / "out" / "model" / "model.safetensors").stat()
    with pytest.raises(InputError, match="holds a run with seed = 0, not 1"):
        run("second.jsonl", seed=1)
    assert "second" in run("second.jsonl").results["tasks"]["pruned"]
    assert (tmp_path / "out" / "model" / "model.safetensors").stat() == saved
    with pytest.raises(InputError, match=r"evaluation\.tasks\.0"):
        run("first.jsonl")


def raising(*_: object, **__: object) -> None:
    raise InputError("no connection")
