"""Groups: what can be removed from a model, unit by unit, and what each unit costs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from regrow.settings import Lora

RESIDUAL = "residual"
"""Name of the group of hidden channels."""


def without_lora(module: str) -> str:
    """The dotted name of a linear, given that of what LoRA has made of it or put beside it."""
    return module.removesuffix(".base_layer").partition(".lora_")[0]


@dataclass(frozen=True)
class Slice:
    """The positions along one axis of one parameter that each unit of a group owns."""

    parameter: str
    """Dotted name of the parameter in the model that was traced."""
    axis: int
    is_input: bool
    """Whether these are columns of a consumer (o_proj, down_proj) rather than rows of a producer."""
    index: NDArray[np.int64]
    """Shape `[units, positions per unit]`."""
    expert: int | None = None
    """Position along axis 0 of the expert whose part of the parameter the positions are in; None: in all of it."""

    @property
    def is_adapter(self) -> bool:
        """Whether the parameter belongs to a LoRA adapter."""
        return ".lora_" in self.parameter

    @property
    def module(self) -> str:
        """Dotted name of the linear (or norm), the same with and without LoRA around it."""
        return without_lora(self.parameter.rpartition(".")[0])

    def keep(self, units: NDArray[np.int64]) -> "Slice":
        """The slice of the same axis once only `units` (numbers within this slice) are left on it."""
        gone = np.delete(self.index, units, axis=0).reshape(-1)
        kept = self.index[units]
        return replace(self, index=kept - np.searchsorted(np.sort(gone), kept))


@dataclass(frozen=True)
class Group:
    """Units of one kind in one layer; a unit is a minimally removable structure."""

    name: str
    """`layers.<number>.<kind>`, of the channels of an expert `layers.<number>.expert<number>.ffn`: a plan's key;
    `residual` for the residual stream."""
    layer: int
    """The layer's `number`; -1 for the residual stream, which goes through all of them."""
    kind: str
    """`attention`: a unit is a KV head with its query heads. `ffn`: a channel. `expert`: an expert with its part of the
    router. `hidden`: a channel of the residual stream."""
    units: int
    slices: tuple[Slice, ...]
    cost: int
    """Parameters that removing one unit removes, adapters not counted; of an expert without those of its channels."""
    hidden: int = 0
    """How many of them lie on each hidden channel: what a hidden channel no longer brings once the unit is gone."""
    widths: Sequence[int] | None = None
    """How many of the units of the whole model may stay in a model of a stock class, ascending; None: any number."""
    expert: int | None = None
    """The number, in the model that was traced, of the expert whose channels these are."""
    multiple: int = 1
    """What the number of units that stay is a multiple of, unless all do."""
    least: int = 1
    """How many stay at least while their layer does."""
    bare_norms: tuple[str, ...] = ()
    """Of the residual stream: dotted names of the norms of it that have no weights."""

    def keep(self, units: NDArray[np.int64]) -> "Group":
        """The group once only `units` are left."""
        return replace(self, units=len(units), slices=tuple(s.keep(units) for s in self.slices))

    def only(self, units: NDArray[np.int64]) -> "Group":
        """Some of the units, nothing being cut: positions stay as they are."""
        return replace(self, units=len(units), slices=tuple(replace(s, index=s.index[units]) for s in self.slices))

    @property
    def base_kind(self) -> str:
        """The kind without the number that parts groups of one kind in a layer: `ffn` of `ffn2`."""
        return self.kind.rstrip("0123456789")

    @property
    def is_fused(self) -> bool:
        """Whether q, k and v come from one product: a unit then owns more rows of it than columns of the consumer."""
        widest = max((s.index.shape[1] for s in self.slices if not s.is_input), default=0)
        return self.kind == "attention" and widest > self.consumers[0].index.shape[1]

    @property
    def consumers(self) -> tuple[Slice, ...]:
        """The base weights whose columns the units own: where the gates sit."""
        return tuple(s for s in self.slices if s.is_input and not s.is_adapter)


@dataclass(frozen=True)
class Layer:
    """A decoder layer as a depth unit."""

    name: str
    """Dotted name of its module in the model as it is now."""
    number: int
    """In the model that was traced; a layer keeps it when layers before it are cut."""
    parameters: int
    block_parameters: int
    """Those of its modules that the groups have a share in, and of its opaque parts."""
    hidden: int = 0
    """Of `parameters`, those on each hidden channel."""
    block_hidden: int = 0
    """Of `block_parameters`."""

    @property
    def unit(self) -> str:
        """`layers.<number>`: the depth unit's name, beside the groups' `layers.<number>.<kind>`."""
        return f"layers.{self.number}"


@dataclass(frozen=True)
class Groups(Sequence[Group]):
    """What a model is made of, as far as pruning goes; a sequence of the groups within its layers."""

    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    linears: tuple[str, ...]
    """The prunable linears of the decoder layers: where LoRA goes."""
    block_parameters: int
    """Parameters of all modules that the groups have a share in, and of opaque parts."""
    total_parameters: int
    residual: Group | None = None
    """The hidden channels, coupled through all layers, embeddings, norms and head: a group that crosses all others, so
    that costs of it and of them multiply rather than add. None if the model has no such stream to narrow."""
    experts: Mapping[str, int] = field(default_factory=dict)
    """The prunable weights of experts -> how many experts a token goes to: LoRA goes there as well."""

    opaque: Mapping[str, str] = field(default_factory=dict)
    """Parts of layers that are left as they are -> the operator in them that tracing has no rule for."""

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Group, ...]: ...
    def __getitem__(self, index: int | slice) -> Group | tuple[Group, ...]:
        return self.groups[index]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def to_json(self) -> dict[str, object]:
        """Plain data: what `regrow inspect --json` prints."""
        return {
            "total_parameters": self.total_parameters,
            "block_parameters": self.block_parameters,
            "groups": [self._described(group) for group in self],
            "layers": [{"name": layer.name, "parameters": layer.parameters} for layer in self.layers],
            **({"opaque": dict(self.opaque)} if self.opaque else {}),
            **({} if self.residual is None else {"residual": self._described(self.residual)}),
        }

    def _described(self, group: Group) -> dict[str, object]:
        return {
            "name": group.name,
            "layer": group.layer,
            "kind": group.kind,
            "units": group.units,
            "parameters_per_unit": group.cost,
            "share_of_total": group.units * group.cost / self.total_parameters,
            "slices": [{"parameter": s.parameter, "axis": s.axis, "per_unit": s.index.shape[1]} for s in group.slices],
        }

    def by_name(self, name: str) -> Group:
        """The group of that name."""
        return self._by_name[name]

    def in_experts(self, kinds: Collection[str]) -> bool:
        """Whether any unit of these kinds is an expert, or lies within one."""
        of_experts = (group for group in self if group.expert is not None or group.kind == "expert")
        return any(group.base_kind in kinds for group in of_experts)

    def parameters(self, basis: str) -> int:
        """Of the whole model (`total`), or of what sparsity is a share of by default (`block`)."""
        return self.total_parameters if basis == "total" else self.block_parameters

    def expert_ranks(self, lora: Lora) -> dict[str, int]:
        """The weights of experts that are to be adapted -> the rank of an expert's own factors."""
        rank, targets = lora.expert_rank, lora.targets
        return {
            name: max(1, lora.rank // chosen) if rank is None else rank
            for name, chosen in self.experts.items()
            if rank != 0 and (not targets or name.rpartition(".")[2] in targets)
        }

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}
