"""Gates and adapters inside modules that keep the weights of all experts of a layer in one tensor each.

There is no linear whose input a hook could multiply, or that LoRA could be wrapped around. So while such a module has
adapters, or gates that are not all open or whose derivatives are wanted, it computes here: what transformers' own
implementations compute, expert by expert.

* A channel's gate sits on the input of its expert's down projection, `dL/dg = <W[e][:, unit], (dL/dW)[e][:, unit]>`.
* An expert's gate sits on what the expert adds, routing weight included: `dL/dg = <y, dL/dy>`. At 0 the expert is
  closed to the router as well, which then chooses among the others, and gives them what it would if this one had never
  been: as after a cut. That is a jump: no gate near 0 leaves the others' routing weights as they are at 0.

Shapes: B sequences, N = B T tokens, K experts chosen for each, S = N K rows, one for each token and expert, in the
order of the experts; E experts, F channels of each, D hidden channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from regrow.structure.expert_lora import loras_of
from regrow.structure.offload import returned
from regrow.structure.take import take

Sink = Callable[[str, Tensor], None]
"""Takes a group's name and the gate gradients of one batch, `[B, U]` float32, unscaled."""

Watch = Callable[[Tensor, Tensor, Tensor], None]
"""Takes what flows into the down projections `[S, F]`, gates included; expert and routing weight of each row."""


@dataclass(frozen=True)
class Rows:
    """What the rows are that experts compute with."""

    expert_S: Tensor
    token_S: Tensor
    weight_S: Tensor
    """With what each goes into the sum over its token's experts."""


Gating = Callable[[Tensor, Rows], Tensor]
"""Takes what rows hold, `[S, …]`; gives it gated."""

TOLD = {"has_gate", "has_bias", "is_concatenated", "is_transposed"}
"""What transformers writes on every module of experts that takes other implementations than its own."""

ADAPTED = "regrow_lora"
"""The name under which transformers knows how modules of experts with adapters compute."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module computes experts in the way that transformers' `use_experts_implementation` lays down."""
    return vars(module).keys() >= TOLD


def run_experts(
    experts: Any,
    x_ND: Tensor,
    expert_NK: Tensor,
    weight_NK: Tensor,
    gate_channels: Gating | None = None,
    gate_outputs: Gating | None = None,
) -> Tensor:
    """What a module of experts computes, its adapters included.

    Args:
        expert_NK: the experts chosen for each token.
        weight_NK: the routing weights of each.
        gate_channels: sees the inputs of the down projections.
        gate_outputs: sees what each expert adds, routing weight included.
    """
    chosen = expert_NK.shape[-1]
    expert_S, order_S = torch.sort(expert_NK.reshape(-1), stable=True)
    rows = Rows(expert_S, order_S // chosen, weight_NK.reshape(-1)[order_S])
    up_SF = _product(experts, "gate_up_proj" if experts.has_gate else "up_proj", x_ND[rows.token_S], expert_S)
    h_SF = experts._apply_gate(up_SF) if experts.has_gate else experts.act_fn(up_SF)
    if gate_channels is not None:
        h_SF = gate_channels(h_SF, rows)
    y_SD = _product(experts, "down_proj", h_SF, expert_S)
    if vars(experts).get("has_post_expert_norm"):  # which older versions know nothing of
        y_SD = experts.post_expert_norm(y_SD)
    y_SD = y_SD * rows.weight_S[:, None]
    if gate_outputs is not None:
        y_SD = gate_outputs(y_SD, rows)
    back_S = torch.argsort(order_S)
    return y_SD[back_S].view(len(x_ND), chosen, -1).sum(1).to(x_ND.dtype)


def _product(experts: Any, name: str, x_SI: Tensor, expert_S: Tensor) -> Tensor:
    weights = experts.get_parameter(name).unbind()
    counts = torch.bincount(expert_S, minlength=len(weights)).tolist()
    biases = experts.get_parameter(f"{name}_bias").unbind() if experts.has_bias else (None,) * len(weights)
    loras = loras_of(experts)
    lora = loras.adapters.get(name) if loras is not None and loras.enabled else None
    a, b = (factor.unbind() for factor in lora.factors) if lora else ((), ())
    found = []
    for expert, x in enumerate(torch.split(x_SI, counts)):
        if len(x):
            weight = weights[expert].T if experts.is_transposed else weights[expert]
            y = nn.functional.linear(x, weight, biases[expert])
            found.append(y + lora(x, a[expert], b[expert]).to(y.dtype) if lora else y)
    return torch.cat(found)


def _run_adapted(experts: Any, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """How transformers computes a module with adapters; while they are off, as it did before."""
    loras = loras_of(experts)
    if loras is None or loras.enabled:  # others of the model's modules may have some
        return run_experts(experts, x_ND, index_NK, weight_NK)
    own = type(experts).forward.__wrapped__
    plain = ALL_EXPERTS_FUNCTIONS.get_interface(loras.former, own)
    output: Tensor = plain(experts, x_ND, index_NK, weight_NK)
    return output


ALL_EXPERTS_FUNCTIONS.register(ADAPTED, _run_adapted)


class _RowGate(torch.autograd.Function):
    """`x * g[expert]`, with the gradient of `g` kept apart for every sequence; C is F or 1, `x` has F or D columns."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SC: Tensor,
        gate_EC: Tensor | None,
        expert_S: Tensor,
        sequence_S: Tensor,
        size: tuple[int, int, int],
        report: Callable[[Tensor], None],
    ) -> Tensor:
        ctx.size, ctx.report = size, report
        ctx.save_for_backward(x_SC, expert_S, sequence_S, *([gate_EC] if gate_EC is not None else []))
        return x_SC.view_as(x_SC) if gate_EC is None else x_SC * gate_EC[expert_S]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SC,) = grads
        x_SC, expert_S, sequence_S, *gate = ctx.saved_tensors
        sequences, experts, columns = ctx.size
        product = x_SC.float() * grad_SC.float()
        if columns == 1:
            product = product.sum(1, keepdim=True)
        c = torch.zeros(sequences * experts, columns, device=product.device)
        c.index_add_(0, sequence_S * experts + expert_S, product)
        ctx.report(c.view(sequences, experts, columns))
        return (grad_SC * gate[0][expert_S] if gate else grad_SC), None, None, None, None, None


@dataclass
class Router:
    """A module that scores experts, and its parameters that hold a row for each, or a column."""

    module: nn.Module
    parameters: Mapping[str, int]
    """By name: along which axis."""
    whole: dict[str, nn.Parameter] = field(default_factory=dict)
    """Those that are replaced while the module computes."""

    def narrow(self, kept_E: Tensor) -> None:
        """Let the module know of these experts only."""
        for name, axis in self.parameters.items():
            self.whole[name] = self.module.get_parameter(name)
            rows = take(self.whole[name], axis, kept_E)
            self.module._parameters[name] = rows  # type: ignore[assignment]

    def widen(self) -> None:
        """Let it know of all again."""
        self.module._parameters.update({name: returned(whole) for name, whole in self.whole.items()})
        self.whole.clear()


@dataclass
class ExpertGates:
    """The gates of one module of experts; on it from `attach` until the handles are removed."""

    experts: nn.Module
    block: nn.Module
    """What calls it, whose input is `[B, T, D]`."""
    routers: Sequence[Router]
    channels: Mapping[int, tuple[str, Tensor]]
    """Expert -> the name of its channels' group, and the positions `[units, positions per unit]` of its units."""
    whole: tuple[str, Tensor] | None
    """The name of the experts' own group, and the experts `[units, positions per unit]` that its units are."""
    value: Callable[[str], Tensor]
    """The gates of a group now, `[units]`."""
    sink: Callable[[], Sink | None]
    """Who takes derivatives now."""
    watch: Watch | None = None
    """Who looks on."""
    _sequences: int = 1
    _narrowed: bool = False
    """Whether the router has just chosen among those experts only whose gates are not closed."""

    def attach(self) -> list[Callable[[], None]]:
        """Take the module's place, until what is returned has been called."""
        undo: list[Callable[[], None]] = [partial(_give_back, self.experts, vars(self.experts).get("forward"))]
        self.experts.forward = partial(self._forward, self.experts.forward)
        undo.append(self.block.register_forward_pre_hook(self._see_batch).remove)
        for router in self.routers:
            undo.append(router.module.register_forward_pre_hook(partial(self._before, router)).remove)
            undo.append(router.module.register_forward_hook(partial(self._after, router), always_call=True).remove)
        return undo

    def _see_batch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._sequences = len(args[0])

    def _before(self, router: Router, module: nn.Module, args: tuple[Any, ...]) -> None:
        kept_E = self._kept()
        self._narrowed = len(kept_E) < self._count
        if self._narrowed:
            router.narrow(kept_E)

    def _after(self, router: Router, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        router.widen()

    @property
    def _count(self) -> int:
        down: Tensor = self.experts.get_parameter("down_proj")
        return len(down)

    def _kept(self) -> Tensor:
        """The experts whose gates are not closed, ascending."""
        if self.whole is None:
            return torch.arange(self._count)
        name, members = self.whole
        return members[self.value(name) != 0].flatten()

    def _channel_gates(self, channels: int) -> Tensor:
        """`[E, F]`, on the CPU."""
        gate_EF = torch.ones(self._count, channels)
        for expert, (name, positions) in self.channels.items():
            gate_EF[expert, positions] = self.value(name)[:, None]
        return gate_EF

    def _expert_gates(self) -> Tensor:
        """`[E, 1]`, on the CPU."""
        gate_E1 = torch.ones(self._count, 1)
        if self.whole is not None:
            gate_E1[self.whole[1], 0] = self.value(self.whole[0])[:, None]
        return gate_E1

    def _is_open(self) -> bool:
        names = [name for name, _ in (*self.channels.values(), *([self.whole] if self.whole else ()))]
        return all(bool((self.value(name) == 1).all()) for name in names)

    def _forward(self, plain: Callable[..., Tensor], x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        sink = self.sink() if torch.is_grad_enabled() else None
        if sink is None and self.watch is None and self._is_open():
            return plain(x_ND, index_NK, weight_NK)
        kept_E = self._kept()
        assert self._narrowed == (len(kept_E) < self._count), "the router is not called as a module"
        per_sequence = len(x_ND) // self._sequences

        def gate_channels(h_SF: Tensor, rows: Rows) -> Tensor:
            where = rows.expert_S, rows.token_S // per_sequence
            report = sink and partial(self._report_channels, sink)
            gated_SF = self._gated(h_SF, self._channel_gates(h_SF.shape[1]), where, report)
            if self.watch is not None:
                self.watch(gated_SF, rows.expert_S, rows.weight_S)
            return gated_SF

        def gate_outputs(y_SD: Tensor, rows: Rows) -> Tensor:
            where = rows.expert_S, rows.token_S // per_sequence
            report = sink and self.whole and partial(self._report_experts, sink)
            return self._gated(y_SD, self._expert_gates(), where, report)

        expert_NK = kept_E.to(index_NK.device)[index_NK]
        return run_experts(self.experts, x_ND, expert_NK, weight_NK, gate_channels, gate_outputs)

    def _gated(
        self, x_SC: Tensor, gate_EC: Tensor, where: tuple[Tensor, Tensor], report: Callable[[Tensor], None] | None
    ) -> Tensor:
        gate = None if bool((gate_EC == 1).all()) else gate_EC.to(x_SC.device, x_SC.dtype)
        if report is None:
            return x_SC if gate is None else x_SC * gate[where[0]]
        if not x_SC.requires_grad:  # nothing trainable comes before this gate: its gradient begins here
            x_SC = x_SC.detach().requires_grad_(True)
        size = self._sequences, self._count, gate_EC.shape[1]
        gated: Tensor = _RowGate.apply(x_SC, gate, *where, size, report)  # type: ignore[no-untyped-call]
        return gated

    def _report_channels(self, sink: Sink, c_BEF: Tensor) -> None:
        for expert, (name, positions) in self.channels.items():
            sink(name, c_BEF[:, expert, positions.to(c_BEF.device)].sum(-1))

    def _report_experts(self, sink: Sink, c_BE1: Tensor) -> None:
        assert self.whole is not None
        name, members = self.whole
        sink(name, c_BE1[:, members.to(c_BE1.device), 0].sum(-1))


def _give_back(module: nn.Module, forward: Callable[..., Tensor] | None) -> None:
    """Let a module have the forward pass that it had: one put there before, or its class's."""
    del vars(module)["forward"]
    if forward is not None:
        module.forward = forward
