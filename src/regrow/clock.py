"""How long a run's stages take, on the wall.

On CUDA kernels run on after a call returns: what a part started and did not wait for counts where it is waited for.
Training and scoring wait for their own (for the loss, the gradient's norm, the scores' finiteness); a cut does not.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Seconds by stage. Parts of a stage count under their own names, not the stage's: all add up to the whole."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        """The stage under way and the parts begun within it, the innermost last."""
        self._since = time.perf_counter()

    def begin(self, stage: str) -> None:
        """A stage follows on the one before; none if it has no name."""
        self._book()
        self._open = [stage] if stage else []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Something within a stage, or within another part."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def so_far(self) -> dict[str, float]:
        """By stage and part, those under way up to now; to the millisecond."""
        self._book()
        return {name: round(seconds, 3) for name, seconds in self._seconds.items()}

    def go_on(self, seconds: Mapping[str, float]) -> None:
        """Count on from what had been taken before; what this clock has booked up to now is left out."""
        self._book()
        self._seconds = dict(seconds)

    def _book(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
