"""A model run layer by layer over fixed windows, each layer from the cached output of the one before.

Whatever is done to a layer between two runs (gates, a refit, a cut) is felt by all later layers, as if the model had
been run anew from the start. Only one layer's outputs are kept at a time.

What a layer leaves in a mapping that it is given, for later ones, is cached along with its output: keys and values
that several layers of Gemma 4 share. Not covered: models whose layers get more than that from the layers before.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.processes import ALONE, Processes
from regrow.structure.offload import staying
from regrow.structure.trace import decoder_layers


class _Reached(Exception):
    """The layer wanted has run; nothing after it needs to."""


def sequences_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """How many sequences a decoder layer is called with; some families flatten them and their tokens within."""
    return len(args[0] if args else kwargs["hidden_states"])


def states_in(output: Any) -> Tensor:
    """The hidden states `[B, T, D]` in what a decoder layer gives; some families give more beside them."""
    states: Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


def with_states(output: Any, states_BTD: Tensor) -> Any:
    """What a decoder layer gives, with other hidden states."""
    return type(output)([states_BTD, *output[1:]]) if isinstance(output, tuple | list) else states_BTD


class LayerWalk:
    """Stands before one decoder layer, holding its inputs for every batch."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Tensor], processes: Processes = ALONE) -> None:
        """Stand before the first layer.

        Args:
            batches: token ids, each `[B, T]`, on any device.
            processes: those that share the batches: each walks with its rows of them, at the same time.
        """
        self.model = model
        self.processes = processes
        self.batches = processes.parts(batches)
        self.position = 0
        self._outputs: list[Any] = [None] * len(self.batches)
        """What the layer before gave, batch by batch, in the form in which it gave it."""
        self._left: list[dict[str, dict[Any, Any]]] = [{} for _ in self.batches]
        """What the layers before left in mappings, batch by batch, by the mappings' names among their arguments."""
        self._leaves = list(self._left)
        """The same, with what the layer stood before left when it ran."""

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return decoder_layers(self.model)[1]

    def run(self) -> list[Any]:
        """Run the layer stood before on all batches (hooks on its modules fire); its outputs."""
        with self.processes.uneven(), staying(self.layers[self.position]):
            return [self._run(number) for number in range(len(self.batches))]

    def advance(self) -> None:
        """Run the layer and stand before the next one."""
        self._outputs = self.run()
        self._left = list(self._leaves)
        self.position += 1

    def finish(self) -> Iterator[Tensor]:
        """From the layer stood before on, all the way: logits `[B, T, V]`, batch by batch."""
        with self.processes.uneven():
            for number, ids_BT in enumerate(self.batches):
                with torch.no_grad(), self._replayed(number):
                    yield self.model(input_ids=ids_BT.to(self.model.device), use_cache=False).logits

    @torch.no_grad()
    def _run(self, number: int) -> Any:
        caught: list[Any] = []

        def stop(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            caught.append(output)
            mappings = {key: value for key, value in kwargs.items() if isinstance(value, MutableMapping)}
            self._leaves[number] = {key: dict(mapping) for key, mapping in mappings.items()}
            raise _Reached

        handle = self.layers[self.position].register_forward_hook(stop, with_kwargs=True)
        try:
            with self._replayed(number):
                self.model(input_ids=self.batches[number].to(self.model.device), use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return caught[0]

    @contextmanager
    def _replayed(self, number: int) -> Iterator[None]:
        """The layers before the one stood before give what is cached instead of computing."""
        output, left = self._outputs[number], self._left[number]

        def replay(*args: Any, **kwargs: Any) -> Any:
            for key, entries in left.items():
                kwargs[key].update(entries)
            return output

        passed = list(self.layers)[: self.position]
        for layer in passed:
            layer.forward = replay
        try:
            yield
        finally:
            for layer in passed:
                del layer.forward


@contextmanager
def watching_inputs(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show every input of a module to `see`."""

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        see(args[0])

    handle = module.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
