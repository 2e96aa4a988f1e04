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
    trials = {
        name: [units_removed(share, group.units, group.least) for share in shares]
        for name, (group, *_) in alike.items()
    }
    kinds: dict[str, list[str]] = {}
    for name, (group, *_) in alike.items():
        kinds.setdefault(group.kind, []).append(name)
    progress.stage("sensitivity", sum(len(set(counts)) for counts in trials.values()) + len(kinds) * len(shares))
    losses: dict[str, dict[int, float]] = {name: {} for name in trials}
    together: dict[str, list[float]] = {kind: [] for kind in kinds}
    walk = LayerWalk(model, torch.split(windows.ids_NT, conditions.batch_size), processes)
    ranked = {group.name: torch.argsort(scores[group.name], stable=True).cpu() for group in groups}
    with evaluation_mode(model), Gates(model, groups.groups) as gates:
        for kind, names in kinds.items():
            for number, share in enumerate(shares):
                lost = {group.name: trials[name][number] for name in names for group in alike[name]}
                together[kind].append(loss := _trial(walk, gates, ranked, lost))
                progress.advance(1, f"{kind} of all layers, {share:.0%} less: loss {loss:.3f}")
        for layer in range(len(groups.layers)):
            for name, members in alike.items():
                if members[0].layer != layer:
                    continue
                for count in dict.fromkeys(trials[name]):
                    loss = _trial(walk, gates, ranked, {group.name: count for group in members})
                    losses[name][count] = loss
                    progress.advance(1, f"{name} without {count} of {members[0].units}: loss {loss:.3f}")
            if layer < len(groups.layers) - 1:
                walk.advance()
        dense = mean_loss(walk)
    _demand_finite("the model as it is", dense)
    for name, measured in losses.items():
        for count, loss in measured.items():
            _demand_finite(f"{name} without {count} units", loss)
    for kind, each in together.items():
        for share, loss in zip(shares, each, strict=True):
            _demand_finite(f"the model with {share:.0%} less {kind} in all layers", loss)
    return Sensitivity(
        conditions=conditions,
        dense_nll=dense,
        groups={
            name: GroupSensitivity(
                units=members[0].units,
                cost=sum(group.cost for group in members),
                removed=tuple(trials[name]),
                deltas=tuple(losses[name][count] - dense for count in trials[name]),
            )
            for name, members in alike.items()
        },
        together={
            kind: GroupSensitivity(
                units=sum(alike[name][0].units for name in names),
                cost=sum(group.cost for name in names for group in alike[name]),
                removed=tuple(sum(counts) for counts in zip(*(trials[name] for name in names), strict=True)),
                deltas=tuple(loss - dense for loss in together[kind]),
            )
            for kind, names in kinds.items()
        },
    )


def mean_loss(walk: LayerWalk) -> float:
    """NLL per token of the windows in all processes' walks, nats, from where they stand on; perhaps not finite."""
    losses = [
        summed_loss(logits_BTV[:, :-1], ids_BT[:, 1:].to(logits_BTV.device)).sum()
        for logits_BTV, ids_BT in zip(walk.finish(), walk.batches, strict=True)
    ]
    loss, tokens = walk.processes.sum([float(sum(losses)), sum(ids_BT[:, 1:].numel() for ids_BT in walk.batches)])
    return loss / tokens


def _trial(walk: LayerWalk, gates: Gates, ranked: Mapping[str, Tensor], lost: Mapping[str, int]) -> float:
    for name, count in lost.items():
        gates.keep(name, ranked[name][count:].tolist())
    loss = mean_loss(walk)
    for name in lost:
        gates.set(name, torch.ones(len(ranked[name])))
    return loss


def _demand_finite(what: str, loss: float) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"the held-out loss of {what} is {loss}; check the weights, and in float16 use bfloat16 or float32"
        )
