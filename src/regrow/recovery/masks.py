"""Masks that are learned while the adapters train: targeted structured pruning, Sheared-LLaMA's (arXiv 2310.06694).

Every unit that may go has a log-alpha, from which each optimizer step draws its gate (`hard_concrete`). In one step

    the adapters descend       L(W, z)                         under the gates z that were drawn
    the log-alphas descend     L(W, z) + Σ_k λ₁ₖ e + λ₂ₖ e²    with e the expected share that is open beyond its due
    the multipliers λ ascend   that sum

and what is due falls linearly from everything to the target. dL/dz is what the gates tell (`Gates.recording`), so that
there is no gradient of a weight's shape and the base may be quantised; from z on it is a number for each unit.

The paper trains all weights; here LoRA does, as in every other recipe. What it leaves open, and what is chosen:

* Both learning rates are the paper's for the masks, constant; the code has its scheduler on them, too. AdamW's decay of
  squared gradients is its code's.
* In all processes and passes of a step the gates are the same; its code draws for each.

Shapes: M masks, B sequences, U units of a group, K constraints.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regrow.checkpoint.state import State, named
from regrow.planning.constraints import Constraints
from regrow.planning.schedule import cut_events
from regrow.planning.sensitivity import Prior
from regrow.processes import ALONE, Processes
from regrow.recipe import Recipe
from regrow.recovery.hard_concrete import LARGEST, deterministic, open_probability, sample
from regrow.recovery.learner import Learner, Step
from regrow.settings import Pruning
from regrow.structure.gates import Gates
from regrow.structure.groups import Group, Groups


def learned_masks(
    gates: Gates, groups: Groups, recipe: Recipe, prior: Prior | None = None, processes: Processes = ALONE
) -> "Masks | None":
    """The masks that a recipe wants to be learned before it cuts, if it does.

    Args:
        groups: of the whole model.
        prior: what an analysis has found.
    """
    pruning = recipe.pruning
    if pruning.schedule != "learned-mask":
        return None
    steps = max(cut_events(pruning, recipe.training.steps))
    return Masks(gates, Constraints.of(groups, pruning, prior), pruning, steps, recipe.seed, processes)


class Masks:
    """The masks of a whole model's units, and of its layers."""

    def __init__(
        self,
        gates: Gates,
        constraints: Constraints,
        pruning: Pruning,
        steps: int,
        seed: int,
        processes: Processes = ALONE,
    ) -> None:
        """All masks as good as open.

        Args:
            steps: for how many optimizer steps they are learned.
            processes: those that share the batches; all draw the same.
        """
        self.gates = gates
        self.constraints = constraints
        self.ramp = pruning.ramp * steps
        self.processes = processes
        self.log_alpha_M = nn.Parameter(torch.full((len(constraints.layer_M),), LARGEST))
        self.multipliers_2K = nn.Parameter(torch.zeros(2, int(constraints.constraint_R.max()) + 1))
        opposed: list[dict[str, Any]] = [
            {"params": [self.log_alpha_M]},
            {"params": [self.multipliers_2K], "maximize": True},
        ]
        self.optimizer = torch.optim.Adam(opposed, lr=pruning.mask_learning_rate, betas=(0.9, 0.95))
        self.generator = torch.Generator().manual_seed(seed)
        self._derivative_M = torch.zeros(len(self.log_alpha_M), dtype=torch.float64)
        """dL/dz of the step under way."""

    def train_step(self, learner: Learner) -> Step:
        """One optimizer step of the adapters, the masks and the multipliers, under gates that are drawn for it."""
        gate_M = sample(self.log_alpha_M, torch.rand(len(self.log_alpha_M), generator=self.generator))
        for name, value in self._parts(gate_M).items():
            self.gates.set(name, value)
        self._derivative_M.zero_()
        progress = min(1.0, learner.step_number / self.ramp) if self.ramp else 1.0
        return learner.step(
            lambda scale: self.gates.recording(1.0, self._count), partial(self._update, gate_M, progress)
        )

    def show(self) -> None:
        """Set the gates to what they would be without chance: what is measured between steps is measured so."""
        for name, value in self._parts(self.log_alpha_M.detach()).items():
            self.gates.set(name, deterministic(value))

    @torch.no_grad()
    def present(self, group: Group) -> Tensor:
        """How likely each unit of a group is there, float64 `[U]`; 1 for those that have no masks."""
        open_M = open_probability(self.log_alpha_M.detach().double())
        parts = self._parts(self.constraints.present(open_M))
        if group.name in parts:
            return parts[group.name]
        of_layer = self._parts(open_M).get(f"layers.{group.layer}", torch.ones(1, dtype=torch.float64))
        return of_layer.expand(group.units)

    def state(self) -> State:
        """Log-alphas, multipliers, the optimizer's moments of both, and chance."""
        learned = self._learned()
        of = self.optimizer.state
        moments = {f"{name}/{key}": v for name, p in learned.items() for key, v in of.get(p, {}).items()}
        chance = {"chance": self.generator.get_state()}
        return State(tensors=chance | named("learned", {**learned}) | named("moments", moments))

    def go_on(self, state: State) -> None:
        """Be where `state` was taken."""
        learned, moments = state.under("learned"), State(tensors=state.under("moments"))
        for name, parameter in self._learned().items():
            parameter.data.copy_(learned[name])
            if held := moments.under(name):
                self.optimizer.state[parameter] = dict(held)
        self.generator.set_state(state.tensors["chance"])

    def _learned(self) -> dict[str, nn.Parameter]:
        return {"log_alpha": self.log_alpha_M, "multipliers": self.multipliers_2K}

    def _parts(self, values_M: Tensor) -> Mapping[str, Tensor]:
        masks = self.constraints.masks
        return dict(zip(masks, torch.split(values_M, list(masks.values())), strict=True))

    def _count(self, name: str, c_BU: Tensor) -> None:
        if name in (parts := self._parts(self._derivative_M)):
            parts[name] += c_BU.double().cpu().sum(0)

    def _update(self, gate_M: Tensor, progress: float) -> bool:
        """Move masks and multipliers; False, and nothing is moved, if a derivative is not finite."""
        self.processes.add([self._derivative_M])
        if not math.isfinite(float(self._derivative_M.sum())):
            return False
        open_M = open_probability(self.log_alpha_M)
        held = self.constraints.lagrangian(open_M, self.multipliers_2K, progress)
        torch.autograd.backward([gate_M, held], [self._derivative_M.float(), None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.log_alpha_M.data.clamp_(-LARGEST, LARGEST)
        return True
