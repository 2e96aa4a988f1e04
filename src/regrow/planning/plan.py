"""The plan: which units stay. Plain data that always speaks of the original model's units."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from regrow.errors import InputError
from regrow.structure.groups import Groups


class PlannedGroup(BaseModel):
    """One group's share of the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    units: int
    """How many the original model has."""
    cost: int
    """Parameters of one unit."""
    keep: tuple[int, ...]
    """Numbers of the units that stay, ascending."""

    @model_validator(mode="after")
    def _check(self) -> "PlannedGroup":
        if list(self.keep) != sorted(set(self.keep)):
            raise ValueError("keep must be ascending without repeats")
        if not self.keep or self.keep[0] < 0 or self.keep[-1] >= self.units:
            raise ValueError(f"keep must name at least one of the units 0 to {self.units - 1} and no others")
        return self


class Sparsity(BaseModel):
    """What a plan removes, as three ratios; papers use all three without saying which."""

    model_config = ConfigDict(frozen=True)

    units: float
    """Share of the units (KV heads and FFN channels counted alike)."""
    block: float
    """Share of the parameters of the blocks' linears."""
    total: float
    """Share of all parameters, embeddings included, tied ones once."""


class Plan(BaseModel):
    """Which units of which groups stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["regrow-plan-1"] = "regrow-plan-1"
    groups: dict[str, PlannedGroup]
    block_parameters: int
    """Of the original model, as `total_parameters`."""
    total_parameters: int

    @classmethod
    def whole(cls, groups: Groups) -> "Plan":
        """The plan that keeps everything."""
        return cls(
            groups={g.name: PlannedGroup(units=g.units, cost=g.cost, keep=tuple(range(g.units))) for g in groups},
            block_parameters=groups.block_parameters,
            total_parameters=groups.total_parameters,
        )

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read JSON.

        Raises:
            InputError: if it is not a plan.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError(f"not a valid plan: {place + ': ' if place else ''}{first['msg']}") from error

    def keeping(self, keep: Mapping[str, Sequence[int]]) -> "Plan":
        """This plan with other units kept in the groups named."""
        changed = {
            name: PlannedGroup(units=self.groups[name].units, cost=self.groups[name].cost, keep=tuple(sorted(units)))
            for name, units in keep.items()
        }
        return self.model_copy(update={"groups": {**self.groups, **changed}})

    @property
    def removed_parameters(self) -> int:
        """Parameters that the plan takes away."""
        return sum(group.cost * (group.units - len(group.keep)) for group in self.groups.values())

    @property
    def sparsity(self) -> Sparsity:
        """The three ratios."""
        units = sum(group.units for group in self.groups.values())
        kept = sum(len(group.keep) for group in self.groups.values())
        removed = self.removed_parameters
        return Sparsity(
            units=(units - kept) / units,
            block=removed / self.block_parameters,
            total=removed / self.total_parameters,
        )

    def positions_within(self, earlier: "Plan") -> dict[str, NDArray[np.int64]]:
        """For a model already cut to `earlier`: the numbers, among its units, of those that stay now.

        Only groups that change are named. Nothing that `earlier` removed may come back.
        """
        positions = {}
        for name, group in self.groups.items():
            before = earlier.groups[name].keep
            if group.keep != before:
                assert set(group.keep) <= set(before)
                positions[name] = np.searchsorted(before, group.keep)
        return positions

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the ratios for the reader."""
        return {**self.model_dump(), "sparsity": self.sparsity.model_dump()}

    @model_validator(mode="before")
    @classmethod
    def _ignore_ratios(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if key != "sparsity"} if isinstance(data, dict) else data
