"""How long work tells what it is doing. The library is silent; the command line shows bars."""

from typing import Protocol


class Progress(Protocol):
    """Receives what a run has to say."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new piece of work begins, of `total` steps if that is known."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Some steps of it are done; `note` is a short state (`loss 2.31`)."""

    def say(self, message: str) -> None:
        """One line that stays on the screen."""


class Silent:
    """Says nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""
