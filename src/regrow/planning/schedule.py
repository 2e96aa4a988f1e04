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
    first, last = pruning.warm_up * steps, math.floor((1 - pruning.cool_down) * steps)
    events = {
        step: cubic_sparsity(step, steps, pruning.warm_up, pruning.cool_down, 1.0)
        for step in range(pruning.interval, last, pruning.interval)
        if step > first
    }
    return {**events, last: 1.0}
