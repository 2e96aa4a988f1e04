"""The plan: which units stay. Plain data that always speaks of the original model's units."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from regrow.planning.document import Document
from regrow.structure.groups import Groups


def layer_of(group: str) -> int:
    """The number in a group's name, `layers.<number>.<kind>`."""
    return int(group.split(".")[1])


def expert_of(group: str) -> tuple[str, int] | None:
    """Of the channels of an expert: the name of the experts' own group and the expert's number; None for others."""
    layers, number, *rest = group.split(".")
    if len(rest) == 1:
        return None
    return f"{layers}.{number}.expert", int(rest[0].removeprefix("expert"))


class PlannedGroup(BaseModel):
    """One group's share of the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    units: int
    """How many the original model has."""
    cost: int
    """Parameters of one unit."""
    keep: tuple[int, ...]
    """Numbers of the units that stay, ascending; none in a layer, or an expert, that is removed whole."""

    @model_validator(mode="after")
    def _check(self) -> "PlannedGroup":
        if list(self.keep) != sorted(set(self.keep)):
            raise ValueError("keep must be ascending without repeats")
        if self.keep and (self.keep[0] < 0 or self.keep[-1] >= self.units):
            raise ValueError(f"keep must name units from 0 to {self.units - 1} and no others")
        return self


class PlannedLayer(BaseModel):
    """What removing one layer whole would take away."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int
    block_parameters: int
    """Of its prunable linears."""


class Sparsity(BaseModel):
    """What a plan removes, as three ratios; papers use all three without saying which."""

    model_config = ConfigDict(frozen=True)

    units: float
    """Share of the units (KV heads, FFN channels and experts counted alike)."""
    block: float
    """Share of the parameters of the blocks' linears."""
    total: float
    """Share of all parameters, embeddings included, tied ones once."""


def _is_gone(name: str, groups: Mapping[str, PlannedGroup], removed_layers: Collection[int]) -> bool:
    """Whether a group is gone with its layer or its expert."""
    if layer_of(name) in removed_layers:
        return True
    expert = expert_of(name)
    return expert is not None and expert[0] in groups and expert[1] not in groups[expert[0]].keep


class Plan(Document):
    """Which units of which groups stay."""

    called: ClassVar[str] = "plan"

    format: Literal["regrow-plan-1"] = "regrow-plan-1"
    groups: dict[str, PlannedGroup]
    block_parameters: int
    """Of the original model, as `total_parameters`."""
    total_parameters: int
    layers: tuple[PlannedLayer, ...] = ()
    """The original model's; empty in plans from before layers could be removed."""
    removed_layers: tuple[int, ...] = ()
    """Numbers of the layers that are removed whole, ascending."""

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        if list(self.removed_layers) != sorted(set(self.removed_layers)):
            raise ValueError("removed_layers must be ascending without repeats")
        if not set(self.removed_layers) <= set(range(len(self.layers))):
            raise ValueError(f"removed_layers must name some of the {len(self.layers)} layers that the plan describes")
        if self.layers and len(self.removed_layers) == len(self.layers):
            raise ValueError("removed_layers names every layer; at least one must stay")
        for name, group in self.groups.items():
            if bool(group.keep) == _is_gone(name, self.groups, self.removed_layers):
                wanted = (
                    "none, for its layer (or expert) is removed" if group.keep else f"at least one of {group.units}"
                )
                raise ValueError(f"groups.{name}: keep must name {wanted}")
        return self

    @classmethod
    def whole(cls, groups: Groups) -> "Plan":
        """The plan that keeps everything."""
        return cls(
            groups={g.name: PlannedGroup(units=g.units, cost=g.cost, keep=tuple(range(g.units))) for g in groups},
            block_parameters=groups.block_parameters,
            total_parameters=groups.total_parameters,
            layers=tuple(
                PlannedLayer(parameters=layer.parameters, block_parameters=layer.block_parameters)
                for layer in groups.layers
            ),
        )

    def keeping(self, keep: Mapping[str, Sequence[int]], removed_layers: Iterable[int] = ()) -> "Plan":
        """This plan with other units kept in the groups named, and more layers removed whole."""
        removed = {*self.removed_layers, *removed_layers}

        def changed_to(names: Mapping[str, Sequence[int]]) -> dict[str, PlannedGroup]:
            return {
                name: PlannedGroup(
                    units=self.groups[name].units, cost=self.groups[name].cost, keep=tuple(sorted(units))
                )
                for name, units in names.items()
            }

        changed = changed_to(keep)
        changed |= changed_to({n: () for n in self.groups if _is_gone(n, {**self.groups, **changed}, removed)})
        return Plan(
            groups={**self.groups, **changed},
            block_parameters=self.block_parameters,
            total_parameters=self.total_parameters,
            layers=self.layers,
            removed_layers=tuple(sorted(removed)),
        )

    @property
    def removed_parameters(self) -> int:
        """Parameters that the plan takes away: of its units, and everything in the layers it removes."""
        return self._removed_units() + sum(self.layers[number].parameters for number in self.removed_layers)

    @property
    def removed_block_parameters(self) -> int:
        """Those of them that are in the blocks' linears."""
        return self._removed_units() + sum(self.layers[number].block_parameters for number in self.removed_layers)

    def _removed_units(self) -> int:
        return sum(
            group.cost * (group.units - len(group.keep))
            for name, group in self.groups.items()
            if layer_of(name) not in self.removed_layers
        )

    @property
    def sparsity(self) -> Sparsity:
        """The three ratios."""
        units = sum(group.units for group in self.groups.values())
        kept = sum(len(group.keep) for group in self.groups.values())
        return Sparsity(
            units=(units - kept) / units,
            block=self.removed_block_parameters / self.block_parameters,
            total=self.removed_parameters / self.total_parameters,
        )

    def positions_within(self, earlier: "Plan") -> dict[str, NDArray[np.int64]]:
        """For a model already cut to `earlier`: the numbers, among its units, of those that stay now.

        Only groups that change are named, with no units if their layer (or expert) goes whole. Nothing that `earlier`
        removed may come back.
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
