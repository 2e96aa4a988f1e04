"""Measure every group's sensitivity (LoRAShear, arXiv 2310.18356, Alg. 3): prune it alone, see the loss, restore.

The paper leaves shares, proxy and deviation open. Here a node group is one (layer, attention or ffn), its units
go in the order of a criterion's scores, and the deviation is the rise of the held-out NLL per token.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.data.tokens import Windows
from regrow.errors import InputError
from regrow.evaluation.perplexity import evaluation_mode, summed_loss
from regrow.planning.experts import families
from regrow.planning.sensitivity import Conditions, GroupSensitivity, Sensitivity
from regrow.processes import ALONE, Processes
from regrow.progress import Progress
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups
from regrow.structure.prefix import LayerWalk


def units_removed(share: float, units: int, least: int = 1) -> int:
    """The nearest number of units to a share of them: one at least, and `least` at least stay."""
    return min(max(math.floor(share * units + 0.5), 1), units - least)


def measure_sensitivity(
    model: PreTrainedModel,
    groups: Groups,
    scores: Mapping[str, Tensor],
    windows: Windows,
    shares: Sequence[float],
    progress: Progress,
    *,
    conditions: Conditions,
    processes: Processes = ALONE,
) -> Sensitivity:
    """Prune each group alone, at each share, through its gates; the model is left as it was found.

    The channels of a layer's experts are pruned together, as one group. In further trials the groups of a kind are
    pruned in all layers at once, which is what a kind loses where layers stay equal.

    Costs one dense pass over the windows, for each trial the layers from the pruned one on (over trials in all layers
    half of what whole passes would), and a whole pass for each kind at each share.

    Args:
        groups: of the whole model; those of which all units have to stay are passed over.
        scores: group name -> one score per unit; the lowest go.
        windows: held-out text.
        conditions: what the result is to say of itself; its batch size is used.
        processes: those that share the windows.

    Raises:
        InputError: if a loss is not finite.
    """
    alike = {name: each for name, each in families(groups).items() if each[0].units > each[0].least}
    removed = {
        name: [units_removed(share, group.units, group.least) for share in shares]
        for name, (group, *_) in alike.items()
    }
    kinds: dict[str, list[str]] = {}
    for name, (group, *_) in alike.items():
        kinds.setdefault(group.kind, []).append(name)
    progress.stage("sensitivity", sum(len(set(counts)) for counts in removed.values()) + len(kinds) * len(set(shares)))
    losses: dict[str, list[float]] = {}
    walk = LayerWalk(model, torch.split(windows.ids_NT, conditions.batch_size), processes)
    with evaluation_mode(model), Gates(model, groups.groups) as gates:
        trials = _Trials(walk, gates, groups, scores, progress)
        for kind, names in kinds.items():
            losses[kind] = [
                trials.run(
                    f"all layers without {share:g} of their {kind}",
                    {group.name: removed[name][number] for name in names for group in alike[name]},
                )
                for number, share in enumerate(shares)
            ]
        for layer in range(len(groups.layers)):
            for name in (name for name, members in alike.items() if members[0].layer == layer):
                losses[name] = [
                    trials.run(f"{name} without {count} units", {group.name: count for group in alike[name]})
                    for count in removed[name]
                ]
            if layer < len(groups.layers) - 1:
                walk.advance()
        dense = mean_loss(walk)
    trials.demand_finite(dense)

    def found(name: str, members: Sequence[str]) -> GroupSensitivity:
        return GroupSensitivity(
            units=sum(alike[member][0].units for member in members),
            cost=sum(group.cost for member in members for group in alike[member]),
            removed=tuple(sum(counts) for counts in zip(*(removed[member] for member in members), strict=True)),
            deltas=tuple(loss - dense for loss in losses[name]),
        )

    return Sensitivity(
        conditions=conditions,
        dense_nll=dense,
        groups={name: found(name, [name]) for name in alike},
        together={kind: found(kind, names) for kind, names in kinds.items()},
    )


def mean_loss(walk: LayerWalk) -> float:
    """NLL per token of the windows in all processes' walks, nats, from where they stand on; perhaps not finite."""
    losses = [
        summed_loss(logits_BTV[:, :-1], ids_BT[:, 1:].to(logits_BTV.device)).sum()
        for logits_BTV, ids_BT in zip(walk.finish(), walk.batches, strict=True)
    ]
    loss, tokens = walk.processes.sum([float(sum(losses)), sum(ids_BT[:, 1:].numel() for ids_BT in walk.batches)])
    return loss / tokens


class _Trials:
    """The loss without some units, from the layer on at which a walk stands."""

    def __init__(
        self, walk: LayerWalk, gates: Gates, groups: Groups, scores: Mapping[str, Tensor], progress: Progress
    ) -> None:
        self._walk, self._gates, self._progress = walk, gates, progress
        self._ranked = {group.name: torch.argsort(scores[group.name], stable=True).cpu() for group in groups}
        self._losses: dict[str, float] = {}

    def run(self, what: str, lost: Mapping[str, int]) -> float:
        """Nats per token while groups are without their lowest units; the same trial is not measured twice.

        Args:
            what: names the trial.
            lost: group name -> how many units it is without.
        """
        if what not in self._losses:
            for name, count in lost.items():
                self._gates.keep(name, self._ranked[name][count:].tolist())
            self._losses[what] = mean_loss(self._walk)
            for name in lost:
                self._gates.set(name, torch.ones(len(self._ranked[name])))
            self._progress.advance(1, f"{what}: loss {self._losses[what]:.3f}")
        return self._losses[what]

    def demand_finite(self, dense: float) -> None:
        """See that all losses are numbers, the whole model's first.

        Raises:
            InputError: if one is not.
        """
        for what, loss in {"the model as it is": dense, **self._losses}.items():
            if not math.isfinite(loss):
                raise InputError(
                    f"the held-out loss of {what} is {loss}; check the weights, and in float16 use bfloat16 or float32"
                )
