"""LHSPG, LoRAShear's progressive pruning with knowledge transfer (arXiv 2310.18356, Alg. 4), behind gates.

In a period of `T` steps a redundant unit goes to zero while the LoRA of all others, important ones, keeps
minimising the loss and so takes over what it knew. The paper's step `t`, in place, on the unit's variables x:

    y = x + s(BA)                 the optimizer's step, absorbed into x
    z = y − λ y/‖y‖               the trial point
    x ← 0 if <z, x> < ε‖x‖² else z    the half-space projection; then B ← 0

Here x are the unit's columns of its consumers as the model sees them, `x = g (W + sBA)`, with the unit's gate
`g`. The trial step is a factor on the gate, the absorbed displacement stays in the factors: the same function,
and no base weight is ever written, so that it may be quantised. What the paper leaves open, and what is chosen:

* λ ("from the length of the period"): `‖y‖ / (T − t)`. Then `z = y (T − t − 1)/(T − t)`, which is exactly zero
  at the end of the period; on the gate it is the linear fade from 1 to 0. It is also HESSO's shrink, from the
  same authors. The paper writes `x/‖x‖` for the direction, which would end beside zero.
* K/Tp units per period is read as K/P, since P periods must make K.
* P, T, ε, the warm-up: settings. A redundant unit does not come back.
* Only the columns shrink, not what the unit owns of its producers: that its output vanishes linearly suffices.

Two things differ from the form in place, none of them in a single step's arithmetic: the gradients of a
redundant unit's factors are scaled by its gate, and the producers' B keep their value (the Adam moments of all
factors of the unit are zeroed, `forget_moments`, lest they carry on what it was doing while important).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.criteria.evidence import Linear
from regrow.recovery.scoring import Factors, copy_factors, gather_evidence
from regrow.structure.groups import Group


class HalfSpace:
    """Says which of the units that fade in a period the projection sets to zero."""

    def __init__(self, model: PreTrainedModel, groups: Sequence[Group], epsilon: float) -> None:
        """Watch groups, as they are now, until they are cut.

        Args:
            epsilon: share of itself that must be left of a unit after a step, in [0, 1).
        """
        self.model = model
        self.groups = groups
        self.epsilon = epsilon
        self._before: Factors = {}

    def remember(self) -> None:
        """Keep the adapters as they are before an optimizer step."""
        self._before = copy_factors(self.model)

    def within(self, fading: Mapping[str, Tensor], shrink: float) -> dict[str, Tensor]:
        """The fading units that are still in their half-space after an optimizer step: `<z, x> ≥ ε‖x‖²`.

        The gate before the step, a factor of both x and z, cancels out.

        Args:
            fading: group name -> one truth value per unit.
            shrink: the factor on the gates of this trial step, `(T − t − 1)/(T − t)`.

        Returns:
            As `fading`, without the units that are projected to zero.
        """
        return {group.name: self._within(group, fading[group.name], shrink) for group in self.groups}

    @torch.no_grad()
    def _within(self, group: Group, fading: Tensor, shrink: float) -> Tensor:
        units = fading.nonzero().flatten()
        if len(units) == 0:
            return fading
        some = group.only(units.numpy())
        inner, square = torch.zeros(2, some.units)
        for after in gather_evidence(self.model, some, None, torch.Generator()).consumers:
            a, b = self._before.get(after.name, (None, None))
            products = _products(replace(after, lora_a=a, lora_b=b), after)
            inner += products[0]
            square += products[1]
        left = fading.clone()
        left[units] = shrink * inner >= self.epsilon * square
        return left


def _products(before: Linear, after: Linear) -> tuple[Tensor, Tensor]:
    """`<x, y>` and `‖x‖²` of every unit's columns, x before an optimizer step and y after it."""
    inner, square = torch.zeros(2, before.weight.shape[1], device=before.weight.device)
    for rows in before.row_blocks():
        x = before.effective_weight(rows)
        inner += (x * after.effective_weight(rows)).sum(0)
        square += x.square().sum(0)
    return before.per_unit(inner), before.per_unit(square)


@torch.no_grad()
def forget_moments(model: PreTrainedModel, group: Group, optimizer: torch.optim.Optimizer) -> None:
    """Zero the optimizer's moments of the LoRA factors that a group's units own: rows of B, columns of A."""
    for piece in group.slices:
        parameter = model.get_parameter(piece.parameter)
        if piece.is_adapter and parameter in optimizer.state:
            positions = torch.from_numpy(piece.index.reshape(-1)).to(parameter.device)
            for moment in optimizer.state[parameter].values():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                    moment.index_fill_(piece.axis, positions, 0.0)
