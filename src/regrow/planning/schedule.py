"""Step -> sparsity."""

import math

from regrow.settings import Pruning


def cubic_sparsity(
    step: float, steps: int, warm_up: float, cool_down: float, target: float, start: float = 0.0
) -> float:
    """Sparsity after `step` of `steps`: `target + (start - target) (1 - progress)³` (LoRAPrune, §3.3).

    `progress` runs from 0 to 1 between the end of the warm-up share of the steps and the start of the
    cool-down share.
    """
    first, last = warm_up * steps, (1 - cool_down) * steps
    if step <= first:
        return start
    if step >= last:
        return target
    return target + (start - target) * (1 - (step - first) / (last - first)) ** 3


def cut_events(pruning: Pruning, steps: int) -> dict[int, float]:
    """When to choose units, and how far on the way to the target to be then.

    Returns:
        step (before which to cut, 0 = before any training) -> fraction of the target, ascending and ending
        at exactly 1.0. LoRAPrune's released schedule ends before its target; this one adds the last event.
    """
    if pruning.schedule == "one-shot" or steps == 0:
        return {0: 1.0}
    if pruning.schedule == "lhspg":
        *starts, _ = period_bounds(pruning, steps)
        return {start: (number + 1) / len(starts) for number, start in enumerate(starts)}
    first, last = pruning.warm_up * steps, math.floor((1 - pruning.cool_down) * steps)
    if pruning.schedule == "learned-mask":
        return {last: 1.0}
    events = {
        step: cubic_sparsity(step, steps, pruning.warm_up, pruning.cool_down, 1.0)
        for step in range(pruning.interval, last, pruning.interval)
        if step > first
    }
    return {**events, last: 1.0}


def fade_ends(pruning: Pruning, steps: int) -> dict[int, int]:
    """For each event of `cut_events`: the step before which the gates of the units chosen then are at 0.

    With the lhspg schedule a fade takes a period: it ends where the next period begins. Learned masks have faded.
    """
    starts = list(cut_events(pruning, steps))
    if pruning.schedule == "lhspg":
        return dict(zip(starts, [*starts[1:], period_bounds(pruning, steps)[-1]], strict=True))
    decay = 0 if pruning.schedule == "learned-mask" else pruning.decay_steps
    return {start: start + decay for start in starts}


def period_bounds(pruning: Pruning, steps: int) -> list[int]:
    """The steps before which the periods of the lhspg schedule begin, and the one before which the last ends.

    P periods share the steps between warm-up and cool-down; their lengths differ by one step at most. Where
    there are fewer steps than periods, some begin together, which makes them one.
    """
    first = math.ceil(pruning.warm_up * steps)
    last = max(first, math.floor((1 - pruning.cool_down) * steps))
    return [first + (last - first) * number // pruning.periods for number in range(pruning.periods + 1)]
