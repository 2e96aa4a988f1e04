"""Where a run's time goes: every second counts once."""

from types import SimpleNamespace

import pytest

from regrow.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A time that passes when it is told to."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("regrow.clock.time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def test_parts_count_for_themselves_and_everything_adds_up(now: SimpleNamespace) -> None:
    clock = Clock()
    now.seconds += 5  # nothing has begun
    clock.begin("train")
    now.seconds += 1
    for _ in range(2):
        with clock.part("plan"):
            now.seconds += 10
            with clock.part("cut"):
                now.seconds += 100
                with clock.part("cut"):
                    now.seconds += 0.25
            now.seconds += 20
        now.seconds += 2
    assert clock.so_far() == {"train": 5, "plan": 60, "cut": 200.5}
    clock.begin("save")
    now.seconds += 0.0004  # kept, though too short to be told: ten of them are not
    for _ in range(9):
        with clock.part("checkpoint"):
            now.seconds += 0.0004
    assert clock.so_far() == {"train": 5, "plan": 60, "cut": 200.5, "save": 0.0, "checkpoint": 0.004}
    clock.begin("")
    now.seconds += 50
    assert sum(clock.so_far().values()) == 265.504


def test_a_part_that_fails_is_over(now: SimpleNamespace) -> None:
    clock = Clock()
    clock.begin("train")
    with pytest.raises(KeyboardInterrupt), clock.part("score"):
        now.seconds += 3
        raise KeyboardInterrupt
    now.seconds += 1
    assert clock.so_far() == {"score": 3, "train": 1}


def test_a_resumed_run_adds_to_what_had_been_taken(now: SimpleNamespace) -> None:
    clock = Clock()
    clock.begin("read text")
    now.seconds += 7  # will be noted again: the stage was noted before
    clock.go_on({"read text": 2.5, "score": 4.0})
    now.seconds += 1
    with clock.part("score"):
        now.seconds += 2
    assert clock.so_far() == {"read text": 3.5, "score": 6.0}
