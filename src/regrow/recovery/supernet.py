"""Ready-made answers to "what if this group lost n units?": orders of elimination and refitted consumers.

Built in one pass over the dense model; a candidate plan is then tried by closing gates and copying weights in, which
costs next to nothing beside the forward pass that judges it. Units go in the order in which the recipe would let them
go, and are made up for as the recipe would: a candidate is judged as what it will be. The refits are those on the
dense prefix: good enough to compare candidates; the chosen one is refitted properly, on its own pruned prefix,
afterwards. Where compensation goes into the adapters, it does so here, too, by factors that are nearly the best.

Memory: every refitted rung keeps one consumer weight (`O × K` of it) in the weight's own dtype, or one adapter; of a
large model they come to more than itself, so they lie in a file, see `Shelf`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.files import check_room
from regrow.planning.counts import Counts
from regrow.planning.depth import emptied_layers
from regrow.progress import Progress
from regrow.recovery.cached import top_distribution
from regrow.recovery.compensate import Compensator, Units, Write
from regrow.recovery.losses import TopTarget, divergence
from regrow.recovery.shelf import Shelf
from regrow.structure.gates import Gates
from regrow.structure.groups import Group, Groups
from regrow.structure.prefix import LayerWalk

TOP_K = 64


@dataclass(frozen=True)
class Rung:
    """A group with so many units fewer."""

    keep: Units
    refit: Sequence["Aside"] = ()
    """What becomes of the consumer's parameters, which are whole otherwise."""


@dataclass(frozen=True)
class Aside:
    """A write whose values lie on a shelf."""

    write: Write
    """Without its values."""
    read: Callable[[], Tensor]

    def do(self) -> None:
        """See `Write`."""
        replace(self.write, values=self.read()).do()


class Supernet:
    """A dense model whose groups can be set to any rung of a ladder, and back."""

    def __init__(
        self, model: PreTrainedModel, groups: Groups, gates: Gates, compensator: Compensator, scratch: Path
    ) -> None:
        """Take charge of a dense model.

        Args:
            gates: on the model. If they have those of whole layers, a layer all of whose units go is closed.
            scratch: a folder with room for the refits.
        """
        self.model = model
        self.groups = groups
        self.gates = gates
        self.compensator = compensator
        self._rungs: dict[str, dict[int, Rung]] = {group.name: {} for group in groups}
        self._whole: dict[str, list[Aside]] = {}
        """Group name -> what makes the parameters whole again that its refits write to."""
        self.scratch = scratch
        self._shelf = Shelf(scratch)
        self._now: Counts = dict.fromkeys(self._rungs, 0)

    def build(
        self,
        rungs: Mapping[str, Sequence[int]],
        scores: Mapping[str, Tensor],
        batches: Sequence[Tensor],
        progress: Progress,
    ) -> None:
        """Order the units of every group and refit its consumer at every rung.

        Args:
            rungs: group name -> numbers of units removed to prepare for.
            scores: group name -> one per unit, for the groups whose order is the criterion's.
            batches: calibration token ids, each `[B, T]`.

        Raises:
            InputError: if the refits would fill the disk.
        """
        check_room(
            self.scratch,
            self.room(rungs),
            "the search's refits",
            "a smaller search.levels, or search.evaluations=0, which goes without a search",
        )
        walk = LayerWalk(self.model, batches, self.compensator.processes)
        progress.stage("prepare search", len(self.groups.layers))
        for layer in self.groups.layers:
            for group in (group for group in self.groups if group.layer == layer.number):
                wanted = [count for count in rungs.get(group.name, ()) if 0 < count < group.units]
                if wanted:
                    self._rungs[group.name] = self._prepare(group, wanted, scores[group.name], walk)
            walk.advance()
            progress.advance()

    def room(self, rungs: Mapping[str, Sequence[int]]) -> int:
        """Bytes of disk that the refits of `rungs` will take, the whole weights beside them included."""
        total = 0.0
        for group in self.groups:
            wanted = [count for count in rungs.get(group.name, ()) if 0 < count < group.units]
            if wanted and self._treats(group):
                size = sum(each.numel() * each.element_size() for each in self.compensator.written_to(group))
                total += size * (1 + sum(1 - count / group.units for count in wanted))
        return round(total)

    def _treats(self, group: Group) -> bool:
        # A refit of every expert at every rung would take a multiple of the model.
        return group.expert is None and self.compensator.treats(group)

    def _prepare(self, group: Group, wanted: Sequence[int], scores_U: Tensor, walk: LayerWalk) -> dict[int, Rung]:
        settings = self.compensator.settings
        moments = self.compensator.measure(group, walk) if self._treats(group) else None
        if moments and settings.selection == "obs":
            order = self.compensator.order(group, moments, max(wanted))
        else:
            order = torch.argsort(scores_U, stable=True).cpu().numpy()
        keeps = {count: np.delete(np.arange(group.units), order[:count]) for count in wanted}
        if moments is None:
            return {count: Rung(keep) for count, keep in keeps.items()}
        everything = (slice(None),)
        self._whole[group.name] = [
            self._aside(Write(parameter, everything, parameter)) for parameter in self.compensator.written_to(group)
        ]
        return {
            count: Rung(keep, [self._aside(write) for write in self.compensator.writes(group, keep, moments)])
            for count, keep in keeps.items()
        }

    def _aside(self, write: Write) -> Aside:
        return Aside(replace(write, values=torch.empty(0)), self._shelf.put(write.values))

    def set(self, counts: Mapping[str, int]) -> None:
        """Let every group named have lost so many units: one of its rungs, 0 (whole again) or all (with its layer)."""
        for name, count in counts.items():
            if count == self._now[name]:
                continue
            group = self.groups.by_name(name)
            # A router wants experts to choose among also in a layer whose own gate is closed.
            left = group.units if group.kind == "expert" else group.units - count
            rung = Rung(np.arange(left)) if count in (0, group.units) else self._rungs[name][count]
            # In a weight a refit sets all that its units use, and what others use meets closed gates; but of an adapter
            # it may need fewer ranks than the one before.
            if count == 0 or self.compensator.settings.carrier == "adapter":
                for write in self._whole.get(name, ()):
                    write.do()
            for write in rung.refit:
                write.do()
            self.gates.keep(name, rung.keep)
            self._now[name] = count
        emptied = emptied_layers(self.groups, self._now)
        for layer in self.gates.layers:
            self.gates.set(layer.unit, torch.tensor([float(layer.number not in emptied)]))

    def close(self) -> None:
        """Make the model whole, to the bit."""
        self.set(dict.fromkeys(self._now, 0))


class Fitness:
    """Mean KL of the dense model's predictions to a candidate's, nats per token (Týr-the-Pruner's fitness).

    Of the dense model's only the `TOP_K` likeliest tokens are told apart, for all logits of all windows would outweigh
    a model with a large vocabulary: the others are one outcome, which can only make the divergence smaller.
    """

    def __init__(self, supernet: Supernet, batches: Sequence[Tensor]) -> None:
        self.supernet = supernet
        self.processes = supernet.compensator.processes
        parts = [ids_BT[self.processes.rows(len(ids_BT))] for ids_BT in batches]
        self.batches = [part.to(supernet.model.device) for part in parts]
        self._shares = [len(part) / len(ids_BT) for part, ids_BT in zip(parts, batches, strict=True)]
        """Of every batch, what this process measures."""
        supernet.close()
        with supernet.gates.opened(), self.processes.uneven():  # hidden channels may be behind closed ones
            self._dense = [self._likeliest(ids_BT) if len(ids_BT) else None for ids_BT in self.batches]

    def _likeliest(self, ids_BT: Tensor) -> TopTarget:
        return top_distribution(self._logits(ids_BT), TOP_K, 1.0)

    @torch.no_grad()
    def _logits(self, ids_BT: Tensor) -> Tensor:
        self.supernet.model.eval()
        logits_BTV: Tensor = self.supernet.model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV

    def __call__(self, counts: Mapping[str, int]) -> float:
        """Set the candidate and measure it."""
        self.supernet.set(counts)
        told = zip(self._dense, self.batches, self._shares, strict=True)
        with self.processes.uneven():
            own = [share * self._divergence(dense, ids_BT) for dense, ids_BT, share in told]
        values = self.processes.sum(own)
        return sum(values) / len(values)

    def _divergence(self, dense: TopTarget | None, ids_BT: Tensor) -> float:
        if dense is None:  # no row of the batch is this process'
            return 0.0
        return float(divergence(self._logits(ids_BT), dense, 1.0))
