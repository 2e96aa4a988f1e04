"""Targets as people mean them (so many parameters, so many bytes, so much faster), and the sparsity that meets them."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

from torch import Tensor

from regrow.errors import InputError
from regrow.planning.allocation import final_counts
from regrow.planning.demand import reach
from regrow.planning.hidden import reach_with_hidden
from regrow.planning.sensitivity import Prior
from regrow.settings import Pruning
from regrow.structure.groups import Groups

Kind = Literal["params", "size", "speedup", "perplexity"]

FORMS = "params=2.0B, size=3GB, speedup=1.6x, perplexity=+5% or perplexity=6.5"
NUMBER = "([0-9]+(?:_[0-9]+)*(?:[.][0-9]+)?(?:e[0-9]+)?)"
COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
BYTES = {"b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}

STEPS = 64
"""Of the search for a speed-up, from nothing to all that may go."""


@dataclass(frozen=True)
class Target:
    """What the result shall be."""

    kind: Kind
    value: float
    """Most parameters; most bytes; least factor; most perplexity, or (`relative`) its rise over the dense model's."""
    text: str
    """As it was asked for."""
    relative: bool = False

    @property
    def plain(self) -> str:
        """The same for all ways to write it: `params=2B`, `params=2.0B` and `params=2000M`."""
        return f"{self.kind}={'+' if self.relative else ''}{self.value:.12g}"

    def most_perplexity(self, dense: float) -> float:
        """The perplexity that holds the target, given the dense model's on the same text."""
        assert self.kind == "perplexity"
        return dense * (1 + self.value) if self.relative else self.value


def parse_target(text: str) -> Target:
    """Read `params=2.0B`, `size=700MB`, `speedup=1.6x`, `perplexity=+5%` or `perplexity=6.5`.

    Parameters take K, M and B (thousands, millions, billions) or none; sizes KB, MB, GB, TB (powers of 1000) or
    KiB, MiB, GiB, TiB (powers of 1024); case does not matter.

    Raises:
        InputError: if it is none of these, or a number that no model can meet.
    """
    kind, separator, value = text.replace(" ", "").lower().partition("=")
    readers = {"params": _params, "size": _size, "speedup": _speedup, "perplexity": _perplexity}
    if not separator or kind not in readers:
        raise InputError(f"target {text!r}: write one of {FORMS}")
    number, relative = readers[kind](value, text)
    return Target(cast(Kind, kind), number, text, relative)


def _match(pattern: str, value: str, text: str, hint: str, units: Mapping[str, int] | None = None) -> float:
    """The number that a pattern finds, times its unit if there are any."""
    found = re.fullmatch(pattern, value)
    if found is None:
        raise InputError(f"target {text!r}: {hint}")
    number = float(found[1]) * (units[found[2]] if units else 1)
    if not math.isfinite(number):
        raise InputError(f"target {text!r} is too large a number; {hint}")
    return number


def _params(value: str, text: str) -> tuple[float, bool]:
    hint = "give a number of parameters, for example 2.0B, 500M"
    return _positive(_match(rf"{NUMBER}([kmb]?)", value, text, hint, COUNTS), text), False


def _size(value: str, text: str) -> tuple[float, bool]:
    hint = "give bytes with a unit, for example 3GB, 700MiB"
    return _positive(_match(rf"{NUMBER}((?:[kmgt]i?)?b)", value, text, hint, BYTES), text), False


def parse_bytes(text: str) -> int:
    """`5GB` in bytes, units as in a target of size."""
    return round(_size(text.lower(), text)[0])


def _speedup(value: str, text: str) -> tuple[float, bool]:
    factor = _match(rf"{NUMBER}[x×]?", value, text, "give a factor, for example 1.6x")
    if factor <= 1:
        raise InputError(f"target {text!r}: a speed-up is more than 1x, for example 1.6x")
    return factor, False


def _perplexity(value: str, text: str) -> tuple[float, bool]:
    hint = "give what it may rise by, for example +5%, or the perplexity itself, for example 6.5"
    if value.startswith("+"):
        return _positive(_match(rf"\+{NUMBER}%", value, text, hint), text) / 100, True
    number = _match(NUMBER, value, text, hint)
    if number <= 1:
        raise InputError(f"target {text!r}: a perplexity is more than 1; {hint}")
    return number, False


def _positive(number: float, text: str) -> float:
    if not number > 0:
        raise InputError(f"target {text!r}: give more than 0")
    return number


def sparsity_for(
    target: Target, groups: Groups, pruning: Pruning, *, bytes_per_parameter: int, other_bytes: int
) -> float:
    """The share of the block parameters to remove for a target in parameters or bytes; of all, if hidden channels go.

    What is then removed is never less than the target needs, and less than one step of the shape more (see
    `regrow.planning.allocation`).

    Args:
        groups: of the whole model.
        pruning: its shape and limits bound what can be reached.
        bytes_per_parameter: as the result will be saved.
        other_bytes: in the files of weights besides the parameters.

    Raises:
        InputError: if the target is out of reach; the message says what is within it.
    """
    is_size = target.kind == "size"
    assert is_size or target.kind == "params"
    most = (target.value - other_bytes) // bytes_per_parameter if is_size else target.value
    removed = groups.total_parameters - int(most)
    basis = "total" if "hidden" in pruning.kinds else "block"
    within = reach_with_hidden(groups, pruning, basis)
    if not 0 < removed <= within:

        def told(parameters: int) -> str:
            size = parameters * bytes_per_parameter + other_bytes
            return f"{size:,} bytes" if is_size else f"{parameters:,} parameters"

        raise InputError(
            f"target {target.text!r} is out of reach: the model has {told(groups.total_parameters)} and can be cut to "
            f"{told(groups.total_parameters - within)}; ask for so many, or for something between"
        )
    return share_of(removed, groups, basis)


def share_of(removed: int, groups: Groups, basis: str = "block") -> float:
    """The sparsity (of the block parameters, or of all) whose demand is exactly `removed` parameters.

    Half a parameter less is asked for: the demand is rounded up, and rounding errors stay far from a whole number.
    """
    return (removed - 0.5) / groups.parameters(basis)


def with_share(pruning: Pruning, share: float) -> Pruning:
    """The same pruning with another share of the block parameters to remove."""
    return pruning.model_copy(update={"sparsity": share, "basis": "block"})


def check_speedup(
    target: Target, groups: Groups, pruning: Pruning, seconds: Callable[[Mapping[str, int]], float]
) -> None:
    """Refuse a speed-up that even the smallest model does not bring; see `sparsity_for_speedup`.

    Raises:
        InputError: the message says what is within reach.
    """
    scores = {group.name: Tensor([0.0] * group.units) for group in groups}
    most = _speedup_of(reach(groups, pruning), groups, pruning, seconds, scores, None)
    if most < target.value:
        raise _too_slow(target, most)


def sparsity_for_speedup(
    target: Target,
    groups: Groups,
    pruning: Pruning,
    seconds: Callable[[Mapping[str, int]], float],
    scores: Mapping[str, Tensor],
    prior: Prior | None = None,
) -> float:
    """The least share of the block parameters to remove for a speed-up, to the cost of a unit.

    More removed is not always faster, for heads and layers may come back as channels go. So the first of `STEPS` even
    steps that is fast enough is looked for, and the least before it by bisection.

    Args:
        groups: of the whole model.
        seconds: how long a model takes of which so many units of each group are left.
        scores: one per unit; where the allocation goes by them, they decide the widths.
        prior: what an analysis has found; where the allocation goes by it, so does that.

    Raises:
        InputError: if the target is out of reach; the message says what is within it.
    """

    def fast(removed: int) -> bool:
        return _speedup_of(removed, groups, pruning, seconds, scores, prior) >= target.value

    most = reach(groups, pruning, prior=prior)
    steps = pairwise(most * number // STEPS for number in range(STEPS + 1))
    found = next((step for step in steps if fast(step[1])), None)
    if found is None:
        raise _too_slow(target, _speedup_of(most, groups, pruning, seconds, scores, prior))
    low, high = found
    while high - low > min(group.cost for group in groups):
        middle = (low + high) // 2
        if fast(middle):
            high = middle
        else:
            low = middle
    return share_of(high, groups)


def _too_slow(target: Target, most: float) -> InputError:
    return InputError(
        f"target {target.text!r} is out of reach: the smallest model that this recipe allows is {most:.2f}x as fast "
        "here by the latency table; ask for less"
    )


def _speedup_of(
    removed: int,
    groups: Groups,
    pruning: Pruning,
    seconds: Callable[[Mapping[str, int]], float],
    scores: Mapping[str, Tensor],
    prior: Prior | None,
) -> float:
    nothing = {group.name: 0 for group in groups}
    counts = final_counts(groups, nothing, scores, with_share(pruning, share_of(removed, groups)), prior)
    whole = {group.name: group.units for group in groups}
    return seconds(whole) / seconds({name: units - counts[name] for name, units in whole.items()})
