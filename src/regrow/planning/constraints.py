"""What learned masks are held to: how much of what they can close may be expected to be open.

In the uniform shape every group has a share of its own, that of the widths which reach the target: the target
architecture of Sheared-LLaMA (arXiv 2310.06694). In the free shape, and where whole layers compete with widths, there
is one share for the whole model, of parameters (or of each kind's units): its code without a target architecture.

Shapes: M masks, one for each unit that may go and for each such layer; R shares; K constraints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regrow.planning.allocation import final_counts
from regrow.planning.demand import Demand, demands
from regrow.planning.depth import layer_price, outer_layers
from regrow.planning.sensitivity import Prior
from regrow.settings import Pruning
from regrow.structure.groups import Group, Groups

NO_LAYER = -1


@dataclass(frozen=True)
class Share:
    """Something of which a part may stay."""

    weights: Mapping[str, float]
    """Group or layer with masks -> what each of its masks is of the whole."""
    removed: float
    """The part of the whole that shall go."""
    constraint: str
    """Shares of the same constraint are held by the same multipliers."""


@dataclass(frozen=True)
class Constraints:
    """The masks of a model, one after the other, and what is asked of them."""

    masks: Mapping[str, int]
    """Group or layer -> how many masks it has, in their order."""
    layer_M: Int[Tensor, " masks"]
    """Where the mask of a unit's layer is: both must be open. `NO_LAYER` if it has none."""
    weight_M: Float[Tensor, " masks"]
    share_M: Int[Tensor, " masks"]
    removed_R: Float[Tensor, " shares"]
    constraint_R: Int[Tensor, " shares"]

    @classmethod
    def of(cls, groups: Groups, pruning: Pruning, prior: Prior | None = None) -> "Constraints":
        """What a recipe asks of a model.

        Args:
            groups: of the whole model.
            prior: what an analysis has found.
        """
        by_group = pruning.shape == "uniform" and "layer" not in pruning.kinds
        shares = _group_by_group(groups, pruning, prior) if by_group else _as_a_whole(groups, pruning, prior)
        units = {group.name: group.units for group in groups} | {layer.unit: 1 for layer in groups.layers}
        masks = {name: units[name] for share in shares for name in share.weights}
        begins = dict(zip(masks, torch.tensor([0, *masks.values()]).cumsum(0).tolist(), strict=False))
        above = {group.name: begins.get(f"layers.{group.layer}", NO_LAYER) for group in groups}
        kinds = list(dict.fromkeys(share.constraint for share in shares))
        parts = [(name, weight, row) for row, share in enumerate(shares) for name, weight in share.weights.items()]
        counts = torch.tensor([masks[name] for name, _, _ in parts])
        return cls(
            masks,
            torch.tensor([above.get(name, NO_LAYER) for name, _, _ in parts]).repeat_interleave(counts),
            torch.tensor([weight for _, weight, _ in parts]).repeat_interleave(counts),
            torch.tensor([row for _, _, row in parts]).repeat_interleave(counts),
            torch.tensor([share.removed for share in shares]),
            torch.tensor([kinds.index(share.constraint) for share in shares]),
        )

    def present(self, open_M: Float[Tensor, " masks"]) -> Float[Tensor, " masks"]:
        """How likely each is there: its own mask and its layer's open."""
        return open_M * torch.cat([open_M, torch.ones(1)])[self.layer_M]

    def removed(self, open_M: Float[Tensor, " masks"]) -> Float[Tensor, " shares"]:
        """The part of each share that is expected to go."""
        gone_M = self.weight_M * (1 - self.present(open_M))
        return torch.zeros_like(self.removed_R).index_add(0, self.share_M, gone_M)

    def lagrangian(
        self, open_M: Float[Tensor, " masks"], multipliers_2K: Float[Tensor, "2 constraints"], progress: float
    ) -> Float[Tensor, ""]:
        """`Σ_k mean(λ₁ₖ e + λ₂ₖ e²)` over the shares of constraint k, with e what is expected to stay beyond its due.

        The masks descend it, the multipliers ascend.

        Args:
            progress: how much of what shall go is asked for as yet, 0 to 1.
        """
        excess_R = progress * self.removed_R - self.removed(open_M)
        first_R, second_R = multipliers_2K[:, self.constraint_R]
        size_R = torch.bincount(self.constraint_R)[self.constraint_R]
        held_R: Tensor = first_R * excess_R + second_R * excess_R.square()
        return (held_R / size_R).sum()


def _group_by_group(groups: Groups, pruning: Pruning, prior: Prior | None) -> list[Share]:
    """Of each group that loses anything, the share of the widths that reach the target."""
    nothing = {group.name: 0 for group in groups}
    scores = {group.name: torch.zeros(group.units) for group in groups}
    lost = final_counts(groups, nothing, scores, pruning.model_copy(update={"allocation": "local"}), prior)
    return [Share({g.name: 1 / g.units}, lost[g.name] / g.units, g.kind) for g in groups if lost[g.name]]


def _as_a_whole(groups: Groups, pruning: Pruning, prior: Prior | None) -> list[Share]:
    """Of all that may go, one share; of each kind if its units are what is counted."""
    asked = demands(groups, {group.name: 0 for group in groups}, pruning, frozenset(), prior)
    found = []
    for number, demand in enumerate(asked):
        free = [group for group in demand.groups if demand.most(group)]
        weights = {group.name: demand.price[group.name] / demand.whole for group in free}
        if "layer" in pruning.kinds:
            weights |= _layer_weights(groups, pruning, demand, free)
        found.append(Share(weights, demand.amount / demand.whole, str(number)))
    return found


def _layer_weights(groups: Groups, pruning: Pruning, demand: Demand, free: Sequence[Group]) -> dict[str, float]:
    """What a whole layer brings beside the units that have masks of their own."""
    spared = outer_layers(groups, pruning)
    brings = {
        layer.number: 1 if pruning.basis == "units" else layer_price(layer, pruning)
        for layer in groups.layers
        if layer.number not in spared
    }
    for group in free:
        if group.layer in brings:
            brings[group.layer] -= group.units * demand.price[group.name]
    return {f"layers.{number}": rest / demand.whole for number, rest in brings.items()}
