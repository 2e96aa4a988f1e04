"""Measure what a criterion needs during backward passes, score all groups, and keep a moving average."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from types import MappingProxyType
from typing import overload

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.compensation.moments import InputMoments
from regrow.criteria.evidence import Evidence, Linear
from regrow.criteria.registry import Criterion, combine
from regrow.errors import InputError
from regrow.planning.plan import Plan
from regrow.structure.adapters import ADAPTER, is_linear, lora_factors, lora_layers
from regrow.structure.experts import is_experts
from regrow.structure.gates import GateMoments, Gates
from regrow.structure.groups import Group, Groups, Layer, Slice
from regrow.structure.prefix import watching_inputs
from regrow.structure.quantised import dequantised, kept_as, weight_shape
from regrow.structure.similarity import Cosines, watching_layers

PLAIN = ""
"""The term of a criterion that gives a score and no terms."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module name -> its LoRA factors A `[rank, in]` and B `[out, rank]`."""


class Average:
    """A moving average with bias correction, or a plain mean, of one score per original unit."""

    def __init__(self, units: Mapping[str, int], decay: float | None) -> None:
        self.values = {name: torch.zeros(count, dtype=torch.float64) for name, count in units.items()}
        self.decay = decay
        self.count = 0
        self._weight = 0.0

    def add(self, scores: Mapping[str, Tensor], plan: Plan) -> None:
        """Count one score per unit (or layer) that `plan` keeps; removed units keep what they had."""
        self.count += 1
        decay = 1 - 1 / self.count if self.decay is None else self.decay
        self._weight = decay * self._weight + 1 - decay
        for name, score in scores.items():
            kept = list(plan.groups[name].keep) if name in plan.groups else [0]
            self.values[name][kept] = decay * self.values[name][kept] + (1 - decay) * score.double().cpu()

    @property
    def scores(self) -> dict[str, Tensor]:
        """Bias-corrected averages, one per original unit."""
        return {name: value / max(self._weight, 1e-12) for name, value in self.values.items()}


class Scorer:
    """Scores the groups of a model as it trains, and whole layers if asked to and the criterion can."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        gates: Gates,
        criterion: Criterion,
        decay: float | None,
        seed: int,
        depth: bool = False,
    ) -> None:
        self.model = model
        self.gates = gates
        self.criterion = criterion
        self.depth = depth and "depth" in criterion.scores
        units = {name: group.units for name, group in plan.groups.items()}
        layers = {f"layers.{number}": 1 for number in range(len(plan.layers))} if self.depth else {}
        self.average = Average(units | layers, decay)
        self.generator = torch.Generator().manual_seed(seed)
        self._moments: dict[str, GateMoments] = {}
        self._start: Factors = {}
        self.keep_samples = False
        self.samples: dict[str, list[Tensor]] = defaultdict(list)
        """If `keep_samples`: group name -> gate derivatives `[B, U]` of every sequence recorded."""
        self._cosines: dict[str, Cosines] = defaultdict(Cosines)
        self._layers: tuple[Layer, ...] = ()
        self._consumers: dict[str, str] = {}
        self._inputs: dict[str, InputMoments] = {}

    def close(self) -> None:
        """Leave the model as it was found."""
        self._require_weight_gradients([], False)

    def watch(self, groups: Groups) -> None:
        """Ask for the gradients that the criterion needs, of a model's groups as they are now."""
        self._layers = groups.layers
        if "inputs" in self.criterion.needs:
            for group in groups:
                if len(group.consumers) == 1 and group.expert is None:
                    consumer = group.consumers[0]
                    weight = self.model.get_parameter(consumer.parameter)
                    self._consumers[group.name] = consumer.module
                    channels = weight_shape(weight)[consumer.axis]
                    self._inputs[group.name] = InputMoments.zeros(channels, weight.device)
        self._require_weight_gradients(groups, "weight" in self.criterion.needs)

    def begin_period(self) -> None:
        """Remember the adapters: the displacement that a criterion sees counts from now on."""
        self._start = copy_factors(self.model)

    @contextmanager
    def recording(self, scale: float) -> Iterator[None]:
        """A context for one forward and backward pass; see `Gates.recording`. Moments add up until `update`."""
        with ExitStack() as stack:
            if "gate" in self.criterion.needs:
                stack.enter_context(self.gates.recording(scale, self._count))
            if "inputs" in self.criterion.needs:
                for name, consumer in self._consumers.items():
                    stack.enter_context(watching_inputs(self.model.get_submodule(consumer), self._inputs[name].add))
            if "similarity" in self.criterion.needs and self.depth:
                look = watching_layers(self.model, self._layers, lambda unit, c_BT: self._cosines[unit].add(c_BT))
                stack.enter_context(look)
            yield

    def _count(self, name: str, c_BU: Tensor) -> None:
        if name not in self._moments:
            self._moments[name] = GateMoments.zeros(c_BU.shape[1])
        self._moments[name].add(c_BU)
        if self.keep_samples:
            self.samples[name].append(c_BU.cpu())

    def update(self, groups: Groups, cut_plan: Plan, plan: Plan) -> bool:
        """Score every group from the gradients of one step, and average.

        Args:
            groups: as they are now, of a model that has been cut to `cut_plan`.
            plan: what is to stay of it; units behind closed gates are not scored.

        Returns:
            False if a score was not finite; then nothing was counted.

        Raises:
            InputError: if a user's criterion does not give one score per unit (or the same terms for all groups).
        """
        with torch.no_grad():
            evidence = chain(self._of_groups(groups, cut_plan, plan), self._of_layers(groups, plan))
            scores = self._combined({one.name: self._terms(one) for one in evidence})
        self._cosines.clear()
        self._moments = {}
        self._inputs = {}
        for parameter in self._weights(groups):
            parameter.grad = None
        if not all(bool(torch.isfinite(score).all()) for score in scores.values()):
            return False
        self.average.add(scores, plan)
        return True

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
        for group in groups:
            moments = self._moments.get(group.name)
            if not plan.groups[group.name].keep:
                continue
            if (units := stays.get(group.name)) is not None:
                group = group.only(units)
                moments = moments and moments.only(torch.from_numpy(units))
            evidence = gather_evidence(self.model, group, moments, self.generator, self._start)
            yield replace(evidence, inputs=self._inputs.get(group.name))

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
        for name in lora_layers(model)
        for a, b in [lora_factors(model, name)]
    }


def gather_evidence(
    model: PreTrainedModel,
    group: Group,
    gate: GateMoments | None,
    generator: torch.Generator,
    start: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
) -> Evidence:
    """What a criterion may look at, of one group.

    Args:
        start: the LoRA factors from which displacements count, as `copy_factors` gives them; empty: from zero.
    """
    pieces = [piece for piece in group.slices if not piece.is_adapter and _is_weight(model, group, piece)]
    return Evidence(group.name, group.kind, group.units, Linears(model, pieces, start), gate, generator=generator)


def _is_weight(model: PreTrainedModel, group: Group, piece: Slice) -> bool:
    """Whether a slice is of a product's weight: a linear's, all experts' of a layer, or a router's."""
    if model.get_parameter(piece.parameter).ndim == 3:
        return True
    routes = group.kind == "expert" and not is_experts(model.get_submodule(piece.module))
    return piece.parameter.endswith(".weight") and (routes or is_linear(model.get_submodule(piece.module)))


class Linears(Sequence[Linear]):
    """Looked up one at a time, as they are asked for: those of a quantised base take memory while they are."""

    def __init__(
        self, model: PreTrainedModel, pieces: Sequence[Slice], start: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        """Arguments as for `linear_evidence`, of every one."""
        self._model, self._pieces, self._start = model, pieces, start

    def __len__(self) -> int:
        return len(self._pieces)

    @overload
    def __getitem__(self, index: int) -> Linear: ...
    @overload
    def __getitem__(self, index: slice) -> "Linears": ...
    def __getitem__(self, index: int | slice) -> "Linear | Linears":
        if isinstance(index, slice):
            return Linears(self._model, self._pieces[index], self._start)
        piece = self._pieces[index]
        return linear_evidence(self._model, piece, self._start.get(piece.module))


def linear_evidence(model: PreTrainedModel, piece: Slice, start: tuple[Tensor, Tensor] | None = None) -> Linear:
    """A base weight that a group has a share in, as a criterion sees it: oriented `[out, in]`, with its adapter."""
    parameter = model.get_parameter(piece.parameter)
    axis = 1 if piece.is_input else 0
    weight, gradient = parameter.detach(), parameter.grad
    if weight.ndim == 3:
        return _expert_evidence(piece, weight, gradient)
    if kept_as(parameter):
        weight = dequantised(model.get_submodule(piece.parameter.rpartition(".")[0]))
    if piece.axis != axis:  # a Conv1D keeps its weight as [in, out]
        weight, gradient = weight.T, None if gradient is None else gradient.T
    positions = torch.from_numpy(piece.index).to(weight.device)
    linear = Linear(piece.module, weight, axis, positions, gradient)
    module = model.get_submodule(piece.module)
    if not isinstance(module, LoraLayer):
        return linear
    a, b = lora_factors(model, piece.module)
    start_a, start_b = start or (None, None)
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


def _expert_evidence(piece: Slice, weight: Tensor, gradient: Tensor | None) -> Linear:
    """Of all experts' weights in one tensor: one expert's, or (whole experts) all, their rows below one another."""
    if piece.expert is None:
        rows = weight.shape[1]
        positions = torch.from_numpy(piece.index)[:, :, None] * rows + torch.arange(rows)
        flat = None if gradient is None else gradient.flatten(0, 1)
        return Linear(piece.module, weight.flatten(0, 1), 0, positions.flatten(1).to(weight.device), flat)
    axis = 1 if piece.is_input else 0
    own, slope = weight[piece.expert], None if gradient is None else gradient[piece.expert]
    if piece.axis - 1 != axis:  # kept as [in, out]
        own, slope = own.T, None if slope is None else slope.T
    return Linear(piece.module, own, axis, torch.from_numpy(piece.index).to(weight.device), slope)
