"""Progress on a terminal as bars with the time left, elsewhere as plain lines."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from regrow.progress import Progress

SECONDS_BETWEEN_LINES = 10.0


class NotedBars(Bars):
    """Bars with a line beneath them that says how the work goes, whatever the terminal's width."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, and the line if there is one."""
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note)


class TerminalProgress:
    """One bar per stage."""

    def __init__(self, bars: NotedBars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def stage(self, name: str, total: int | None = None) -> None:
        """Finish the bar before, start the next."""
        self._finish()
        self._bars.note = ""
        self._task = self._bars.add_task(name, total=total)

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.note = note
            self._bars.update(self._task, advance=steps)

    def say(self, message: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(message, markup=False, highlight=False)

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._bars.task_ids.index(self._task)]
            if task.total is None:
                self._bars.update(self._task, total=1, completed=1)
            self._bars.stop_task(self._task)

    def close(self) -> None:
        """The last stage is done."""
        self._bars.note = ""
        self._finish()


class PlainProgress:
    """A line when a stage begins, and now and then within it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name, self._total, self._done = "", None, 0  # type: tuple[str, int | None, int]
        self._first: tuple[float, int] | None = None
        """When a stage first advanced, and how far it was then: in one that goes on, what others had done."""
        self._last = time.monotonic()

    def stage(self, name: str, total: int | None = None) -> None:
        """Name the stage."""
        self._name, self._total, self._done, self._first = name, total, 0, None
        self._last = time.monotonic()
        self.say(f"{name} …")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Every ten seconds: how far, and how long still."""
        self._done += steps
        now = time.monotonic()
        began, before = self._first = self._first or (now, self._done)
        if now - self._last < SECONDS_BETWEEN_LINES or not self._total:
            return
        self._last = now
        parts = [f"{self._name}: {self._done}/{self._total}"]
        if self._done > before:
            parts.append(f"{(now - began) / (self._done - before) * (self._total - self._done):.0f} s left")
        self.say(", ".join([*parts, note] if note else parts))

    def say(self, message: str) -> None:
        """Print a line."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """Progress on standard error, which leaves standard output to the results."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield PlainProgress(console)
        return
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with NotedBars(*columns, console=console) as bars:
        progress = TerminalProgress(bars)
        yield progress
        progress.close()
