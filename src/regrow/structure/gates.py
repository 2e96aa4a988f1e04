"""Gates: one scalar per unit on the input of its consuming linear; 1 = present, 0 = removed.

With `g` at 1 a gate changes nothing, not even a bit. Its derivative is exactly the first-order effect of
removing the unit, adapters included: `dL/dg = <x, dL/dx> = <W[:, unit], (dL/dW)[:, unit]>`, without any tensor
of a weight's shape and whatever precision the frozen weight is kept in.

A whole layer's gate sits on what the layer adds to the residual stream: `h' = h_in + g (h_out - h_in)`, so that
`dL/dg = <h_out - h_in, dL/dh'>` and at 0 the layer is the identity, whatever biases or norms it ends in.

A hidden channel's gate sits on everything that is written to the residual stream: what enters the first layer, and what
each layer adds. `dL/dg` is the sum over those places. That a norm counts one channel less is left out: it shifts the
derivatives of all channels alike, by one part in D. At 0 the norms do count (`residual.py`).

Shapes: B batch, T time, C input channels of the consumer, U units of the group, D hidden channels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from regrow.structure.experts import ExpertGates, Router, Sink, Watch, is_experts
from regrow.structure.groups import RESIDUAL, Group, Layer, Slice
from regrow.structure.prefix import sequences_in, states_in, with_states
from regrow.structure.residual import mask_hooks, writers
from regrow.structure.trace import decoder_layers


class _Gate(torch.autograd.Function):
    """`x * g`, with the gradient of `g` kept apart for every sample of the batch."""

    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, gate_C: Tensor | None, report: Callable[[Tensor], None] | None) -> Tensor:
        ctx.report = report
        ctx.save_for_backward(*([x_BTC] if report else []), *([gate_C] if gate_C is not None else []))
        return x_BTC.view_as(x_BTC) if gate_C is None else x_BTC * gate_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_BTC,) = grads
        saved = list(ctx.saved_tensors)
        if ctx.report:
            x_BTC = saved.pop(0)
            # One sample at a time: the float32 product stays small.
            products = [(x.float() * g.float()).sum(0) for x, g in zip(x_BTC, grad_BTC, strict=True)]
            ctx.report(torch.stack(products))
        return (grad_BTC * saved[0] if saved else grad_BTC), None, None


class _LayerGate(torch.autograd.Function):
    """The gated output of a layer as it is, with the gradient of the layer's gate kept apart for every sample."""

    @staticmethod
    def forward(
        ctx: Any, gated_BTD: Tensor, in_BTD: Tensor, out_BTD: Tensor, report: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.report = report
        ctx.save_for_backward(in_BTD, out_BTD)
        return gated_BTD.view_as(gated_BTD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_BTD,) = grads
        samples = zip(*ctx.saved_tensors, grad_BTD, strict=True)
        ctx.report(torch.stack([((y.float() - x.float()) * g.float()).sum() for x, y, g in samples]))
        return grad_BTD, None, None, None


def _open(layers: Sequence[Layer]) -> dict[str, Tensor]:
    return {layer.unit: torch.ones(1) for layer in layers}


@dataclass
class GateMoments:
    """Sums over sequences n of the gate derivatives `c_n = d(summed NLL of sequence n)/dg`; float64, `[U]`."""

    first: Tensor
    second: Tensor
    samples: int = 0

    @classmethod
    def zeros(cls, units: int) -> "GateMoments":
        """Nothing seen yet."""
        return cls(torch.zeros(units, dtype=torch.float64), torch.zeros(units, dtype=torch.float64))

    def add(self, c_BU: Tensor) -> None:
        """Count a batch of sequences."""
        c_BU = c_BU.double().cpu()
        self.first += c_BU.sum(0)
        self.second += c_BU.square().sum(0)
        self.samples += len(c_BU)

    def only(self, units: Tensor) -> "GateMoments":
        """The moments of some of the units."""
        return GateMoments(self.first[units], self.second[units], self.samples)

    @property
    def mean(self) -> Tensor:
        """Mean derivative, nats per sequence."""
        return self.first / max(self.samples, 1)

    @property
    def mean_square(self) -> Tensor:
        """Empirical Fisher information of each gate, nats per sequence."""
        return self.second / max(self.samples, 1)


class Gates:
    """The gates of a model's groups, and of whole layers; a context: hooks are on the model while it is entered.

    A group's gates go by its name, a layer's single one by `Layer.unit`, those of hidden channels by `residual`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Sequence[Group],
        layers: Sequence[Layer] = (),
        residual: Group | None = None,
    ) -> None:
        self.model = model
        self._residual = residual
        self._stream: Tensor | None = None
        """Gate gradients `[B, U]` of the hidden channels, as far as one backward pass has got."""
        self._batch = 0
        """Of how many sequences the hidden states are."""
        self._groups = {group.name: group for group in groups}
        self._layers = {layer.unit: layer for layer in layers}
        self._values = {group.name: torch.ones(group.units) for group in self._every} | _open(layers)
        self._sink: Sink | None = None
        self._undo: list[Callable[[], None]] = []
        self._within: dict[str, ExpertGates] = {}

    @property
    def _every(self) -> list[Group]:
        return [*self._groups.values(), *([self._residual] if self._residual else [])]

    def __enter__(self) -> "Gates":
        self._hook()
        return self

    def hook_anew(self) -> None:
        """Follow modules that have taken the place of others."""
        if self._undo:
            self._hook()

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._within.clear()

    def _hook(self) -> None:
        self.__exit__()
        _, layers = decoder_layers(self.model)
        for each in layers:
            self._undo.append(each.register_forward_pre_hook(self._see_batch, with_kwargs=True).remove)
        for group in self._groups.values():
            for consumer in group.consumers if group.expert is None else ():
                module = self.model.get_submodule(consumer.module)
                unit_of_column = torch.full([int(consumer.index.max(initial=-1)) + 1], group.units)
                for unit, columns in enumerate(consumer.index):
                    unit_of_column[torch.from_numpy(columns)] = unit
                hook = partial(self._gate_input, group.name, unit_of_column)
                self._undo.append(module.register_forward_pre_hook(hook).remove)
        for layer in self._layers.values():
            module = self.model.get_submodule(layer.name)
            self._undo.append(module.register_forward_hook(partial(self._gate_layer, layer.unit)).remove)
        for name in dict.fromkeys(s.module for s in self._slices() if is_experts(self.model.get_submodule(s.module))):
            self._within[name] = self._gates_within(name)
            self._undo += self._within[name].attach()
        if self._residual is not None:
            masks = mask_hooks(self.model, self._residual, lambda: self._values[RESIDUAL])
            self._undo += [handle.remove for handle in (*masks, *self._stream_hooks(self._residual))]

    def _see_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._batch = sequences_in(args, kwargs)

    def _slices(self) -> list[Slice]:
        """Those of experts and of their channels."""
        groups = (group for group in self._groups.values() if group.expert is not None or group.kind == "expert")
        return [piece for group in groups for piece in group.slices]

    def _gates_within(self, experts: str) -> ExpertGates:
        """The gates of a module of experts."""
        channels: dict[int, tuple[str, Tensor]] = {}
        whole, routers = None, []
        for group in self._groups.values():
            pieces = [piece for piece in group.slices if piece.module == experts]
            if pieces and group.kind == "expert":
                whole = group.name, torch.from_numpy(pieces[0].index)
                others = [s for s in group.slices if s.module != experts and not s.is_adapter]
                places = [(*s.parameter.rpartition("."), s.axis) for s in others]
                routers = [Router(self.model.get_submodule(name), {last: axis}) for name, _, last, axis in places]
            for piece in pieces:
                if piece.is_input and piece.expert is not None:
                    channels[piece.expert] = group.name, torch.from_numpy(piece.index)
        block = self.model.get_submodule(experts.rpartition(".")[0])
        return ExpertGates(
            self.model.get_submodule(experts), block, routers, channels, whole, self.value, lambda: self._sink
        )

    def _stream_hooks(self, residual: Group) -> Iterator[RemovableHandle]:
        path, layers = decoder_layers(self.model)
        unit_of_channel = torch.zeros(residual.slices[0].index.size, dtype=torch.long)
        for unit, channels in enumerate(residual.slices[0].index):
            unit_of_channel[torch.from_numpy(channels)] = unit
        yield layers[0].register_forward_pre_hook(partial(self._enter_stream, unit_of_channel))
        for name in writers(self.model, path, residual):
            module = self.model.get_submodule(name)
            yield module.register_forward_hook(partial(self._write_stream, unit_of_channel))

    def _enter_stream(self, unit_of_channel: Tensor, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (self._on_stream(args[0], unit_of_channel), *args[1:])

    def _write_stream(self, unit_of_channel: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
        return with_states(output, self._on_stream(states_in(output), unit_of_channel))

    def _on_stream(self, x: Tensor, unit_of_channel: Tensor) -> Tensor:
        if self._sink is None or not torch.is_grad_enabled():
            return x
        if not x.requires_grad:
            x = x.detach().requires_grad_(True)
        units = int(unit_of_channel.max()) + 1

        def report(product_BC: Tensor) -> None:
            c_BU = torch.zeros(len(product_BC), units, device=product_BC.device)
            c_BU.index_add_(1, unit_of_channel.to(product_BC.device), product_BC)
            self._stream = c_BU if self._stream is None else self._stream + c_BU.to(self._stream.device)

        return self._reported(x, None, report)

    def _reported(self, x: Tensor, gate: Tensor | None, report: Callable[[Tensor], None]) -> Tensor:
        x_BTC = x.reshape(self._batch, -1, x.shape[-1])  # some families flatten B and T
        gated: Tensor = _Gate.apply(x_BTC, gate, report)  # type: ignore[no-untyped-call]
        return gated.view_as(x)

    def _gate_input(self, name: str, unit_of_column: Tensor, module: nn.Module, args: tuple[Any, ...]) -> Any:
        x, value = args[0], self._values[name]
        # Columns that are another group's belong to a unit behind the last, whose gate is open.
        others = x.shape[-1] - len(unit_of_column)
        unit_of_column = nn.functional.pad(unit_of_column, (0, others), value=len(value))
        gate = None
        if not bool((value == 1).all()):
            gate = torch.cat([value, value.new_ones(1)])[unit_of_column].to(x.device, x.dtype)
        sink = self._sink
        if sink is None or not torch.is_grad_enabled():
            return args if gate is None else (x * gate, *args[1:])
        if not x.requires_grad:  # nothing trainable comes before this gate: its gradient begins here
            x = x.detach().requires_grad_(True)

        def report(product_BC: Tensor) -> None:
            units = torch.zeros(len(product_BC), len(value) + 1, device=product_BC.device)
            sink(name, units.index_add_(1, unit_of_column.to(product_BC.device), product_BC)[:, :-1])

        return (self._reported(x, gate, report), *args[1:])

    def _gate_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return with_states(output, self._gated(name, args[0], states_in(output)))

    def _gated(self, name: str, in_BTD: Tensor, out_BTD: Tensor) -> Tensor:
        gate = float(self._values[name])
        gated = out_BTD if gate == 1 else in_BTD if gate == 0 else torch.lerp(in_BTD, out_BTD, gate)
        sink = self._sink
        if sink is None or not torch.is_grad_enabled():
            return gated
        if not gated.requires_grad:  # nothing trainable up to here: the gate's gradient begins here
            gated = gated.detach().requires_grad_(True)
        report = lambda c_B: sink(name, c_B[:, None])  # noqa: E731
        return _LayerGate.apply(gated, in_BTD.detach(), out_BTD.detach(), report)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def layers(self) -> list[Layer]:
        """The layers that have a gate."""
        return list(self._layers.values())

    def value(self, name: str) -> Tensor:
        """The gates of one group, shape `[U]`, or of one layer, shape `[1]`."""
        return self._values[name]

    def set(self, name: str, value: Tensor) -> None:
        """Set the gates of one group or layer: 0 removes a unit, values between let it fade."""
        assert value.shape == self._values[name].shape
        self._values[name] = value.detach().float().cpu().clone()

    def keep(self, name: str, units: Iterable[int]) -> None:
        """Leave these units of a group, by number, and remove the others."""
        present = torch.zeros_like(self._values[name])
        present[list(units)] = 1.0
        self._values[name] = present

    def open(self) -> None:
        """All gates at 1."""
        self._values = {name: torch.ones_like(value) for name, value in self._values.items()}

    @contextmanager
    def watching(self, experts: str, see: Watch) -> Iterator[None]:
        """Show `see` what flows into the down projections of a module of experts, by its dotted name."""
        self._within[experts].watch = see
        try:
            yield
        finally:
            self._within[experts].watch = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within this context all gates are at 1 and nothing is recorded, whatever was asked for before."""
        former = self._values, self._sink
        self._values, self._sink = {name: torch.ones_like(value) for name, value in self._values.items()}, None
        try:
            yield
        finally:
            self._values, self._sink = former

    def rebuild(
        self,
        groups: Sequence[Group],
        values: Mapping[str, Tensor],
        layers: Sequence[Layer] = (),
        residual: Group | None = None,
    ) -> None:
        """Follow a cut: new groups, new gate values; the gates of `layers` and of the stream are open."""
        self._groups = {group.name: group for group in groups}
        self._layers = {layer.unit: layer for layer in layers}
        self._residual = residual
        self._values = {group.name: values[group.name].clone() for group in groups} | _open(layers)
        if residual is not None:
            self._values[RESIDUAL] = torch.ones(residual.units)
        self.hook_anew()

    @contextmanager
    def recording(self, scale: float, sink: Sink) -> Iterator[None]:
        """Hand `c_n` of every backward pass to `sink`; those of hidden channels when this one pass is over.

        Args:
            scale: what the loss that runs backward must be multiplied by to be a plain sum of the sequences'
                summed NLL (the number of scored tokens for a token mean, times accumulation and AMP scale). Of a
                mixed loss (`Objective`), itself a mean over scored tokens, it makes the sequences' summed mixed loss:
                then that is what `c_n` is the derivative of.
        """
        self._sink = lambda name, c_BU: sink(name, c_BU * scale)
        try:
            yield
            if self._stream is not None:
                self._sink(RESIDUAL, self._stream)
        finally:
            self._sink = self._stream = None
