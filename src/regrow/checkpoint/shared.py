"""One journal for all the processes of a run: the main one keeps it, all go on from what it says."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from regrow.checkpoint.journal import CHANCE_OF, Forgetful
from regrow.checkpoint.state import State, chance, named, set_chance
from regrow.processes import Processes


class Shared(Forgetful):
    """What the main process' journal holds, in every process. All of them call each method alike."""

    def __init__(self, own: Forgetful, processes: Processes) -> None:
        """Share a journal.

        Args:
            own: the main process'; in the others it is not asked.
        """
        self.own = own
        self.processes = processes

    def read(self, stage: str) -> State | None:
        """See `Journal`. Chance goes on in every process from where it left it there."""
        found = self.own.read(stage) if self.processes.is_main else None
        values = self.processes.same(None if found is None else {"of": found.values})
        if values is None:
            return None
        chances = State(tensors=self.processes.same_tensors(self.own.chance_of)).under(str(self.processes.rank))
        set_chance(chances)  # none if fewer processes took part when it was written
        return State(values["of"], self.processes.same_tensors({} if found is None else found.tensors))

    def write(self, stage: str, state: State, step: int | None = None, files: Sequence[Path] = ()) -> None:
        """See `Journal`."""
        tensors = dict(state.tensors)
        for rank, states in enumerate(self.processes.gather(chance())):
            tensors |= named(f"{CHANCE_OF}/{rank}", states)
        if self.processes.is_main:
            self.own.write(stage, State(state.values, tensors), step, files)

    def once(self, stage: str, work: Callable[[], Any]) -> Any:
        """See `Journal`; what the main process finds counts."""
        return super().once(stage, lambda: self.processes.same(work()))

    def timing(self, part: str) -> AbstractContextManager[None]:
        """See `Journal`."""
        return self.own.timing(part)

    def drop(self, *stages: str) -> None:
        """See `Journal`."""
        if self.processes.is_main:
            self.own.drop(*stages)


def shared(own: Forgetful, processes: Processes) -> Forgetful:
    """A journal for all of them; of a single process, its own."""
    return own if processes.count == 1 else Shared(own, processes)
