"""Being asked to stop: Ctrl-C (SIGINT), or a scheduler's SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Stopped where asked to; the message says where."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within this context a signal is noted, and whoever is at work asks for it when it suits; a second one hits home.

    Signals that are ignored stay so. Outside the main thread, where Python allows no handlers, nothing changes.

    Raises:
        Stopped: at the end, if nobody has heeded a request.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise Stopped("stopped at once")
        asked.append(number)

    with _handling(note):
        yield lambda: bool(asked)
    if asked:
        raise Stopped("stopped")


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this context SIGTERM stops the work as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped")

    with _handling(stop):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    former: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        heeded = [one for one in SIGNALS if signal.getsignal(one) not in (signal.SIG_IGN, None)]
        former = {one: signal.signal(one, handler) for one in heeded}
    try:
        yield
    finally:
        for one, before in former.items():
            signal.signal(one, before)
