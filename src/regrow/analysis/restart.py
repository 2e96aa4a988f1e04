"""Forward passes that begin in the middle: from the hidden states that enter one decoder layer, kept from before.

A trial that changes a layer changes nothing before it, so of L layers only those from the changed one on are
computed again: over trials in all layers, half of the work. Only one layer's inputs are kept at a time.

Not covered: models whose layers get more from the layers before than the hidden states (their first argument).

Shapes: N windows, B windows per batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.evaluation.perplexity import inference, window_losses
from regrow.structure.trace import decoder_layers


class _Reached(Exception):
    """Ends a forward pass whose rest is of no interest."""


class Restart:
    """The held-out windows, as they enter one layer of a model: the first layer, to begin with."""

    def __init__(self, model: PreTrainedModel, windows_NT: Tensor, batch_size: int) -> None:
        self.model = model
        self.windows_NT = windows_NT
        self.batch_size = batch_size
        self.layers = decoder_layers(model)[1]
        self.layer = 0
        """The layer whose inputs are kept."""
        self._inputs: list[Tensor] = []
        """`[B, T, D]`, one per batch."""
        self._as_output: Callable[[Tensor], Any] = lambda x_BTD: x_BTD
        self._inputs = self._forward(0, lambda x_BTD, compute: x_BTD)

    def advance(self) -> None:
        """Move on to the next layer: one forward pass of the present one."""
        inputs = iter(self._inputs)

        def compute_one(_: Tensor, compute: Callable[[Tensor], Any]) -> Tensor:
            output = compute(next(inputs))
            if isinstance(output, tuple):
                self._as_output = lambda x_BTD: (x_BTD,)
                output = output[0]
            assert isinstance(output, Tensor)
            return output

        self._inputs = self._forward(self.layer, compute_one)
        self.layer += 1

    def mean_loss(self, on_batch: Callable[[int], None] | None = None) -> float:
        """Held-out NLL per token, nats, computed from the kept inputs on; perhaps not finite."""
        inputs = iter(self._inputs)
        with self._entering(self.layer, lambda _, compute: compute(next(inputs))):
            losses_N = window_losses(self.model, self.windows_NT, self.batch_size, on_batch)
        return float(losses_N.sum()) / self.windows_NT[:, 1:].numel()

    def _forward(self, layer: int, at: Callable[[Tensor, Callable[[Tensor], Any]], Tensor]) -> list[Tensor]:
        """What `at` makes of the input of a layer, for every batch; nothing after that layer is computed."""
        found: list[Tensor] = []

        def stop(x_BTD: Tensor, compute: Callable[[Tensor], Any]) -> Any:
            found.append(at(x_BTD, compute))
            raise _Reached

        with self._entering(layer, stop), inference(self.model):
            for ids_BT in torch.split(self.windows_NT, self.batch_size):
                try:
                    self.model(input_ids=ids_BT.to(self.model.device), use_cache=False)
                except _Reached:
                    continue
        return found

    @contextmanager
    def _entering(self, layer: int, at: Callable[[Tensor, Callable[[Tensor], Any]], Any]) -> Iterator[None]:
        """Within this context layers before `layer` pass on what they get, and `layer` does what `at` says.

        `at` is given the layer's input and its own forward pass, as a function of the input alone.
        """
        replaced = list(self.layers[: layer + 1])
        for module in replaced[:-1]:
            _replace_forward(module, lambda x_BTD, _: self._as_output(x_BTD))
        _replace_forward(replaced[-1], at)
        try:
            yield
        finally:
            for module in replaced:
                del module.forward


def _replace_forward(module: nn.Module, at: Callable[[Tensor, Callable[[Tensor], Any]], Any]) -> None:
    """Shadow a module's forward pass on the instance; deleting the attribute brings it back."""
    own = module.forward

    def forward(x_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        return at(x_BTD, lambda x_BTD: own(x_BTD, *args, **kwargs))

    module.forward = forward
