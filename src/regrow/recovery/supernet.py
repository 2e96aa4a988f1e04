"""Ready-made answers to "what if this group lost n units?": orders of elimination and refitted consumers.

Built in one pass over the dense model; a candidate plan is then tried by closing gates and copying weights in, which
costs next to nothing beside the forward pass that judges it. The refits are those on the dense prefix: good enough
to compare candidates; the chosen one is refitted properly, on its own pruned prefix, afterwards.

Memory: every rung of every group keeps one consumer weight (`O × K` of it), in the weight's own dtype on its device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.compensation.solve import elimination_order
from regrow.planning.depth import emptied_layers
from regrow.planning.search import Counts
from regrow.progress import Progress
from regrow.recovery.compensate import Compensator, Units
from regrow.recovery.losses import FullTarget, divergence
from regrow.recovery.scoring import linear_evidence
from regrow.structure.gates import Gates
from regrow.structure.groups import Group, Groups
from regrow.structure.prefix import LayerWalk


@dataclass(frozen=True)
class Rung:
    """A group with so many units fewer."""

    keep: Units
    channels_K: Tensor
    weight_OK: Tensor


class Supernet:
    """A dense model whose groups can be set to any rung of a ladder, and back."""

    def __init__(self, model: PreTrainedModel, gates: Gates, compensator: Compensator, depth: bool) -> None:
        """Take charge of a dense model.

        Args:
            depth: whether `gates` has those of whole layers; a layer all of whose units go is then closed.
        """
        self.model = model
        self.gates = gates
        self.compensator = compensator
        self.depth = depth
        self._groups: dict[str, Group] = {}
        self._rungs: dict[str, dict[int, Rung]] = {}
        self._whole: dict[str, Tensor] = {}
        self._now: Counts = {}

    def build(
        self, groups: Groups, rungs: Mapping[str, Sequence[int]], batches: Sequence[Tensor], progress: Progress
    ) -> None:
        """Order the units of every group and refit its consumer at every rung.

        Args:
            rungs: group name -> numbers of units removed to prepare for.
            batches: calibration token ids, each `[B, T]`.
        """
        self._all = groups
        walk = LayerWalk(self.model, batches)
        progress.stage("prepare search", len(groups.layers))
        for layer in groups.layers:
            for group in (group for group in groups if group.layer == layer.number):
                self._prepare(group, rungs.get(group.name, ()), walk)
            walk.advance()
            progress.advance()

    def _prepare(self, group: Group, rungs: Sequence[int], walk: LayerWalk) -> None:
        parameter = self._parameter(group)
        self._groups[group.name] = group
        self._whole[group.name] = parameter.detach().clone()
        self._now[group.name] = 0
        self._rungs[group.name] = {}
        wanted = [count for count in rungs if 0 < count < group.units]
        if not wanted:
            return
        moments = self.compensator.measure(group, walk)
        linear = linear_evidence(self.model, group.consumers[0])
        settings = self.compensator.settings
        weight_OC = linear.effective_weight(slice(None))
        ranked = elimination_order(
            weight_OC, moments, linear.positions, settings.damping, settings.rounds, stop=max(wanted)
        )
        order = ranked.cpu().numpy()
        for count in wanted:
            keep = np.delete(np.arange(group.units), order[:count])
            channels_K, weight_OK, _ = self.compensator.solve(group, keep, moments)
            self._rungs[group.name][count] = Rung(keep, channels_K, weight_OK.to(parameter.dtype))

    def _parameter(self, group: Group) -> torch.nn.Parameter:
        return self.model.get_parameter(group.consumers[0].parameter)

    @torch.no_grad()
    def set(self, counts: Mapping[str, int]) -> None:
        """Let every group named have lost so many units: one of its rungs, 0 (whole again) or all (with its layer)."""
        for name, count in counts.items():
            if count == self._now[name]:
                continue
            group, parameter = self._groups[name], self._parameter(self._groups[name])
            parameter.copy_(self._whole[name])
            present = torch.full((group.units,), float(count == 0))
            if 0 < count < group.units:
                rung = self._rungs[name][count]
                present[torch.from_numpy(rung.keep)] = 1.0
                weight_OC = parameter if group.consumers[0].axis == 1 else parameter.T
                weight_OC[:, rung.channels_K] = rung.weight_OK
            self.gates.set(name, present)
            self._now[name] = count
        if self.depth:
            emptied = emptied_layers(self._all, self._now)
            for layer in self._all.layers:
                self.gates.set(layer.unit, torch.tensor([float(layer.number not in emptied)]))

    def close(self) -> None:
        """Make the model whole, to the bit."""
        self.set(dict.fromkeys(self._now, 0))


class Fitness:
    """Mean KL of the dense model's predictions to a candidate's, nats per token (Týr-the-Pruner's fitness)."""

    def __init__(self, supernet: Supernet, batches: Sequence[Tensor]) -> None:
        self.supernet = supernet
        self.batches = [ids_BT.to(supernet.model.device) for ids_BT in batches]
        supernet.close()
        self._dense = [self._logits(ids_BT) for ids_BT in self.batches]

    @torch.no_grad()
    def _logits(self, ids_BT: Tensor) -> Tensor:
        self.supernet.model.eval()
        logits_BTV: Tensor = self.supernet.model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV

    def __call__(self, counts: Mapping[str, int]) -> float:
        """Set the candidate and measure it."""
        self.supernet.set(counts)
        pairs = zip(self._dense, self.batches, strict=True)
        values = [
            float(divergence(self._logits(ids_BT), FullTarget(dense_BTV, 1.0), 1.0)) for dense_BTV, ids_BT in pairs
        ]
        return sum(values) / len(values)
