"""Interrupted at any moment and resumed: the same bytes as a run that nothing has stopped."""

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import typer
import zoo
from conftest import QUICK, CommandLine, build, with_lora
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import regrow
from regrow.checkpoint.files import storage_errors, write_json
from regrow.checkpoint.journal import FORMAT, Journal
from regrow.checkpoint.state import State
from regrow.clock import Clock
from regrow.console import given_up, going_on_later
from regrow.data.corpus import Corpus, Source
from regrow.data.tokens import Windows
from regrow.errors import InputError
from regrow.interrupt import Stopped
from regrow.progress import Silent
from regrow.recipe import Recipe, load_recipe
from regrow.recovery.learner import attach
from regrow.recovery.outcome import Trained
from regrow.recovery.pruner import CutEvent
from regrow.recovery.train import train
from regrow.resume import check_spared, describe_request
from regrow.reuse import report
from regrow.settings import Lora
from regrow.structure.groups import Groups

STEPS = 8
COMMON = {
    "training.steps": STEPS,
    "training.batch_size": 2,
    "training.eval_interval": 3,
    "training.learning_rate": 1e-2,
    "pruning.calibration_batches": 2,
    "lora.dropout": 0.1,
}
RECIPES = {
    "regrow": {
        "search.evaluations": 2, "search.windows": 2, "search.judge_windows": 2, "compensation.windows": 2,
        "pruning.decay_steps": 2,
    },
    "loraprune": {"pruning.interval": 2, "distillation.weight": 0.5, "compensation.method": "least-squares"},
    "lorashear": {
        "analysis.enabled": False, "pruning.allocation": "by-kind", "pruning.epsilon": 0.2, "pruning.periods": 2,
        "pruning.cool_down": 0.3, "recovery.interval": 2, "recovery.instruct_share": 0.5, "recovery.max_rounds": 1,
    },
    "llm-pruner": {
        "distillation.weight": 0.5, "distillation.teacher": "cached", "pruning.kinds": ["ffn", "expert", "layer"],
        "pruning.protect_first": 0.0, "pruning.protect_last": 0,
    },
    "magnitude": {"distillation.weight": 0.5, "distillation.teacher": "self", "training.checkpoint_interval": 2},
    "flap": {"compensation.windows": 2},
    "sheared-llama": {"pruning.cool_down": 0.3},
}  # fmt: skip
"""Recipe -> settings that, together, let everything that has a state have one."""
FAMILY = dict.fromkeys(RECIPES, "qwen2") | {"flap": "llama-mha-tied", "llm-pruner": "Mixtral"}
"""Biases and tied embeddings; without biases where the recipe adds some. And a mixture of experts."""


class Fault(Exception):
    """The power is gone."""


class Calling(Silent):
    """Progress that calls a function with the number of every training step taken, and remembers what is said."""

    def __init__(self, on_step: Callable[[int], None] = lambda step: None) -> None:
        self.on_step = on_step
        self.said: list[str] = []
        self.stages: list[str] = []
        self._taken = 0

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append(name)
        self._taken = 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._taken += steps
        if self.stages[-1] == "train" and note:
            self.on_step(self._taken - 1)

    def say(self, message: str) -> None:
        self.said.append(message)


def dense(family: str) -> PreTrainedModel:
    return zoo.build(family) if family in zoo.FAMILIES else build(family)


@cache
def known_groups(family: str) -> Groups:
    """Of a session's model, traced once."""
    return with_lora(dense(family), fill=False)


def windows(count: int, seed: int) -> Windows:
    ids_NT = torch.randint(0, 64, (count, 10), generator=torch.Generator().manual_seed(seed))
    return Windows(ids_NT, f"text {seed}", "none")


def corpus(name: str) -> Corpus:
    kinds = ("pretrain", "pretrain", "instruct") if name == "lorashear" else ("pretrain",)
    parts = [Source(f"s{n}", kind, 1.0 + n, windows(20, n), windows(3, 9 + n)) for n, kind in enumerate(kinds)]
    return Corpus(tuple(parts))


def session(name: str, folder: Path, on_step: Callable[[int], None] = lambda step: None) -> tuple[Trained, Calling]:
    """Train from what the folder's journal knows."""
    recipe: Recipe = load_recipe(name, {**COMMON, **RECIPES[name]})
    groups = known_groups(FAMILY[name])  # first, for it uses chance up
    model = dense(FAMILY[name])
    attach(model, groups, Lora(rank=3, alpha=6, dropout=recipe.lora.dropout))
    progress = Calling(on_step)
    events: list[CutEvent] = []
    with storage_errors():
        done = train(
            model, groups, recipe, corpus(name), progress, teacher_folder=folder / "teacher",
            on_cut=events.append, on_validation=lambda history: None, journal=Journal(folder, progress.say),
        )  # fmt: skip
    return done, progress


def assert_same(one: Trained, other: Trained) -> None:
    assert one.plan == other.plan
    assert one.adapters.keys() == other.adapters.keys()
    assert all(torch.equal(one.adapters[name], tensor) for name, tensor in other.adapters.items())
    assert one.history.validations == other.history.validations
    assert one.history.cuts == other.history.cuts
    assert one.history.mixture == other.history.mixture
    assert [step["loss"] for step in one.history.steps] == [step["loss"] for step in other.history.steps]


@pytest.fixture(scope="module")
def noted() -> dict[str, set[str]]:
    """By stage, the names under which all recipes' journals together have noted something."""
    return {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, noted: dict[str, set[str]]) -> dict[str, Trained]:
    """What every recipe comes to if nothing stops it."""
    write = Journal.write

    def noting(self: Journal, stage: str, state: State, step: int | None = None, files=()) -> None:
        names = {f"{part}.{name}" for part, held in state.values.items() if isinstance(held, dict) for name in held}
        names |= {re.sub(r"\d+", "N", "/".join(name.split("/")[:2])) for name in state.tensors}
        noted.setdefault(stage, set()).update(names)
        write(self, stage, state, step, files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "write", noting)
        return {name: session(name, tmp_path_factory.mktemp(name))[0] for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_faults(name: str, whole: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of sessions: one ends after every entry of the journal, others in the midst of an interval."""
    write, written, broken = Journal.write, [], {1, 4, 7}

    def write_and_fail(self: Journal, stage: str, state: State, step: int | None = None, files=()) -> None:
        write(self, stage, state, step, files)
        if (stage, step) not in written:
            written.append((stage, step))
            raise Fault

    def fail(step: int) -> None:
        if step in broken:
            broken.remove(step)
            raise Fault

    monkeypatch.setattr(Journal, "write", write_and_fail)
    for _ in range(20):
        try:
            done, progress = session(name, tmp_path, fail)
            break
        except Fault:
            pass
    assert_same(done, whole[name])
    assert not broken
    stages = [stage for stage, _ in written]
    assert stages[0] == "score"
    assert ("search" in stages, "teach" in stages) == (name == "regrow", name in ("regrow", "llm-pruner"))
    interval = 2 if name == "magnitude" else 3
    assert {step for stage, step in written if stage == "train"} >= {0, interval}
    assert progress.stages == ["train"], "nothing but the steps that were left was done again"
    kept = [path for path in (tmp_path / "checkpoint").iterdir() if "train" in path.name]
    assert len(kept) == 2
    assert not {path.suffix for path in (tmp_path / "checkpoint").rglob("*.*")} - {".json", ".safetensors"}


@pytest.mark.usefixtures("whole")
def test_another_layout_has_another_number(noted: dict[str, set[str]]) -> None:
    """Else a run begun before ends in a traceback instead of a line that says what to do."""
    learner = "learner.in_a_row learner.skipped learner.step learner/adapters "
    mix = "mix.dense mix.history mix.measured mix.stages "
    expected = {
        "score": learner + mix + "scorer.average scorer.kept scorer/average scorer/kept",
        "teach": "",
        "search": "found.counts found.report",
        "train": learner + mix + "best.loss best.step best.waited best/N learner/moments objective.bytes "
        "objective.kind objective.seconds objective.steps own.history own.original_from own.ready own.seconds "
        "pruner.masks pruner.own pruner.scorer pruner/masks pruner/own pruner/scorer",
    }
    assert (FORMAT, noted) == (6, {stage: set(names.split()) for stage, names in expected.items()})


def test_the_oracle_can_fail(whole: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run whose optimizer forgets its moments, as an example, is another run."""
    with pytest.raises(Fault):
        session("regrow", tmp_path, partial(fail_at, 4))
    under = State.under
    monkeypatch.setattr(State, "under", lambda self, name: {} if name == "moments" else under(self, name))
    done, _ = session("regrow", tmp_path)
    assert [v["loss"] for v in done.history.validations] != [v["loss"] for v in whole["regrow"].history.validations]


def fail_at(chosen: int, step: int) -> None:
    if step == chosen:
        raise Fault


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        (flip, "tensors.safetensors"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "values.json"),
        (lambda file: file.write_bytes(b""), "checksums.json"),
        (Path.unlink, "tensors.safetensors"),
    ],
    ids=["flipped", "truncated", "empty", "missing"],
)
def test_a_damaged_checkpoint(
    harm: Callable[[Path], None], file: str, whole: dict[str, Trained], tmp_path: Path
) -> None:
    with pytest.raises(Fault):
        session("regrow", tmp_path, partial(fail_at, 4))
    (newest,) = (tmp_path / "checkpoint").glob("*-train-000003")
    harm(newest / file)
    done, progress = session("regrow", tmp_path)
    (told,) = [line for line in progress.said if "damaged" in line]
    assert re.fullmatch(rf".*{newest.name}/{file} is damaged: .* the one before it counts", told)
    assert_same(done, whole["regrow"])


def test_a_full_disk(whole: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the second checkpoint: the first is left, and gone on from when there is room again."""

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(tensors, path)
        if "000003" in str(path):
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("regrow.checkpoint.journal.save_file", full)
        with pytest.raises(InputError, match=r"no space left to write .*; free some and run again"):
            session("regrow", tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert names == ["0001-score", "0002-teach", "0003-search", "0004-train-000000"]
    done, _ = session("regrow", tmp_path)
    assert_same(done, whole["regrow"])


@pytest.mark.parametrize(
    "error",
    [OSError("7488 requested and 24 written"), RuntimeError("No space left on device (os error 28)")],
    ids=["NumPy", "Rust"],
)
def test_a_full_disk_as_others_tell_it(error: Exception) -> None:
    with pytest.raises(InputError, match="no space left to write the results; free some"), storage_errors():
        raise error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(number: int, whole: dict[str, Trained], tmp_path: Path) -> None:
    former = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped before step 5 of 8"):
        session("llm-pruner", tmp_path, lambda step: os.kill(os.getpid(), number) if step == 4 else None)
    assert signal.getsignal(number) is former
    assert list((tmp_path / "checkpoint").glob("*-train-000005"))
    done, _ = session("llm-pruner", tmp_path)
    assert_same(done, whole["llm-pruner"])


def test_the_command_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/regrow", "prune", "my model", "--fresh", "--out", "o"])
    with pytest.raises(typer.Exit) as exit_, going_on_later():
        os.kill(os.getpid(), signal.SIGTERM)
    assert exit_.value.exit_code == 130
    assert capsys.readouterr().err == "regrow: stopped; to go on: regrow prune 'my model' --out o\n"


def test_a_measurement_that_is_stopped_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit_, given_up():
        os.kill(os.getpid(), signal.SIGINT)
    assert exit_.value.exit_code == 130
    assert capsys.readouterr().err == "regrow: stopped; nothing was written\n"


# --- the journal alone ---------------------------------------------------------------------------


def test_the_journal_keeps_what_it_is_given(tmp_path: Path) -> None:
    said: list[str] = []
    clock = Clock()
    clock.go_on({"train": 1.5})
    journal = Journal(tmp_path, said.append, clock)
    assert (journal.latest(), journal.read("x"), journal.seconds_before()) == (None, None, {})
    torch.manual_seed(3)
    inner = State({"pi": 0.1 + 0.2, "none": None}, {"a": torch.tensor([1.0, float("nan")]), "b/c": torch.tensor(True)})
    for step in (10, 20, 30):
        journal.write("x-y", State.of(inner=inner), step)
    expected = torch.rand(3)
    assert torch.equal(torch.rand(3), expected) is False
    (tmp_path / "plan.json").write_text("a plan")
    assert journal.once("found", lambda: [1, "two"]) == [1, "two"]
    journal.write("last", State(), files=[tmp_path / "plan.json"])

    again = Journal(tmp_path, said.append)
    assert again.once("found", lambda: pytest.fail("it is done")) == [1, "two"]
    assert again.latest() == ("last", None)
    assert again.seconds_before()["train"] == 1.5
    state = again.read("x-y")
    assert torch.equal(torch.rand(3), expected), "chance goes on from where it was"
    assert state.part("inner").values == inner.values
    assert torch.equal(state.part("inner").under("b")["c"], torch.tensor(True))
    assert torch.equal(state.part("inner").tensors["a"], inner.tensors["a"]) is False  # a NaN is not equal to itself
    assert state.part("inner").tensors["a"][1].isnan()
    assert sorted(path.name[5:] for path in (tmp_path / "checkpoint").iterdir()) == [
        "found", "last", "x-y-000020", "x-y-000030"
    ]  # fmt: skip
    assert not said

    (tmp_path / "plan.json").write_text("another")
    assert Journal(tmp_path, said.append).latest() == ("found", None)
    assert re.fullmatch(
        r".*/plan\.json is damaged: checkpoint 0005-last is left out, the one before it counts", said[0]
    )


# --- whole runs ----------------------------------------------------------------------------------

QUICKER = {
    **QUICK,
    "training.steps": 6,
    "training.batch_size": 2,
    "training.eval_windows": 2,
    "data.sequence_length": 16,
    "evaluation.windows": [16],
    "evaluation.max_windows": 4,
    "lora.dropout": 0.1,
    "lora.rank": 2,
    "analysis.enabled": True,
    "analysis.windows": 2,
    "analysis.shares": [0.5],
}
FILES = ("model/model.safetensors", "plan.json", "scores.safetensors", "adapters.safetensors")


def prune(checkpoint: Path, text: Path, out: Path, progress: Silent | None = None, **overrides: object):
    settings = {**QUICKER, **{key.replace("__", "."): value for key, value in overrides.items()}}
    return regrow.prune(str(checkpoint), out, "magnitude", data=str(text), overrides=settings, progress=progress)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def finished(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has stopped."""
    from regrow.checkpoint.verify import Verification

    passed = Verification("LlamaForCausalLM", "", 0.0, 1.0, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regrow.walk.verify_checkpoint", lambda model, folder, ids: passed)
        patch.setattr("regrow.evaluation.compare.complete", lambda model, tokenizer, prompt: "…")
        return prune(checkpoint, text, tmp_path_factory.mktemp("finished") / "out").folder


@pytest.mark.usefixtures("lean")
def test_faults_along_the_walk(
    finished: Path, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, out = Journal.write, tmp_path / "out"
    wanted = ["analyse", "save"]
    said = []

    def write_and_fail(self: Journal, stage: str, state: State, step: int | None = None, files=()) -> None:
        write(self, stage, state, step, files)
        if stage in wanted:
            wanted.remove(stage)
            raise Fault

    monkeypatch.setattr(Journal, "write", write_and_fail)
    for _ in range(2):
        with pytest.raises(Fault):
            prune(checkpoint, text, out, progress := Calling())
        said += [line for line in progress.said if "resum" in line]
    result = prune(checkpoint, text, out, progress := Calling())
    assert said == ["resuming after stage analyse"]
    assert "resuming after stage save" in progress.said
    assert not {"score", "sensitivity", "merge and save"} & set(progress.stages)
    assert progress.stages.count("train") == 1, "begun, found done"
    assert weights(out) == weights(finished)
    assert result.results["seconds"]["train"] > 0
    assert result.results["seconds"]["score"] > 0, "from before the fault: it was not done again"
    assert result.results["seconds"]["total"] == pytest.approx(sum(list(result.results["seconds"].values())[:-1]))


@pytest.mark.usefixtures("lean")
def test_nothing_tells_of_an_earlier_run_once_another_has_begun(
    finished: Path, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    write = Journal.write

    def write_and_fail(self: Journal, stage: str, state: State, step: int | None = None, files=()) -> None:
        write(self, stage, state, step, files)
        if stage == "train":  # all is cut: the plan is there, what was trained is not
            raise Fault

    monkeypatch.setattr(Journal, "write", write_and_fail)
    settings = {**QUICKER, "seed": 1}
    with pytest.raises(Fault):
        regrow.prune(str(checkpoint), out, "random", data=str(text), overrides=settings, fresh=True)
    assert (out / "plan.json").is_file()
    with pytest.raises(regrow.InputError, match="holds no finished run"):
        report(out)
    with pytest.raises(regrow.InputError, match=r"adapters\.safetensors"):
        regrow.apply(str(checkpoint), tmp_path / "applied", run=out)
    assert not (tmp_path / "applied" / "model.safetensors").exists()


@pytest.mark.usefixtures("lean")
def test_a_finished_run_with_another_tokenizer_is_another(finished: Path, checkpoint: Path, text: Path) -> None:
    files = {file: file.read_bytes() for file in checkpoint.glob("tokenizer*")}
    try:
        (checkpoint / "tokenizer_config.json").write_bytes(files[checkpoint / "tokenizer_config.json"] + b"\n")
        with pytest.raises(regrow.InputError, match="holds a run of another tokenizer; give a new --out, or --fresh"):
            prune(checkpoint, text, finished)
    finally:
        for file, content in files.items():
            file.write_bytes(content)


@pytest.mark.usefixtures("lean")
def test_a_finished_run_is_returned(finished: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(text.read_bytes())
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = prune(checkpoint, moved, finished, progress := Calling())  # what is in a file counts, not where it is
    assert progress.said == [f"{finished} holds this run, finished; --fresh does it again"]
    assert not progress.stages
    assert result.results == json.loads((finished / "results.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_what_a_run_is_made_of_outlives_it(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever is given, and lies where `--fresh` takes away what an earlier run has left."""
    out = tmp_path / "out"
    base = shutil.copytree(checkpoint, out / "base")
    for name in ("trials/mine.py", "teacher/a.jsonl", "sensitivity.json", "model/my.yaml", "mine.jsonl"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("def score(evidence): ...\n" if name.endswith("py") else "{}\n")
    links = tmp_path / "links"
    links.mkdir()
    for file in base.iterdir():
        (links / file.name).symlink_to(file)
    (out / "trials" / "link").symlink_to(checkpoint)
    (tmp_path / "task.yaml").write_text(f"dataset_path: json\ndata_files: {out}/teacher/a.jsonl\n")
    plain, model = Recipe(), str(checkpoint)
    given = {
        "base": (str(base), plain, ""),
        f"base{os.sep}": (f"{base}{os.sep}", plain, ""),
        "link": (str(out / "trials" / "link"), plain, ""),
        "links": (str(links), plain, ""),
        "trials": (model, plain.override({"pruning.criterion": f"{out}/trials/mine.py:score"}), ""),
        "teacher": (model, plain.override({"data.eval_source": f"{out}/teacher"}), ""),
        "sensitivity.json": (model, plain.override({"analysis.from_file": f"{out}/sensitivity.json"}), ""),
        "task.yaml": (model, plain.override({"evaluation.tasks": [str(tmp_path / "task.yaml")]}), ""),
        "model": (model, plain, f"{out}/model/my.yaml"),
    }
    for place, (name, recipe, file) in given.items():
        with pytest.raises(InputError, match=r"this run would replace or delete .*; choose another --out"):
            check_spared(out, name, recipe, file, fresh=True)
        if place != "model":
            check_spared(out, name, recipe, file, fresh=False)
    kept = plain.override({"data.source": f"{out}/mine.jsonl", "data.instructions": "nobody/nothing"})
    check_spared(out, model, kept, "regrow", fresh=True)
    (out / "run.json").write_text("{}")
    with pytest.raises(InputError, match="base: this run would replace or delete"):
        regrow.prune(base, out, "magnitude", data=f"{out}/mine.jsonl", fresh=True)
    assert (base / "model.safetensors").is_file()


@pytest.mark.usefixtures("lean")
def test_a_run_that_nobody_may_write_is_shown_if_it_is_finished(
    finished: Path, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr("regrow.run.os.access", lambda *_: False)
    monkeypatch.setattr("regrow.run.alone_in", partial(pytest.fail, "locked"))
    result = prune(checkpoint, text, tmp_path / "out")
    assert result.results == json.loads((finished / "results.json").read_text())
    Journal(tmp_path / "out", Silent().say).drop("report")
    with pytest.raises(InputError, match="holds a run to go on with and cannot be written; copy it"):
        prune(checkpoint, text, tmp_path / "out")


@pytest.mark.usefixtures("lean")
def test_what_a_finished_run_has_lost_is_made_again(
    finished: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    before = {file: (out / file).read_bytes() for file in ("groups.json", "history.json", "adapters.safetensors")}
    (out / "groups.json").unlink()
    prune(checkpoint, text, out, progress := Calling())
    assert (out / "groups.json").read_bytes() == before["groups.json"]
    assert not {"score", "merge and save"} & set(progress.stages)
    (out / "history.json").unlink()
    flip(out / "adapters.safetensors")
    prune(checkpoint, text, out, progress := Calling())
    assert {"score", "merge and save"} <= set(progress.stages), "the training, and what came of it"
    assert (out / "adapters.safetensors").read_bytes() == before["adapters.safetensors"]
    assert json.loads((out / "history.json").read_text())["validations"]
    prune(checkpoint, text, out, progress := Calling())
    assert progress.said == [f"{out} holds this run, finished; --fresh does it again"]


@pytest.mark.usefixtures("lean")
def test_a_kept_adapter_that_is_lost_is_made_again(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    again = partial(prune, checkpoint, text, tmp_path / "out", output__keep_adapter=True, analysis__enabled=False)
    again()
    files = ("base/config.json", "adapter/adapter_model.safetensors")
    before = [(tmp_path / "out" / file).read_bytes() for file in files]
    (tmp_path / "out" / files[0]).unlink()
    flip(tmp_path / "out" / files[1])
    again(progress=(progress := Calling()))
    assert "keep the adapter" in progress.stages
    assert "merge and save" not in progress.stages
    assert [(tmp_path / "out" / file).read_bytes() for file in files] == before


def test_another_way_to_write_a_setting_is_the_same_request(checkpoint: Path) -> None:
    def asked(target: str, shard_size: str) -> dict[str, object]:
        wanted = {"pruning.target": target, "output.shard_size": shard_size}
        return describe_request(str(checkpoint), load_recipe("regrow", wanted))

    assert asked("params=2B", "5GB") == asked("params=2.0B", "5000MB") == asked("Params = 2000M", "5.0GB")
    assert asked("perplexity=+5%", "5GB") == asked("perplexity=+5.0%", "5GB")
    for target in ("params=2.1B", "size=2GB", "perplexity=5", "perplexity=+6%"):
        assert asked(target, "5GB") not in (asked("params=2B", "5GB"), asked("perplexity=+5%", "5GB"))
    assert asked("params=2B", "5GB") != asked("params=2B", "5001MB")


def test_another_request_is_refused(finished: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    way_out = "; give a new --out, or --fresh to do it again from the start"
    with pytest.raises(InputError, match=f"holds a run with lora.rank = 2, not 3{way_out}"):
        prune(checkpoint, text, finished, lora__rank=3)
    other = tmp_path / "other.jsonl"
    other.write_bytes(text.read_bytes() + text.read_bytes())
    with pytest.raises(InputError, match=f"holds a run of another data.source{way_out}"):
        prune(checkpoint, other, finished)
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    flip(model / "model.safetensors")
    with pytest.raises(InputError, match=f"holds a run of another model{way_out}"):
        prune(model, text, finished)
    began = json.loads((finished / "run.json").read_text())
    for change in ({"format": None}, {"format": FORMAT + 1}, {"asked": {**began["asked"], "regrow": "0.0.1"}}):
        write_json(tmp_path / "run.json", began | change)
        with pytest.raises(InputError, match=f"holds a run that another version of regrow has begun{way_out}"):
            prune(checkpoint, text, tmp_path)
    write_json(tmp_path / "run.json", {"state": "running"})
    with pytest.raises(InputError, match=f"run.json is damaged or of an older regrow{way_out}"):
        prune(checkpoint, text, tmp_path)


def test_killed_and_stopped(finished: Path, command: CommandLine, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """A real `kill -9`, then a real Ctrl-C, each in the midst of the training; then to the end."""
    out = tmp_path / "out"
    settings = [f"--set={key}={json.dumps(value)}" for key, value in QUICKER.items()]
    words = ["prune", checkpoint, "--recipe", "magnitude", "--data", text, "--out", out, *settings]
    killed = command(*words, when=f"{out}/checkpoint/*-train-000000", signal=signal.SIGKILL)
    assert killed.code == -signal.SIGKILL
    stopped = command(*words, when=f"{out}/checkpoint/*-train-00000[1-9]", signal=signal.SIGINT)
    assert stopped.code == 130
    assert "resuming at step 0 of 6; stage train" in stopped.stderr
    last = stopped.stderr.splitlines()[-1]
    assert re.fullmatch(r"regrow: stopped.*; to go on: regrow prune .*", last)
    done = command(*words)
    assert done.code == 0, done.stderr
    assert re.search(r"resuming at step [456] of 6; stage train|resuming after", done.stderr)
    assert weights(out) == weights(finished)
