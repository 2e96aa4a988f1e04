"""Two processes in one folder: the second ends at once with one line, and the first comes to what it would have."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import QUICK, CommandLine, Done, plan_of, random_keep

import regrow
from regrow.checkpoint.files import LOCK_FILE, check_folder
from regrow.checkpoint.load import load_model
from regrow.checkpoint.lock import alone_in, alone_in_new, alone_with
from regrow.checkpoint.peft_folder import Adapter
from regrow.errors import InputError
from regrow.progress import Silent
from regrow.reuse import report
from regrow.structure.finding import find_groups

SETTINGS = {
    **QUICK,
    "training.steps": 2,
    "training.batch_size": 2,
    "data.sequence_length": 16,
    "lora.rank": 2,
    "evaluation.windows": [16],
    "evaluation.max_windows": 4,
}
FLAGS = ["--recipe=magnitude", *(f"--set={key}={json.dumps(value)}" for key, value in SETTINGS.items())]


def tree(folder: Path) -> dict[Path, tuple[int, int]]:
    """What lies in a folder, with size and time of the last change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in (folder, *folder.rglob("*"))}


def assert_refused(done: Done, place: Path, does: str = "works in", other: str = "folder") -> None:
    who = f"another process (pid {os.getpid()}) {does} {place}"
    expected = f"regrow: {who}; wait for its end, or give another {other}\n"
    assert (done.code, done.stdout, done.complaint) == (2, "", expected)


class Second(Silent):
    """Progress of a run that lets a second process ask for the same folder, at the start and while it trains."""

    def __init__(self, command: CommandLine, argv: list[str | Path], folder: Path) -> None:
        self.command, self.argv, self.folder = command, argv, folder
        self.stages: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append(name)
        if name in ("load model", "evaluate"):
            before = tree(self.folder)
            assert_refused(self.command(*self.argv), self.folder)
            assert_refused(self.command(*self.argv, "--fresh"), self.folder)
            assert tree(self.folder) == before


@pytest.mark.usefixtures("lean")
def test_a_second_run_is_refused(command: CommandLine, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    progress = Second(command, ["prune", checkpoint, "--data", text, "--out", out, *FLAGS], out)
    regrow.prune(str(checkpoint), out, "magnitude", data=str(text), overrides=SETTINGS, progress=progress)
    assert {"load model", "evaluate"} <= set(progress.stages)
    assert not (out / LOCK_FILE).exists()


def test_other_verbs_are_refused(command: CommandLine, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with alone_in(tmp_path / "out"):
        given = [checkpoint, "--data", text, "--out", tmp_path / "out"]
        assert_refused(command("analyze", *given), tmp_path / "out")
        assert_refused(command("compare", *given, "--recipes=magnitude"), tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]


def test_what_a_killed_process_leaves_locks_nothing(
    command: CommandLine, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """Killed before it has claimed the folder: all it leaves there is the lock's file."""
    out = tmp_path / "out"
    argv = ["prune", checkpoint, "--data", text, "--out", out, *FLAGS]
    assert command(*argv, when=str(out / LOCK_FILE), signal=signal.SIGKILL).code == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [LOCK_FILE]
    assert not check_folder(out)
    with alone_in(out):
        assert_refused(command(*argv), out)
    assert not list(out.iterdir())


def test_a_folder_without_use_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with alone_in(folder):
        assert (folder / LOCK_FILE).read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no"), alone_in(folder):
        raise InputError("no")
    assert not list(tmp_path.iterdir())
    with alone_in(folder):
        (folder / "plan.json").touch()
    assert [path.name for path in folder.iterdir()] == ["plan.json"]


# --- what uses a run again -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a plan of it, and an adapter of what the plan makes of it."""
    folder = tmp_path_factory.mktemp("left")
    shutil.copytree(checkpoint, folder / "model")
    groups = find_groups(load_model(str(checkpoint)))
    (folder / "plan.json").write_text(json.dumps(plan_of(groups, random_keep(groups, 0)).to_json()))
    factors = {("lm_head", "A"): torch.ones(2, 32), ("lm_head", "B"): torch.ones(300, 2)}
    Adapter({"peft_type": "LORA", "target_modules": ["lm_head"]}, factors).write(folder / "adapter")
    return folder


def verbs(left: Path) -> dict[str, tuple[str, str, list[str | Path]]]:
    """The verb's command but for `--out`, and where it makes what it writes."""
    model, plan = left / "model", left / "plan.json"
    return {
        "apply": ("checkpoint.stream", "new_folder", ["apply", model, "--plan", plan]),
        "scatter": (
            "checkpoint.peft_folder",
            "new_folder",
            ["scatter", left / "adapter", "--plan", plan, "--model", model],
        ),
        "pad": ("formats.pad", "new_folder", ["export", model, "--pad"]),
        "gguf": ("formats.llamacpp", "new_file", ["export", model, "--to", "gguf"]),
    }


def called(left: Path, out: Path) -> dict[str, Callable[[], object]]:
    """The same verbs in this process."""
    model, plan = str(left / "model"), left / "plan.json"
    return {
        "apply": partial(regrow.apply, model, out, plan=plan),
        "scatter": partial(regrow.scatter, left / "adapter", out, plan=plan, model=model),
        "pad": partial(regrow.export, model, out, pad=True),
        "gguf": partial(regrow.export, model, out, "gguf"),
    }


def written(out: Path) -> dict[str, bytes]:
    files = [out] if out.is_file() else sorted(file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@pytest.mark.parametrize("verb", ["apply", "scatter", "pad", "gguf"])
def test_a_second_that_writes_the_same_is_refused(
    verb: str, left: Path, command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if verb == "gguf":
        pytest.importorskip("gguf")
    there = tmp_path / "there"
    out = there / ("new.gguf" if verb == "gguf" else "new")
    place, name, argv = verbs(left)[verb]
    module = import_module(f"regrow.{place}")
    original, seen = getattr(module, name), []

    @contextmanager
    def half_done(path: Path) -> Iterator[Path]:
        with original(path) as unfinished:
            (unfinished if unfinished.is_dir() else unfinished.parent).joinpath("begun").touch()
            before = tree(there)
            told = ("writes", "file") if verb == "gguf" else ()
            assert_refused(command(*argv, "--out", out), out, *told)
            assert tree(there) == before
            seen.append(path)
            next(there.rglob("begun")).unlink()
            yield unfinished

    monkeypatch.setattr(module, name, half_done)
    called(left, out)[verb]()
    assert seen == [out]
    assert list(there.iterdir()) == [out], "the lock is gone"
    monkeypatch.undo()
    called(left, tmp_path / "undisturbed")[verb]()
    assert written(out) == written(tmp_path / "undisturbed")


def test_a_run_does_not_begin_where_a_checkpoint_is_being_written(
    left: Path, command: CommandLine, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def asked(folder: Path) -> None:
        assert_refused(command("prune", left / "model", "--data", text, "--out", out, *FLAGS), out)
        raise InputError("enough")

    monkeypatch.setattr("regrow.checkpoint.stream.new_folder", asked)
    with pytest.raises(InputError, match="enough"):
        called(left, out)["apply"]()
    assert not out.exists()


def test_a_lock_left_by_a_killed_process_keeps_nobody_from_writing(left: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / LOCK_FILE).touch()
    called(left, out)["pad"]()
    assert not (out / LOCK_FILE).exists()
    with pytest.raises(InputError, match="is there already and not empty"):
        called(left, out)["pad"]()


def test_a_report_is_not_made_again_while_a_run_is_under_way(
    reported_run: Path, command: CommandLine, tmp_path: Path
) -> None:
    """Neither in a folder without results so far, nor where an earlier run's are still there."""
    out = tmp_path / "run"
    shutil.copytree(reported_run, out)
    with alone_in(out):
        before = tree(out)
        assert_refused(command("report", out), out)
        (out / "results.json").rename(tmp_path / "results.json")
        done = command("report", out)
        assert (done.code, done.stdout, "holds no finished run" in done.complaint) == (2, "", True)
        (tmp_path / "results.json").rename(out / "results.json")
        assert {k: v for k, v in tree(out).items() if k != out} == {k: v for k, v in before.items() if k != out}
    assert report(out) == (out / "report.md", out / "report.html")
    assert not (out / LOCK_FILE).exists()


def test_what_was_filled_just_before_the_lock_was_had_stays(
    left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def had_after_another(folder: Path) -> Iterator[None]:
        folder.mkdir()
        (folder / "config.json").touch()
        yield

    monkeypatch.setattr("regrow.checkpoint.lock.alone_in", had_after_another)
    with pytest.raises(InputError, match="is there already and not empty"):
        called(left, tmp_path / "out")["apply"]()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]


def test_a_file_is_had_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "model.gguf"
    with alone_with(file):
        assert [path.name for path in file.parent.iterdir()] == [".model.gguf.lock"]
        with pytest.raises(InputError, match=r"writes .*model\.gguf; wait for its end"), alone_with(file):
            pass
        with alone_with(file.with_name("other.gguf")):
            file.touch()
    assert list(file.parent.iterdir()) == [file]


def test_a_link_that_leads_nowhere_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("not mounted", target_is_directory=True)
    for enter in (alone_in, alone_in_new):
        with (
            pytest.raises(InputError, match="out is a link to not mounted, which is not there"),
            enter(tmp_path / "out"),
        ):
            pass
    assert not (tmp_path / "not mounted").exists()
