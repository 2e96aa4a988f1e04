"""Two processes in one folder: the second ends at once with one line, and the first comes to what it would have."""

import json
import os
import signal
from pathlib import Path

import pytest
from conftest import QUICK, CommandLine, Done

import regrow
from regrow.checkpoint.files import LOCK_FILE, check_folder
from regrow.checkpoint.lock import alone_in
from regrow.errors import InputError
from regrow.progress import Silent

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


def assert_refused(done: Done, folder: Path) -> None:
    who = f"another process (pid {os.getpid()}) works in {folder}"
    expected = f"regrow: {who}; wait for its end, or give another folder\n"
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
