"""What a criterion may want to know of single linears, measured beside forward and backward passes.

Shapes: B sequences, T tokens, I inputs and O outputs of a linear.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.compensation.moments import ChannelMoments
from regrow.processes import ALONE, Processes
from regrow.recovery.probe import Probes
from regrow.structure.adapters import is_linear
from regrow.structure.groups import Group, Slice
from regrow.structure.prefix import sequences_in, watching_inputs
from regrow.structure.trace import decoder_layers


def base_pieces(model: PreTrainedModel, group: Group) -> list[Slice]:
    """A group's shares in the weights of linears, adapters left out."""
    return [
        piece
        for piece in group.slices
        if not piece.is_adapter and piece.parameter.endswith(".weight") and is_linear(model.get_submodule(piece.module))
    ]


@dataclass
class Squares:
    """`Σ_n g_n²`, g_n the gradient of the mean loss of sequence n by a weight; float32 `[O, I]`."""

    sum_OI: Tensor
    sequences: int = 0

    def add(self, x_BTI: Tensor, grad_BTO: Tensor, scale: float) -> None:
        """Count a batch, unless there is NaN or infinity in it.

        Args:
            grad_BTO: by the linear's output, of a loss that `scale` makes the sum of the sequences' summed NLL.
        """
        if not (torch.isfinite(x_BTI).all() and torch.isfinite(grad_BTO).all()):
            return
        tokens = x_BTI.shape[1] - 1  # the last position predicts nothing
        for x_TI, grad_TO in zip(x_BTI, grad_BTO, strict=True):  # one gradient of the weight's shape at a time
            self.sum_OI += (grad_TO.float().T @ x_TI.float()).mul_(scale / tokens).square_()
        self.sequences += len(x_BTI)


def _by_sequence(x: Tensor, sequences: int) -> Tensor:
    """`[B, T, C]`, also of what a family has flattened to `[B T, C]`."""
    return x.reshape(sequences, -1, x.shape[-1])


class Measured:
    """Statistics of the linears in some groups, by the linears' names; `clear` begins anew."""

    def __init__(
        self,
        model: PreTrainedModel,
        needs: Collection[str],
        seed: int,
        perturbations: int,
        processes: Processes = ALONE,
    ) -> None:
        """Measure what a criterion needs, if that is `channels`, `squares` or `probes`."""
        self.model = model
        self.needs = needs
        self.probes = Probes(model, seed, perturbations, processes)
        self._modules: dict[str, nn.Module] = {}
        self._channels: dict[str, ChannelMoments] = {}
        self._squares: dict[str, Squares] = {}
        self._sequences = 0
        """In the pass that is going on."""

    def watch(self, groups: Collection[Group]) -> None:
        """From now on look at the linears of these groups."""
        pieces = [piece for group in groups for piece in base_pieces(self.model, group)]
        self._modules = {p.module: self.model.get_submodule(p.parameter.rpartition(".")[0]) for p in pieces}
        self.probes.linears = self._modules

    def clear(self) -> None:
        """Forget what has been seen."""
        self._channels, self._squares = {}, {}
        self.probes.clear()

    @property
    def moments(self) -> list[object]:
        """All that has been added up; not the probes, which have been measured together."""
        return [*self._channels.values(), *self._squares.values()]

    @contextmanager
    def recording(self, scale: float) -> Iterator[None]:
        """A context for one forward and backward pass; `scale` as for `Gates.recording`."""
        with ExitStack() as stack:
            for layer in decoder_layers(self.model)[1] if "squares" in self.needs else ():
                stack.callback(layer.register_forward_pre_hook(self._see_batch, with_kwargs=True).remove)
            for name, module in self._modules.items():
                if "channels" in self.needs:
                    stack.enter_context(watching_inputs(module, partial(self._count_channels, name)))
                if "squares" in self.needs:
                    handle = module.register_forward_hook(partial(self._square, name, scale))
                    stack.callback(handle.remove)
            yield

    def _count_channels(self, name: str, x: Tensor) -> None:
        if name not in self._channels:
            self._channels[name] = ChannelMoments.zeros(x.shape[-1], x.device)
        self._channels[name].add(x)

    def _see_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._sequences = sequences_in(args, kwargs)

    def _square(self, name: str, scale: float, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        sequences, x_BTI = self._sequences, _by_sequence(args[0].detach(), self._sequences)
        if name not in self._squares:
            shape = output.shape[-1], x_BTI.shape[-1]
            self._squares[name] = Squares(torch.zeros(shape, device=x_BTI.device))
        squares = self._squares[name]
        output.register_hook(lambda grad: squares.add(x_BTI, _by_sequence(grad, sequences), scale))  # type: ignore[no-untyped-call]

    def channels(self, name: str) -> ChannelMoments | None:
        """Moments of a linear's input channels, if they are measured."""
        return self._channels.get(name)

    def squared_grad(self, name: str) -> Tensor | None:
        """Mean over sequences of a weight's squared gradients, `[O, I]`, if they are measured."""
        squares = self._squares.get(name)
        return None if squares is None else squares.sum_OI / max(squares.sequences, 1)

    def estimated_grad(self, name: str) -> Tensor | None:
        """A weight's gradient as the probes tell it, `[O, I]`, if there are any."""
        return self.probes.gradient(name) if self.probes.taken else None
