"""How long a model takes on this machine at widths that it does not have yet.

An additive model: a fixed part (embedding, head, whatever comes with a forward pass) and the layers, each its whole
time less what narrower attention and a narrower FFN save. The savings are measured at a few widths, one kind of unit
narrowed at a time, and interpolated between; the fixed part is what remains of two depths.

What is measured are models of random weights, of the same class, device and dtype, only as deep as it takes to
outgrow the caches: a whole copy of a large model would not fit beside it.

Not covered: steps between the measured widths, batches, and models of which not all
layers are equally wide.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from regrow.checkpoint.shape import pruned_config
from regrow.errors import InputError
from regrow.evaluation.speed import measure_speed
from regrow.planning.demand import kernel_multiple
from regrow.structure.groups import Group, Groups
from regrow.structure.per_layer import rearrange

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
Seconds = dict[Phase, float]

FRACTIONS = (0.0, 0.25, 0.5, 0.75)
"""Of the units of a kind, at least one: the widths that are measured besides the whole."""
BEYOND_CACHES = 2**28
"""Bytes of layers that no cache holds: weights have to come from memory, as they do in the whole model."""
REPEATS, WARM_UP = 5, 2


@dataclass(frozen=True)
class Saving:
    """What a layer saves with only so many units of a kind, against all of them."""

    units: int
    seconds: Seconds


@dataclass(frozen=True)
class Latency:
    """The table: seconds of one prompt (prefill) and of one token after it (decode), one text at a time."""

    measured_on: dict[str, Any]
    """Machine, model and settings; a table of others is of no use here."""
    fixed: Seconds
    """Outside the layers."""
    layer: Seconds
    """A whole layer."""
    savings: dict[str, tuple[Saving, ...]]
    """By kind of unit; units ascending, the last being all of them and saving nothing."""

    def seconds(self, phase: Phase, kept: Mapping[str, int]) -> float:
        """Time of a model of which so many units of each group (`layers.<number>.<kind>`) are left.

        A layer of which none is left is gone.
        """
        saved: dict[str, float] = {}
        widths: dict[tuple[str, str], int] = {}
        for name, units in kept.items():
            _, layer, *_, kind = name.split(".")
            widths[layer, kind] = max(units, widths.get((layer, kind), 0))  # all experts that stay are as wide
        for (layer, kind), units in widths.items():
            points = self.savings[kind]
            saving = np.interp(units, [p.units for p in points], [p.seconds[phase] for p in points])
            saved[layer] = saved.get(layer, 0.0) + float(saving)
        left = {layer for (layer, _), units in widths.items() if units}
        return self.fixed[phase] + sum(max(self.layer[phase] - saved[layer], 0.0) for layer in sorted(left))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def parse(cls, text: str, kinds: Collection[str]) -> "Latency":
        """What `to_json` gave, as JSON.

        Args:
            kinds: of the units that must be in it.

        Raises:
            InputError: if it is no such table.
        """
        try:
            found = TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(f"not a valid latency table: {place + ': ' if place else ''}{first['msg']}") from error
        points = [point for each in found.savings.values() for point in each]
        seconds = [found.fixed, found.layer, *(point.seconds for point in points)]
        if not all(each.keys() == set(PHASES) and all(0 <= t < math.inf for t in each.values()) for each in seconds):
            raise InputError(f"not a valid latency table: every entry needs seconds of {' and '.join(PHASES)}")
        for kind in (*kinds, *found.savings):
            widths = [point.units for point in found.savings.get(kind, ())]
            if not widths or widths != sorted(set(widths)) or widths[0] < 0:
                raise InputError(f"not a valid latency table: savings.{kind} must name ascending widths")
        return found


def probe_turns(groups: Groups) -> int:
    """How many turns `measure_latency` takes: its progress."""
    return (2 + sum(len(_points(group)) for group in _kinds(groups).values())) * (REPEATS + WARM_UP)


def measure_latency(
    model: PreTrainedModel,
    groups: Groups,
    measured_on: dict[str, Any],
    on_turn: Callable[[str], None] | None = None,
) -> Latency:
    """Measure the table of a model: some ten small models in turns, medians of the repeats.

    Args:
        model: whose class, device and dtype the probes take; it is not run.
        groups: of that model, whole.
        measured_on: kept in the table.
        on_turn: called after every one of `probe_turns`.

    Raises:
        InputError: if the model's class builds no such small models.
    """
    layers = len(groups.layers)
    held = sum(layer.parameters for layer in groups.layers) * model.dtype.itemsize / layers
    depth = min(max(math.ceil(BEYOND_CACHES / held), 1), layers)
    kinds = _kinds(groups)
    try:
        probes = _build(model, groups, kinds, depth)
    except Exception as error:  # any: it is the class that refuses
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"how long the layers of a {model.config.model_type!r} model take cannot be measured ({reason}); "
            "use --sparsity or another target"
        ) from error
    speeds = measure_speed(probes, batches=(1,), repeats=REPEATS, warm_up=WARM_UP, on_repeat=on_turn)

    def taken(kind: str, units: int = 0) -> Seconds:
        (speed,) = speeds[f"{kind} {units}"]
        return {"prefill": speed.prompt / speed.prefill.median, "decode": 1 / speed.decode.median}

    whole, deep = taken("whole"), taken("twice as deep")
    layer: Seconds = {phase: max(deep[phase] - whole[phase], 0.0) / depth for phase in PHASES}
    savings = {}
    for kind, group in kinds.items():
        points = _points(group)
        saved = {phase: [(whole[phase] - taken(kind, n)[phase]) / depth for n in points] for phase in PHASES}
        savings[kind] = _falling(points, group.units, saved)
    fixed: Seconds = {phase: max(whole[phase] - depth * layer[phase], 0.0) for phase in PHASES}
    return Latency(measured_on, fixed, layer, savings)


def _kinds(groups: Groups) -> dict[str, Group]:
    """A group of each kind."""
    return {group.kind: group for group in groups}


def _points(group: Group) -> list[int]:
    """Widths to measure, ascending, the whole not among them: the nearest that a plan comes to by default."""
    step = kernel_multiple(group.units) if group.base_kind == "ffn" else 1
    possible = [
        units for units in group.widths or range(1, group.units + 1) if units % step == 0 or units == group.units
    ]
    wanted = [max(1, round(fraction * group.units)) for fraction in FRACTIONS]
    return sorted({min(possible, key=lambda units: abs(units - each)) for each in wanted} - {group.units})


def _falling(points: list[int], units: int, saved: dict[Phase, list[float]]) -> tuple[Saving, ...]:
    """Savings that never grow with the width, whatever the noise; all units save nothing."""
    even = {phase: np.maximum.accumulate([0.0, *reversed(saved[phase])])[::-1].tolist() for phase in PHASES}
    return tuple(
        Saving(width, {phase: even[phase][number] for phase in PHASES}) for number, width in enumerate([*points, units])
    )


def _config(config: PretrainedConfig, groups: Groups, widths: Mapping[str, int], depth: int) -> PretrainedConfig:
    """The config of a probe: all layers with these widths, and so many of them; of the part for text only."""
    narrowed = tuple(replace(group, units=widths.get(group.kind, group.units)) for group in groups)
    described = pruned_config(config, groups, replace(groups, groups=narrowed)).get_text_config()
    rearrange(described, [number % len(groups.layers) for number in range(depth)])
    return described


def _build(
    model: PreTrainedModel, groups: Groups, kinds: Mapping[str, Group], depth: int
) -> dict[str, PreTrainedModel]:
    """Random models on the model's device, in its dtype; they share one embedding and one head."""
    wanted = {
        "whole 0": _config(model.config, groups, {}, depth),
        "twice as deep 0": _config(model.config, groups, {}, 2 * depth),
    }
    for kind, group in kinds.items():
        wanted |= {f"{kind} {n}": _config(model.config, groups, {kind: n}, depth) for n in _points(group)}
    built: dict[str, PreTrainedModel] = {}
    on_gpu = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(on_gpu), torch.device(model.device):
        for name, config in wanted.items():
            probe: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
            first = next(iter(built.values()), probe)
            probe.set_input_embeddings(first.get_input_embeddings())
            probe.set_output_embeddings(first.get_output_embeddings())
            built[name] = probe.eval()
    return built
