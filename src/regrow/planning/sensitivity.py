"""Sensitivity: how much the model suffers when one group's units are pruned, measured group by group.

The papers' "knowledge distribution" (LoRAShear, arXiv 2310.18356, Alg. 3). It says which groups to leave alone,
and, as a curve per group, what a share of its units costs: what an allocation across groups needs to know.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from regrow.planning.document import Document, Positive, Whole
from regrow.planning.experts import families
from regrow.settings.base import TrialShare
from regrow.structure.groups import Groups

MOST_NATS = 1e6
"""A loss or a rise of it beyond this is no measurement."""
DEVIATIONS = 3.0
"""A group is an outlier if its damage exceeds the median by so many median absolute deviations."""


class Conditions(BaseModel):
    """What was measured, and on what: two analyses with the same conditions are the same analysis."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model_sha256: str
    """Of the configs and of the weights, or of samples of them if they are large."""
    dtype: str
    """What was computed in."""
    tokens_sha256: str
    """Of the held-out windows."""
    windows: Positive
    length: Positive
    """Tokens in a window."""
    calibration_sha256: str
    """Of the windows that the units were scored on."""
    calibration_batches: Positive
    batch_size: Positive
    seed: Whole
    criterion: str
    """Which units go first."""
    scoring_sha256: str
    """Of all else that the scores depend on: the file of a criterion of one's own, and settings."""
    shares: tuple[TrialShare, ...]
    """Of a group's units, removed in turn."""

    @property
    def fingerprint(self) -> str:
        """One hash of it all."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class GroupSensitivity(BaseModel):
    """One group's trials."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    units: Positive
    cost: Whole
    """Parameters of one unit."""
    removed: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Units removed in each trial: the share, rounded, but one at least and not all."""
    deltas: tuple[Annotated[float, Field(ge=-MOST_NATS, le=MOST_NATS)], ...]
    """Rise of the held-out NLL in each trial, nats per token."""

    @model_validator(mode="after")
    def _check(self) -> "GroupSensitivity":
        if max(self.removed) > self.units or len(self.removed) != len(self.deltas):
            raise ValueError(f"removed must name numbers from 1 to {self.units}, and deltas one rise for each")
        return self

    @property
    def mean(self) -> float:
        """Mean rise over the trials, nats per token; shares that round to one number of units are one trial."""
        return fmean(dict(zip(self.removed, self.deltas, strict=True)).values())

    @property
    def shares(self) -> list[float]:
        """What was removed in each trial; with few units that may be far from the share asked for."""
        return [count / self.units for count in self.removed]

    @property
    def curve(self) -> "Curve":
        """Damage as a function of the share of units removed."""
        return fit_curve(self.shares, self.deltas)


@dataclass(frozen=True)
class Curve:
    """Damage in nats per token as a function of the share of units removed: straight from one point to the next.

    Never falls, and each further unit costs at least as much as the one before.
    """

    shares: tuple[float, ...]
    """Ascending, from 0."""
    damages: tuple[float, ...]

    def __call__(self, share: float) -> float:
        """The damage; beyond the last point it goes on as it came there."""
        after = min(max(bisect_left(self.shares, share), 1), len(self.shares) - 1)
        (left, right), (low, high) = self.shares[after - 1 : after + 1], self.damages[after - 1 : after + 1]
        return low + (high - low) * (share - left) / (right - left)


def fit_curve(shares: Sequence[float], deltas: Sequence[float]) -> Curve:
    """The greatest convex minorant of the points and the origin: the highest such curve that is nowhere above them.

    Damage below zero is noise and counts as none; beyond a point at which it falls again only the lower one counts.
    """
    points = dict(sorted(zip(shares, deltas, strict=True)))
    lowest_from_here_on = np.minimum.accumulate([*points.values()][::-1])[::-1]
    hull = [(0.0, 0.0)]
    for share, damage in zip(points, np.maximum(lowest_from_here_on, 0.0).tolist(), strict=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (share, damage)):
            hull.pop()
        hull.append((share, damage))
    return Curve(*zip(*hull, strict=True))


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


@dataclass(frozen=True)
class Prior:
    """What an analysis tells the allocation."""

    protected: frozenset[str]
    """Groups that lose nothing."""
    curves: Mapping[str, Curve]
    """Of each group alone."""
    together: Mapping[str, Curve] = field(default_factory=dict)
    """Of each kind in all layers at once; where it is not known, curves of groups are added up."""


class Sensitivity(Document):
    """The result of an analysis: plain data, JSON. A group of which all units must stay is not in it.

    The channels of a layer's experts are one group in it: they were pruned together.
    """

    called: ClassVar[str] = "sensitivity file"

    format: Literal["regrow-sensitivity-3"] = "regrow-sensitivity-3"
    conditions: Conditions
    dense_nll: Annotated[float, Field(ge=0, le=MOST_NATS)]
    """Of the whole model, nats per token."""
    groups: Annotated[dict[str, GroupSensitivity], Field(min_length=1)]
    together: Annotated[dict[str, GroupSensitivity], Field(min_length=1)]
    """Kind -> its groups in all layers pruned at once."""

    def describes(self, groups: Groups) -> bool:
        """Whether the analysis is of a model with these groups."""
        return {n: (g.units, g.cost) for n, g in self.groups.items()} == {
            name: (members[0].units, sum(group.cost for group in members))
            for name, members in families(groups).items()
            if members[0].units > members[0].least
        }

    def protected(self, share_cap: float = 0.15) -> tuple[str, ...]:
        """The outliers: mean damage above median + 3 · MAD (median absolute deviation), most sensitive first.

        Args:
            share_cap: at most this share of the groups.
        """
        means = {name: group.mean for name, group in self.groups.items()}
        middle = median(means.values())
        limit = middle + DEVIATIONS * median(abs(mean - middle) for mean in means.values())
        outliers = [name for name, mean in means.items() if mean > limit]
        outliers.sort(key=lambda name: -means[name])
        return tuple(outliers[: int(share_cap * len(means))])

    def prior(self, share_cap: float) -> Prior:
        """What the allocation makes use of; `share_cap` as in `protected`."""
        curves, together = ({n: g.curve for n, g in found.items()} for found in (self.groups, self.together))
        return Prior(frozenset(self.protected(share_cap)), curves, together)
