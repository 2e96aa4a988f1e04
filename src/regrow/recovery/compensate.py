"""Compensation: before a cut, let the units that stay take over what they can of those that go.

One group at a time, in the order of the forward pass, on the inputs that the already pruned prefix gives: streamed
moments of the consumer's input, taken while the units are still there; selection, if wanted; the refit; then the
gates close and the walk goes on. Targets are the outputs of the weights as they are (adapters included) on the
pruned prefix, not the dense model's: chasing the dense outputs does harm once the residual stream has drifted.

An expert's down projection is refitted on the tokens that are sent to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.checkpoint.biases import lone_consumers, possible_biases
from regrow.compensation.moments import InputMoments, at_once
from regrow.compensation.solve import (
    bias_only,
    elimination_order,
    least_squares,
    least_squares_with_bias,
    low_rank,
    output_error,
)
from regrow.criteria.evidence import Linear
from regrow.criteria.registry import Criterion
from regrow.errors import InputError
from regrow.processes import ALONE, Processes
from regrow.progress import Progress
from regrow.recovery.measured import Measured
from regrow.recovery.pooling import add_up
from regrow.recovery.scoring import gather_evidence, linear_evidence
from regrow.settings import Compensation
from regrow.structure.biases import add_bias
from regrow.structure.expert_lora import lora_of
from regrow.structure.gates import Gates
from regrow.structure.groups import Group, Groups
from regrow.structure.prefix import LayerWalk, watching_inputs
from regrow.structure.quantised import kept_as, weight_shape

Units = NDArray[np.int64]

SWEEPS = 2
"""Of the factors that an adapter would carry in a candidate of a search."""
EXACT, MANY_SWEEPS = 1024, 16
"""Up to so many rows or columns the chosen candidate's are exact. Of larger matrices all singular vectors take long;
after these sweeps the factors take away the same share of the error, to some thousandths."""


Index = tuple[slice | Tensor, ...]


@dataclass(frozen=True)
class Change:
    """What a refit adds to some entries of a parameter."""

    parameter: Tensor
    index: Index
    before: Tensor
    """What they were. This, and what is added, lies on the CPU."""
    added: Tensor

    @torch.no_grad()
    def put(self, share: float) -> None:
        """Add a share of it to what they were, rounded once: step by step, a coarse dtype would round every time."""
        before, added = (part.to(self.parameter.device).float() for part in (self.before, self.added))
        self.parameter[self.index] = torch.add(before, added, alpha=share).to(self.parameter.dtype)


@dataclass
class Compensated:
    """What a pass has done; `blend` can scale it."""

    keep: dict[str, Units] = field(default_factory=dict)
    """Group name -> numbers of the units that stay, among those there were."""
    repaired: dict[str, float] = field(default_factory=dict)
    """Group name -> share of the cut's output error that the refit took away, on the tokens seen; 0: left out."""
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True)
class Write:
    """What some entries of a parameter become."""

    parameter: Tensor
    index: Index
    values: Tensor

    @torch.no_grad()
    def do(self) -> None:
        """Let them become it."""
        self.parameter[self.index] = self.values.to(self.parameter.device)


class Compensator:
    """Refits the consumers of a gated model."""

    def __init__(
        self,
        model: PreTrainedModel,
        gates: Gates,
        settings: Compensation,
        criterion: Criterion | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Take charge of a model.

        Args:
            criterion: what selects, with `selection: prefix`.
            processes: those that share the batches; what they measure is put together, and each refits its own model.
        """
        self.processes = processes
        self.model = model
        self.criterion = criterion
        self.gates = gates
        self.settings = settings
        self._ahead: dict[str, InputMoments] = {}
        """Group name -> what has been measured along with another expert's."""

    def make_room(self, groups: Groups) -> None:
        """Give every consumer that can have one a bias of zero, if biases are what compensates."""
        if self.settings.method == "bias":
            for name in possible_biases(self.model.config, groups):
                consumer = next(c for c in lone_consumers(groups) if c.module == name)
                add_bias(self.model, consumer.parameter.rpartition(".")[0])

    def run(
        self, groups: Groups, keep: Mapping[str, Units], batches: Sequence[Tensor], progress: Progress
    ) -> Compensated:
        """Refit every group that loses units, and close their gates.

        Args:
            groups: as the model's tensors are now.
            keep: group name -> numbers of the units that are to stay; only how many, unless the criterion selects.
            batches: token ids, each `[B, T]`, the same in every process.

        Returns:
            What was chosen and done. The model's base weights (or adapters) have changed.
        """
        done = Compensated()
        walk = LayerWalk(self.model, batches, self.processes)
        last = max((groups.by_name(name).layer for name in keep), default=-1)
        numbers = [layer.number for layer in groups.layers if layer.number <= last]
        progress.stage("compensate", len(numbers))
        for number in numbers:
            here = [group for group in groups if group.layer == number and group.name in keep]
            for group in here:
                self._treat(group, keep[group.name], walk, done, here)
            walk.advance()
            progress.advance()
        return done

    def _treat(self, group: Group, keep: Units, walk: LayerWalk, done: Compensated, here: Sequence[Group]) -> None:
        if self.settings.selection == "prefix" and 0 < len(keep) < group.units:
            keep = self._without(group, self.lowest(group, walk, group.units - len(keep)))
        if self.treats(group) and len(keep):
            moments = self.measure(group, walk) if group.expert is None else self._of_expert(group, walk, here)
            if self.settings.selection == "obs" and moments.tokens:
                count = group.units - len(keep)
                keep = self._without(group, self.order(group, moments, count))
            if moments.tokens:  # no token may have come to an expert
                done.repaired[group.name] = self._refit(group, keep, moments, done)
        done.keep[group.name] = keep
        self.gates.keep(group.name, keep)

    def _without(self, group: Group, gone: Units) -> Units:
        """All units but those that the main process lets go."""
        return np.delete(np.arange(group.units), self.processes.same(gone.tolist()))

    def writes_base(self, groups: Groups) -> bool:
        """Whether parameters of the base change: all refits but those that adapters carry alone."""
        treated = [group for group in groups if self.treats(group)]
        return any(self.settings.carrier == "base" or self._bias(group) is not None for group in treated)

    @property
    def written(self) -> frozenset[str]:
        """Which parameters of a consumer a refit may write to."""
        only = self.settings.method == "bias" or self.settings.carrier == "adapter"
        return frozenset({"bias"} if only else {"weight", "bias"})

    def parameters(self, group: Group) -> set[str]:
        """The names of the parameters of a group's consumer that a refit may write to."""
        consumer = group.consumers[0]
        if group.expert is not None:
            return {consumer.parameter} if "weight" in self.written else set()
        module = consumer.parameter.rpartition(".")[0]
        there = dict(self.model.get_submodule(module).named_parameters(recurse=False))
        return {f"{module}.{name}" for name in there.keys() & self.written}

    def treats(self, group: Group) -> bool:
        """Whether the recipe wants a refit, and there is one consumer that can be given it.

        Experts are given none by biases, nor by adapters that they do not have (`lora.expert_rank=0`).
        """
        if self.settings.method == "none" or len(group.consumers) != 1:
            return False
        if group.expert is None:
            return True
        consumer = group.consumers[0]
        adapter = lora_of(self.model.get_submodule(consumer.module), consumer.parameter.rpartition(".")[2])
        return self.settings.method != "bias" and (self.settings.carrier == "base" or adapter is not None)

    def measure(self, group: Group, walk: LayerWalk) -> InputMoments:
        """Moments of the input of a group's consumer; the walk stands before the group's layer."""
        consumer = group.consumers[0]
        weight = self.model.get_parameter(consumer.parameter)
        moments = InputMoments.zeros(weight_shape(weight)[consumer.axis], weight.device)
        with watching_inputs(self.model.get_submodule(consumer.module), moments.add):
            walk.run()
        add_up(self.processes, [moments])
        if not moments.tokens:
            raise InputError(
                f"compensation: what flows into {consumer.module} is not finite in any batch; look for NaN or infinity "
                "in the weights, or set compensation.method=none"
            )
        return moments

    def _of_expert(self, group: Group, walk: LayerWalk, here: Sequence[Group]) -> InputMoments:
        """As `measure`, times the routing weights: so does an error come into the layer's output.

        Experts beside one another feel nothing of each other's cuts: as many as fit are measured in one run.

        Args:
            here: the groups of the layer that lose units, in their order.
        """
        if group.name not in self._ahead:
            consumer = group.consumers[0]
            weight = self.model.get_parameter(consumer.parameter)
            channels = weight.shape[consumer.axis]
            rest = [each for each in here if each.expert is not None and each.consumers[0].module == consumer.module]
            together = rest[rest.index(group) :][: at_once(channels)]
            found = {each.consumers[0].expert: InputMoments.zeros(channels, weight.device) for each in together}

            def see(h_SF: Tensor, expert_S: Tensor, weight_S: Tensor) -> None:
                weighted_SF = h_SF.detach() * weight_S.detach()[:, None]
                for expert, moments in found.items():
                    moments.add(weighted_SF[expert_S == expert])

            with self.gates.watching(consumer.module, see):
                walk.run()
            self._ahead = {each.name: found[each.consumers[0].expert] for each in together}
            add_up(self.processes, list(found.values()))
        return self._ahead.pop(group.name)

    def lowest(self, group: Group, walk: LayerWalk, count: int) -> Units:
        """The `count` units of least score on the pruned prefix; the walk stands before the group's layer."""
        assert self.criterion is not None
        measured = Measured(self.model, self.criterion.needs, seed=0, perturbations=1)
        measured.watch([group])
        with measured.recording(1.0):
            walk.run()
        add_up(self.processes, measured.moments)
        scores = self.criterion.score(gather_evidence(self.model, group, None, torch.Generator(), measured=measured))
        assert isinstance(scores, Tensor)
        return torch.argsort(scores, stable=True)[:count].numpy()

    def order(self, group: Group, moments: InputMoments, count: int) -> Units:
        """The first `count` units to go by greedy optimal brain surgeon, in their order."""
        linear = linear_evidence(self.model, group.consumers[0])
        weight_OC, damping = linear.effective_weight(slice(None)), self.settings.damping
        gone = elimination_order(weight_OC, moments, linear.positions, damping, self.settings.rounds, stop=count)
        return gone.cpu().numpy()

    def solve(self, group: Group, keep: Units, moments: InputMoments) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(kept channels [K], their new weights [O, K], what to add to the bias [O] or None)`, float64."""
        linear = linear_evidence(self.model, group.consumers[0])
        weight_OC, bias = linear.effective_weight(slice(None)), self._bias(group)
        kept_K = linear.positions[torch.from_numpy(keep)].flatten()
        damping = self.settings.damping
        if self.settings.method == "bias":
            extra = None if bias is None else bias_only(weight_OC, moments, kept_K)
            return kept_K, weight_OC[:, kept_K].double(), extra
        if bias is None:
            return kept_K, least_squares(weight_OC, moments, kept_K, damping), None
        return kept_K, *least_squares_with_bias(weight_OC, moments, kept_K, damping)

    @torch.no_grad()
    def _refit(self, group: Group, keep: Units, moments: InputMoments, done: Compensated) -> float:
        linear = linear_evidence(self.model, group.consumers[0])
        weight_OC = linear.effective_weight(slice(None)).double()
        kept_K, fitted_OK, extra = self.solve(group, keep, moments)
        change_OK = fitted_OK - weight_OC[:, kept_K]
        parameter, bias = self.model.get_parameter(group.consumers[0].parameter), self._bias(group)
        before = output_error(weight_OC, moments, kept_K, weight_OC[:, kept_K])
        writes: list[Write] = []
        if self.settings.carrier == "adapter":
            sweeps = MANY_SWEEPS if min(change_OK.shape) > EXACT else None
            writes = self.adapter_writes(linear, change_OK, moments, kept_K, sweeps)
            factor_b, factor_a = (write.values.double() for write in writes)
            written_OK = linear.scaling * factor_b @ factor_a
        else:
            written_OK = change_OK.to(parameter.dtype).double()
        rounded_O = extra if bias is None or extra is None else extra.to(bias.dtype).double()
        after = output_error(weight_OC, moments, kept_K, weight_OC[:, kept_K] + written_OK, rounded_O)
        if not after < before:  # nothing to repair, or rounding to the weights' dtype outweighs it
            return 0.0
        if bias is not None and extra is not None:
            self._add(bias, (slice(None),), extra, done)
        for write in writes:
            write.do()
        if not writes and self.settings.method == "least-squares":
            expert, axis = group.consumers[0].expert, group.consumers[0].axis
            last = axis == parameter.ndim - 1
            index: Index = (slice(None), kept_K) if last else (kept_K,)
            place = parameter if expert is None else parameter[expert]
            self._add(place, index, change_OK if last else change_OK.T, done)
        return 1 - after / before

    def _add(self, parameter: Tensor, index: Index, added: Tensor, done: Compensated) -> None:
        assert kept_as(parameter) is None, "a quantised weight is not written to"
        before = parameter.detach()[index].to("cpu", copy=True)
        done.changes.append(Change(parameter.detach(), index, before, added.to("cpu", parameter.dtype)))
        done.changes[-1].put(1.0)

    def written_to(self, group: Group) -> list[Tensor]:
        """What `writes` writes to."""
        consumer, bias = group.consumers[0], self._bias(group)
        biases = [] if bias is None else [bias.detach()]
        if "weight" in self.written:
            return [self.model.get_parameter(consumer.parameter).detach(), *biases]
        linear = linear_evidence(self.model, consumer)
        factors = [linear.lora_a, linear.lora_b] if self.settings.carrier == "adapter" else []
        return [factor.detach() for factor in factors if factor is not None] + biases

    def writes(self, group: Group, keep: Units, moments: InputMoments) -> list[Write]:
        """What becomes of a consumer's parameters if a group keeps these units; in an adapter, nearly that."""
        consumer, bias = group.consumers[0], self._bias(group)
        kept_K, fitted_OK, extra_O = self.solve(group, keep, moments)
        found = []
        if bias is not None and extra_O is not None:
            found.append(Write(bias, (slice(None),), bias.detach() + extra_O.to(bias.dtype)))
        if "weight" in self.written:
            parameter = self.model.get_parameter(consumer.parameter)
            values_OK = fitted_OK.to(parameter.dtype)
            if consumer.axis == 1:
                found.append(Write(parameter, (slice(None), kept_K), values_OK))
            else:
                found.append(Write(parameter, (kept_K,), values_OK.T))
        elif self.settings.carrier == "adapter":
            linear = linear_evidence(self.model, consumer)
            change_OK = fitted_OK - linear.effective_weight(slice(None))[:, kept_K].double()
            found += self.adapter_writes(linear, change_OK, moments, kept_K, SWEEPS)
        return found

    def adapter_writes(
        self, linear: Linear, change_OK: Tensor, moments: InputMoments, kept_K: Tensor, sweeps: int | None = None
    ) -> list[Write]:
        """What lets an untrained adapter begin at the best approximation of a change that its rank allows.

        Args:
            sweeps: as for `low_rank`.

        Raises:
            InputError: if the linear has no adapter.
        """
        if linear.lora_a is None or linear.lora_b is None:
            raise InputError(
                f"compensation.carrier=adapter: {linear.name} has no adapter; name {linear.name.rpartition('.')[2]} in "
                "lora.targets too, or set compensation.method=none"
            )
        assert not linear.lora_b.any(), "only an adapter that has not moved can be set"
        factor_b, factor_a = low_rank(change_OK / linear.scaling, moments, kept_K, len(linear.lora_a), sweeps)
        columns = slice(factor_b.shape[1])
        return [
            Write(linear.lora_b, (slice(None), columns), factor_b.to(linear.lora_b.dtype)),
            Write(linear.lora_a[columns], (slice(None), kept_K), factor_a.to(linear.lora_a.dtype)),
        ]

    def blend(self, done: Compensated, share: float) -> None:
        """Scale a pass's changes: 0 takes them back, to the bit, 1 is the refit in full."""
        for change in done.changes:
            change.put(share)

    def _bias(self, group: Group) -> nn.Parameter | None:
        if group.expert is not None:
            return None
        module = self.model.get_submodule(group.consumers[0].parameter.rpartition(".")[0])
        return module.get_parameter("bias") if module.bias is not None else None
