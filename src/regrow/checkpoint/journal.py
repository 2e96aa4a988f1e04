"""What a run has got done, on disk, so that it can go on after whatever has stopped it.

`checkpoint/` in the run's folder holds an entry for each stage that is done, and the last two of a training under way:
a folder `NUMBER-STAGE` or `NUMBER-STAGE-STEP` with `values.json`, `tensors.safetensors` and `checksums.json`, the
SHA-256 of these and of the files elsewhere in the run's folder that belong to the entry. An entry appears whole or not
at all, and one that no longer agrees with its checksums counts as not there.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from regrow.checkpoint.files import new_folder, sha256_of
from regrow.checkpoint.state import State, chance, named, set_chance
from regrow.clock import Clock

FORMAT = 6
"""Of what entries and requests hold: raised whenever a stage or a part notes something else, or under another name."""
FOLDER, VALUES, TENSORS, CHECKSUMS = "checkpoint", "values.json", "tensors.safetensors", "checksums.json"
ENTRY = re.compile(r"(?P<number>\d+)-(?P<stage>[a-z-]*[a-z])(-(?P<step>\d+))?")
CHANCE_OF = "chance-of"
KEPT = 2
"""Entries of one stage at several steps."""


class Forgetful:
    """The journal of work that nobody will go on with."""

    chance_of: Mapping[str, Tensor] = MappingProxyType({})
    """Of the entry read last: the chance of every process that shared it, as `RANK/DEVICE`; see `shared.py`."""

    def read(self, stage: str) -> State | None:
        """Nothing is ever done."""
        return None

    def write(self, stage: str, state: State, step: int | None = None, files: Sequence[Path] = ()) -> None:
        """Nothing."""

    def once(self, stage: str, work: Callable[[], Any]) -> Any:
        """What a stage found, plain data: as it was noted, or by doing the work and noting it."""
        done = self.read(stage)
        if done is not None:
            return done.values["found"]
        found = work()
        self.write(stage, State({"found": found}))
        return found

    def drop(self, *stages: str) -> None:
        """Nothing."""

    def timing(self, part: str) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()


class Journal(Forgetful):
    """A run's, or that of one of its trials."""

    def __init__(self, folder: Path, say: Callable[[str], None], clock: Clock | None = None) -> None:
        """Look at what is there later, when it is asked for.

        Args:
            folder: the run's.
            say: told, in a line, of every entry that is damaged.
            clock: the run's, noted in every entry.
        """
        self.run = folder
        self.folder = folder / FOLDER
        self.say = say
        self.clock = clock or Clock()
        self._whole: set[Path] = set()

    def read(self, stage: str) -> State | None:
        """The newest whole entry of a stage; torch's chance goes on from where the stage left it."""
        entry = self._newest(stage)
        if entry is None:
            return None
        tensors = load_file(entry / TENSORS)
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(("chance/", CHANCE_OF + "/"))}
        self.chance_of = State(tensors=tensors).under(CHANCE_OF)
        set_chance(State(tensors=tensors).under("chance"))
        return State(json.loads((entry / VALUES).read_text(encoding="utf-8"))["state"], own)

    def write(self, stage: str, state: State, step: int | None = None, files: Sequence[Path] = ()) -> None:
        """Note that a stage is done, or (with a step) has come so far; the entries before go when this one is there.

        Args:
            files: whole ones in the run's folder that belong to it.
        """
        with self.timing("checkpoint"):
            self._write(stage, state, step, files)

    def _write(self, stage: str, state: State, step: int | None, files: Sequence[Path]) -> None:
        number = max((int(_match(entry)["number"]) for entry in self._entries()), default=0) + 1
        entry = self.folder / (f"{number:04}-{stage}" + ("" if step is None else f"-{step:06}"))
        with new_folder(entry) as partial:
            values = {"state": state.values, "seconds": self.clock.so_far()}
            (partial / VALUES).write_text(json.dumps(values), encoding="utf-8")
            tensors = state.tensors | named("chance", chance())
            save_file({name: _plain(tensor) for name, tensor in tensors.items()}, partial / TENSORS)
            sums = {name: sha256_of(partial / name) for name in (VALUES, TENSORS)}
            sums |= {f"../../{file.relative_to(self.run)}": sha256_of(file) for file in files}
            (partial / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
        self._whole.add(entry)
        for old in self._entries(stage)[: -1 if step is None else -KEPT]:
            shutil.rmtree(old)

    def drop(self, *stages: str) -> None:
        """Forget stages that nothing will ask for again."""
        for stage in stages:
            for entry in self._entries(stage):
                shutil.rmtree(entry)

    def timing(self, part: str) -> AbstractContextManager[None]:
        """A part of the stage under way, whose time counts for itself."""
        return self.clock.part(part)

    def latest(self) -> tuple[str, int | None] | None:
        """Stage and step of the newest whole entry of all."""
        entry = self._newest()
        if entry is None:
            return None
        match = _match(entry)
        return match["stage"], None if match["step"] is None else int(match["step"])

    def seconds_before(self) -> dict[str, float]:
        """What had been noted of the stages' time when the newest whole entry was written."""
        entry = self._newest()
        if entry is None:
            return {}
        seconds: dict[str, float] = json.loads((entry / VALUES).read_text(encoding="utf-8"))["seconds"]
        return seconds

    def _entries(self, stage: str | None = None) -> list[Path]:
        """Those of a stage, or all, oldest first."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        found = [path for path in there if ENTRY.fullmatch(path.name) and stage in (None, _match(path)["stage"])]
        return sorted(found, key=lambda path: int(_match(path)["number"]))

    def _newest(self, stage: str | None = None) -> Path | None:
        for entry in reversed(self._entries(stage)):
            if entry in self._whole:
                return entry
            wrong = _first_wrong(entry)
            if wrong is None:
                self._whole.add(entry)
                return entry
            self.say(f"{wrong} is damaged: checkpoint {entry.name} is left out, the one before it counts")
            shutil.rmtree(entry)
        return None


def _match(entry: Path) -> re.Match[str]:
    match = ENTRY.fullmatch(entry.name)
    assert match is not None
    return match


def _first_wrong(entry: Path) -> Path | None:
    """The first file of an entry that is not there or not what its checksum says; None: all are."""
    try:
        sums: dict[str, str] = json.loads((entry / CHECKSUMS).read_text(encoding="utf-8"))
        names = [name for name in (VALUES, TENSORS) if name not in sums]
    except (OSError, ValueError, TypeError):
        return entry / CHECKSUMS
    for name, expected in sums.items():
        file = entry / name
        if not file.is_file() or sha256_of(file) != expected:
            return file.resolve()
    return entry / CHECKSUMS if names else None


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
