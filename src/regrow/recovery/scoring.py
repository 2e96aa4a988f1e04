"""Measure what a criterion needs during backward passes, score all groups, and keep a moving average."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from types import MappingProxyType
from typing import overload

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.checkpoint.state import State, named
from regrow.compensation.moments import InputMoments
from regrow.criteria.evidence import Evidence, Linear
from regrow.criteria.registry import Criterion, combine
from regrow.data.tokens import Batch
from regrow.errors import InputError
from regrow.planning.plan import Plan
from regrow.processes import ALONE, Processes
from regrow.recovery.average import SPIKE, Average
from regrow.recovery.experts import expert_evidence, weight_pieces
from regrow.recovery.measured import Measured
from regrow.recovery.pooling import add_gradients, add_up_at_main
from regrow.structure.adapters import adapted, is_linear, lora_factors
from regrow.structure.expert_lora import ADAPTER
from regrow.structure.gates import GateMoments, Gates
from regrow.structure.groups import Group, Groups, Layer, Slice
from regrow.structure.offload import Offloaded
from regrow.structure.prefix import watching_inputs
from regrow.structure.quantised import dequantised, kept_as, weight_shape
from regrow.structure.similarity import Cosines, watching_layers

PLAIN = ""
"""The term of a criterion that gives a score and no terms."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module name -> its LoRA factors A `[rank, in]` and B `[out, rank]`."""


class Scorer:
    """Scores the groups of a model as it trains, and the residual stream and whole layers if asked to."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        gates: Gates,
        criterion: Criterion,
        decay: float | None,
        seed: int,
        depth: bool = False,
        hidden: bool = False,
        perturbations: int = 1,
        processes: Processes = ALONE,
        mask: Callable[[Group], Tensor] | None = None,
    ) -> None:
        """Nothing is measured yet.

        Args:
            plan: what there is to score.
            gates: on the model.
            decay: of the moving average of scores; None: a plain mean.
            seed: of what a criterion draws.
            depth: whether whole layers are scored, by a criterion that can.
            hidden: whether hidden channels are.
            perturbations: directions tried with each batch, for criteria without a backward pass.
            processes: those that share the batches.
            mask: of a group, how likely each unit's learned mask is open; if masks are learned.
        """
        self.processes = processes
        self.model = model
        self.mask = mask
        self.gates = gates
        self.criterion = criterion
        self.depth = depth and "depth" in criterion.scores
        self.hidden = hidden
        units = {name: group.units for name, group in (plan.parts if hidden else plan.groups).items()}
        layers = {f"layers.{number}": 1 for number in range(len(plan.layers))} if self.depth else {}
        self.average = Average(units | layers, decay, SPIKE if criterion.needs else math.inf)
        self.generator = torch.Generator().manual_seed(processes.own_seed(seed))
        self._moments: dict[str, GateMoments] = {}
        self._start: Factors = {}
        self.keep_samples = False
        self.samples: dict[str, list[Tensor]] = defaultdict(list)
        """If `keep_samples`: group name -> gate derivatives `[B, U]` of every sequence recorded."""
        self._cosines: dict[str, Cosines] = defaultdict(Cosines)
        self._layers: tuple[Layer, ...] = ()
        self.measured = Measured(model, criterion.needs, seed, perturbations, processes)
        self._consumers: dict[str, str] = {}
        self._inputs: dict[str, InputMoments] = {}

    def close(self) -> None:
        """Leave the model as it was found."""
        self._require_weight_gradients([], False)
        self._inputs = {}

    def watch(self, groups: Groups) -> None:
        """Ask for the gradients that the criterion needs, of a model's groups as they are now."""
        self._layers = groups.layers
        stream = [groups.residual] if self.hidden and groups.residual is not None else []
        self.measured.watch([*groups, *stream])
        if "inputs" in self.criterion.needs:
            for group in groups:
                if len(group.consumers) == 1 and group.expert is None:
                    consumer = group.consumers[0]
                    weight = self.model.get_parameter(consumer.parameter)
                    self._consumers[group.name] = consumer.module
                    channels = weight_shape(weight)[consumer.axis]
                    self._inputs[group.name] = InputMoments.zeros(channels, weight.device)
        self._require_weight_gradients(groups, "weight" in self.criterion.needs)

    def state(self) -> State:
        """The averages, chance, and where displacements count from; between steps nothing else is known."""
        start = {
            f"{name}/{factor}": t for name, pair in self._start.items() for factor, t in zip("AB", pair, strict=True)
        }
        samples = {name: torch.cat(each) for name, each in self.samples.items()}
        chance = {"chance": self.generator.get_state()}
        kept = State(tensors=chance | named("start", start) | named("samples", samples))
        return State.of(average=self.average.state(), kept=kept)

    def go_on(self, state: State) -> None:
        """Be where `state` was taken."""
        self.average.go_on(state.part("average"))
        kept = state.part("kept")
        if self.processes.is_main:
            self.generator.set_state(kept.tensors["chance"])
        start, device = kept.under("start"), self.model.device
        names = {name.rpartition("/")[0] for name in start}
        self._start = {name: (start[f"{name}/A"].to(device), start[f"{name}/B"].to(device)) for name in names}
        self.samples.update({name: [c_NU] for name, c_NU in kept.under("samples").items()})

    def begin_period(self) -> None:
        """Remember the adapters: the displacement that a criterion sees counts from now on."""
        self._start = copy_factors(self.model)

    @contextmanager
    def recording(self, scale: float) -> Iterator[None]:
        """A context for one forward and backward pass; see `Gates.recording`. Moments add up until `update`."""
        with ExitStack() as stack:
            stack.enter_context(self.measured.recording(scale))
            if "gate" in self.criterion.needs:
                stack.enter_context(self.gates.recording(scale, self._count))
            if "inputs" in self.criterion.needs:
                for name, consumer in self._consumers.items():
                    stack.enter_context(watching_inputs(self.model.get_submodule(consumer), self._inputs[name].add))
            if "similarity" in self.criterion.needs and self.depth:
                look = watching_layers(self.model, self._layers, lambda unit, c_BT: self._cosines[unit].add(c_BT))
                stack.enter_context(look)
            yield

    def look(self, batch: Batch) -> None:
        """Let a batch tell by forward passes what the criterion needs of that kind."""
        if "probes" in self.criterion.needs:
            self.measured.probes.take(batch)

    def _count(self, name: str, c_BU: Tensor) -> None:
        if not torch.isfinite(c_BU).all():
            return
        if name not in self._moments:
            self._moments[name] = GateMoments.zeros(c_BU.shape[1])
        self._moments[name].add(c_BU)
        if self.keep_samples:
            self.samples[name].append(c_BU.cpu())

    @property
    def _evidence(self) -> list[object]:
        """What has been added up since the last scoring, in an order that all processes share."""
        gates = [self._moments[name] for name in sorted(self._moments)]
        cosines = [self._cosines[unit] for unit in sorted(self._cosines)]
        return [*gates, *cosines, *self._inputs.values(), *self.measured.moments]

    def update(self, groups: Groups, cut_plan: Plan, plan: Plan) -> bool:
        """Score every group from the gradients of one step, and average.

        Args:
            groups: as they are now, of a model that has been cut to `cut_plan`.
            plan: what is to stay of it; units behind closed gates are not scored.

        Returns:
            False if a score was not finite; then nothing was counted. The scores are the main process' in all.

        Raises:
            InputError: if a user's criterion does not give one score per unit (or the same terms for all groups).
        """
        add_up_at_main(self.processes, self._evidence)
        if "weight" in self.criterion.needs:
            add_gradients(self.processes, self._weights(groups))
        with self.processes.uneven():
            own = self._scored(groups, cut_plan, plan) if self.processes.is_main else {}
        scores = self.processes.same_tensors(own)
        self.forget(groups)
        self._inputs = {}
        if not all(bool(torch.isfinite(score).all()) for score in scores.values()):
            return False
        self.average.add(scores, plan)
        return True

    def forget(self, groups: Groups) -> None:
        """Drop what has been measured since the last scoring: a step that is skipped leaves nothing to the next.

        Args:
            groups: as they are now.
        """
        self._cosines.clear()
        self._moments = {}
        self.measured.clear()
        for parameter in self._weights(groups):
            parameter.grad = None

    @torch.no_grad()
    def _scored(self, groups: Groups, cut_plan: Plan, plan: Plan) -> dict[str, Tensor]:
        evidence = chain(self._of_groups(groups, cut_plan, plan), self._of_layers(groups, plan))
        return self._combined({one.name: self._terms(one) for one in evidence})

    def _terms(self, evidence: Evidence) -> dict[str, Tensor]:
        score = self.criterion.score(evidence)
        terms = dict(score) if isinstance(score, Mapping) else {PLAIN: score}
        for value in terms.values():
            if not isinstance(value, Tensor) or value.shape != (evidence.units,):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(
                    f"criterion {self.criterion.name}: wanted a tensor of {evidence.units} scores "
                    f"for {evidence.name}, got {shape}"
                )
        return terms

    def _combined(self, terms: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        kinds = sorted({tuple(sorted(each)) for each in terms.values()})
        if kinds == [(PLAIN,)]:
            return {name: each[PLAIN] for name, each in terms.items()}
        if len(kinds) > 1 or not kinds[0]:
            raise InputError(
                f"criterion {self.criterion.name}: wanted the same terms, at least one, for every group, got {kinds}"
            )
        return combine(terms)

    def _of_groups(self, groups: Groups, cut_plan: Plan, plan: Plan) -> Iterator[Evidence]:
        """What is known of the units that stay."""
        if "width" not in self.criterion.scores:
            return
        stays = plan.positions_within(cut_plan)
        stream = [groups.residual] if self.hidden and groups.residual is not None else []
        for group in (*groups, *stream):
            moments = self._moments.get(group.name)
            if not plan.parts[group.name].keep:
                continue
            mask = self.mask(group) if self.mask and "mask" in self.criterion.needs else None
            if (units := stays.get(group.name)) is not None:
                group = group.only(units)
                moments = moments and moments.only(torch.from_numpy(units))
                mask = mask if mask is None else mask[torch.from_numpy(units)]
            evidence = gather_evidence(self.model, group, moments, self.generator, self._start, self.measured)
            yield replace(evidence, inputs=self._inputs.get(group.name), mask=mask)

    def _of_layers(self, groups: Groups, plan: Plan) -> Iterator[Evidence]:
        """What is known of the layers that stay."""
        for layer in groups.layers:
            if self.depth and layer.number not in plan.removed_layers:
                cosines = self._cosines.get(layer.unit)
                yield Evidence(
                    layer.unit, "layer", 1, (),
                    gate=self._moments.get(layer.unit),
                    similarity=cosines.mean if cosines else None,
                    generator=self.generator,
                )  # fmt: skip

    def _weights(self, groups: Groups) -> list[nn.Parameter]:
        names = {s.parameter for group in groups for s in group.slices if not s.is_adapter}
        if self.hidden and isinstance(groups, Groups) and groups.residual is not None:
            stream = (s for s in groups.residual.slices if not s.is_adapter)
            names |= {s.parameter for s in stream if is_linear(self.model.get_submodule(s.module))}
        return [parameter for name in sorted(names) if (parameter := self.model.get_parameter(name)).ndim > 1]

    def _require_weight_gradients(self, groups: Groups | list[Group], wanted: bool) -> None:
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name and not wanted:
                parameter.requires_grad_(False)
                parameter.grad = None
        if wanted and isinstance(groups, Groups):
            for parameter in self._weights(groups):
                parameter.requires_grad_(True)


def copy_factors(model: PreTrainedModel) -> Factors:
    """Copies of all LoRA factors."""
    return {
        name: (a.detach().clone(), b.detach().clone())
        for name in adapted(model)
        for a, b in [lora_factors(model, name)]
    }


def gather_evidence(
    model: PreTrainedModel,
    group: Group,
    gate: GateMoments | None,
    generator: torch.Generator,
    start: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
    measured: Measured | None = None,
) -> Evidence:
    """What a criterion may look at, of one group.

    Args:
        start: the LoRA factors from which displacements count, as `copy_factors` gives them; empty: from zero.
        measured: of single linears.
    """
    linears = Linears(model, weight_pieces(model, group), start, measured)
    return Evidence(group.name, group.kind, group.units, linears, gate, generator=generator)


class Linears(Sequence[Linear]):
    """Looked up one at a time, as they are asked for: quantised and offloaded ones take memory while they are."""

    def __init__(
        self,
        model: PreTrainedModel,
        pieces: Sequence[Slice],
        start: Mapping[str, tuple[Tensor, Tensor]],
        measured: Measured | None,
    ) -> None:
        """Arguments as for `linear_evidence`, of every one."""
        self._model, self._pieces, self._start, self._measured = model, pieces, start, measured

    def __len__(self) -> int:
        return len(self._pieces)

    @overload
    def __getitem__(self, index: int) -> Linear: ...
    @overload
    def __getitem__(self, index: slice) -> "Linears": ...
    def __getitem__(self, index: int | slice) -> "Linear | Linears":
        if isinstance(index, slice):
            return Linears(self._model, self._pieces[index], self._start, self._measured)
        piece = self._pieces[index]
        return linear_evidence(self._model, piece, self._start, self._measured)


def linear_evidence(
    model: PreTrainedModel,
    piece: Slice,
    start: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
    measured: Measured | None = None,
) -> Linear:
    """A base weight that a group has a share in, as a criterion sees it: oriented `[out, in]`, with its adapter."""
    parameter = model.get_parameter(piece.parameter)
    axis = 1 if piece.is_input else 0
    weight, gradient = parameter.detach(), parameter.grad
    if kept_as(parameter):
        weight = dequantised(model.get_submodule(piece.parameter.rpartition(".")[0]))
    elif isinstance(parameter, Offloaded):
        weight = parameter.bring()
    if weight.ndim == 3:
        return expert_evidence(model, piece, weight, gradient, start)
    if piece.axis != axis:  # a Conv1D keeps its weight as [in, out]
        weight, gradient = weight.T, None if gradient is None else gradient.T
    positions = torch.from_numpy(piece.index).to(weight.device)
    linear = Linear(piece.module, weight, axis, positions, gradient)
    if measured is not None:
        linear = replace(
            linear,
            inputs=measured.channels(piece.module),
            squared_grad=measured.squared_grad(piece.module),
            estimated_grad=measured.estimated_grad(piece.module),
        )
    module = model.get_submodule(piece.module)
    if not isinstance(module, LoraLayer):
        return linear
    a, b = lora_factors(model, piece.module)
    start_a, start_b = start.get(piece.module, (None, None))
    return replace(
        linear,
        lora_a=a.detach(),
        lora_b=b.detach(),
        lora_a_grad=a.grad,
        lora_b_grad=b.grad,
        scaling=module.scaling[ADAPTER],
        start_a=start_a,
        start_b=start_b,
    )
