"""The plan: which units stay. Plain data that always speaks of the original model's units."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from regrow.planning.document import Document, Positive, Whole
from regrow.structure.groups import RESIDUAL, Group, Groups

GroupName = Annotated[str, Field(pattern=r"^layers\.[0-9]{1,6}\.(expert[0-9]{1,6}\.)?[a-z]+[0-9]{0,6}$")]


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

    units: Positive
    """How many the original model has."""
    cost: Whole
    """Parameters of one unit."""
    hidden: Whole = 0
    """How many of them lie on each hidden channel."""
    keep: tuple[Whole, ...]
    """Numbers of the units that stay, ascending; none in a layer, or an expert, that is removed whole."""

    @model_validator(mode="after")
    def _check(self) -> "PlannedGroup":
        if list(self.keep) != sorted(set(self.keep)):
            raise ValueError("keep must be ascending without repeats")
        if self.keep and self.keep[-1] >= self.units:
            raise ValueError(f"keep must name units from 0 to {self.units - 1} and no others")
        return self

    @classmethod
    def whole(cls, group: Group) -> "PlannedGroup":
        """All of a group's units."""
        return cls(units=group.units, cost=group.cost, hidden=group.hidden, keep=tuple(range(group.units)))

    @property
    def removed(self) -> int:
        """Units that go."""
        return self.units - len(self.keep)


class PlannedLayer(BaseModel):
    """What removing one layer whole would take away."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: Whole
    block_parameters: Whole
    """Of its prunable linears."""
    hidden: Whole = 0
    """Of `parameters`, those on each hidden channel."""
    block_hidden: Whole = 0
    """Of `block_parameters`."""


class Sparsity(BaseModel):
    """What a plan removes, as three ratios; papers use all three without saying which."""

    model_config = ConfigDict(frozen=True)

    units: float
    """Share of the units (KV heads, FFN channels and experts counted alike, and hidden channels if any go)."""
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
    groups: Annotated[dict[GroupName, PlannedGroup], Field(min_length=1)]
    block_parameters: Positive
    """Of the original model, as `total_parameters`."""
    total_parameters: Positive
    layers: tuple[PlannedLayer, ...] = ()
    """The original model's; empty in plans from before layers could be removed."""
    removed_layers: tuple[Whole, ...] = ()
    """Numbers of the layers that are removed whole, ascending."""
    residual: PlannedGroup | None = None
    """The hidden channels, which cross everything else; none in plans from before they could be removed."""

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        if list(self.removed_layers) != sorted(set(self.removed_layers)):
            raise ValueError("removed_layers must be ascending without repeats")
        if not set(self.removed_layers) <= set(range(len(self.layers))):
            raise ValueError(f"removed_layers must name some of the {len(self.layers)} layers that the plan describes")
        if self.layers and len(self.removed_layers) == len(self.layers):
            raise ValueError("removed_layers names every layer; at least one must stay")
        if self.residual is not None and not self.residual.keep:
            raise ValueError("residual: keep must name at least one hidden channel")
        for name, group in self.groups.items():
            if bool(group.keep) == _is_gone(name, self.groups, self.removed_layers):
                wanted = (
                    "none, for its layer (or expert) is removed" if group.keep else f"at least one of {group.units}"
                )
                raise ValueError(f"groups.{name}: keep must name {wanted}")
        if not 0 <= self.removed_parameters < self.total_parameters:
            raise ValueError(f"removes {self.removed_parameters:,} of {self.total_parameters:,} parameters")
        if not 0 <= self.removed_block_parameters <= self.block_parameters:
            raise ValueError(f"removes {self.removed_block_parameters:,} of {self.block_parameters:,} in the blocks")
        return self

    @classmethod
    def whole(cls, groups: Groups) -> "Plan":
        """The plan that keeps everything."""
        return cls(
            groups={group.name: PlannedGroup.whole(group) for group in groups},
            block_parameters=groups.block_parameters,
            total_parameters=groups.total_parameters,
            layers=tuple(
                PlannedLayer(
                    parameters=layer.parameters,
                    block_parameters=layer.block_parameters,
                    hidden=layer.hidden,
                    block_hidden=layer.block_hidden,
                )
                for layer in groups.layers
            ),
            residual=None if groups.residual is None else PlannedGroup.whole(groups.residual),
        )

    def keeping(self, keep: Mapping[str, Sequence[int]], removed_layers: Iterable[int] = ()) -> "Plan":
        """This plan with other units kept in the groups named, `residual` perhaps, and more layers removed whole."""
        removed = {*self.removed_layers, *removed_layers}
        changed = {name: _keeping(self.groups[name], units) for name, units in keep.items() if name != RESIDUAL}
        then = {**self.groups, **changed}
        changed |= {name: _keeping(group, ()) for name, group in then.items() if _is_gone(name, then, removed)}
        residual = self.residual
        if residual is not None and RESIDUAL in keep:
            residual = _keeping(residual, keep[RESIDUAL])
        return Plan(
            groups={**self.groups, **changed},
            block_parameters=self.block_parameters,
            total_parameters=self.total_parameters,
            layers=self.layers,
            removed_layers=tuple(sorted(removed)),
            residual=residual,
        )

    @property
    def parts(self) -> dict[str, PlannedGroup]:
        """All groups by name, `residual` among them if there is one."""
        return self.groups if self.residual is None else {**self.groups, RESIDUAL: self.residual}

    @property
    def narrows(self) -> bool:
        """Whether hidden channels go."""
        return self.residual is not None and self.residual.removed > 0

    @property
    def removed_parameters(self) -> int:
        """Parameters that the plan takes away: of its units, and everything in the layers it removes."""
        on_channel = 0 if self.residual is None else self.residual.cost
        return self._removed(
            sum(self.layers[number].parameters for number in self.removed_layers),
            on_channel - sum(self.layers[number].hidden for number in self.removed_layers),
        )

    @property
    def removed_block_parameters(self) -> int:
        """Those of them that are in the blocks' linears."""
        left = [layer for number, layer in enumerate(self.layers) if number not in self.removed_layers]
        return self._removed(
            sum(self.layers[number].block_parameters for number in self.removed_layers),
            sum(layer.block_hidden for layer in left),
        )

    def _removed(self, of_layers: int, on_channel: int) -> int:
        """What goes with layers, with units of the others, and with hidden channels of what is then left.

        Args:
            on_channel: parameters on a hidden channel in the layers that stay (and outside of all).
        """
        stay = [group for name, group in self.groups.items() if layer_of(name) not in self.removed_layers]
        of_units = sum(group.cost * group.removed for group in stay)
        channels = 0 if self.residual is None else self.residual.removed
        return of_layers + of_units + channels * (on_channel - sum(group.hidden * group.removed for group in stay))

    @property
    def sparsity(self) -> Sparsity:
        """The three ratios."""
        counted = self.parts if self.narrows else self.groups
        units = sum(group.units for group in counted.values())
        kept = sum(len(group.keep) for group in counted.values())
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
        before_of = earlier.parts
        for name, group in self.parts.items():
            before = before_of[name].keep
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


def _keeping(group: PlannedGroup, units: Iterable[int]) -> PlannedGroup:
    return PlannedGroup(units=group.units, cost=group.cost, hidden=group.hidden, keep=tuple(sorted(units)))
