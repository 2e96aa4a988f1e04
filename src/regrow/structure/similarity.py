"""How much each decoder layer turns the residual stream.

Shapes: B batch, T time, D hidden channels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from regrow.structure.groups import Layer
from regrow.structure.prefix import states_in


@dataclass
class Cosines:
    """Sum over tokens of the cosine between a layer's input and output."""

    total: float = 0.0
    tokens: int = 0

    def add(self, cosines_BT: Tensor) -> None:
        """Count a batch of tokens, unless there is NaN or infinity in it."""
        if not torch.isfinite(cosines_BT).all():
            return
        self.total += float(cosines_BT.sum(dtype=torch.float64))
        self.tokens += cosines_BT.numel()

    @property
    def mean(self) -> float:
        """Mean over tokens."""
        return self.total / max(self.tokens, 1)


@contextmanager
def watching_layers(model: nn.Module, layers: Sequence[Layer], sink: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within this context every forward pass hands `sink` each layer's `Layer.unit` and cosines, `[B, T]` float32."""

    def look(unit: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        out_BTD = states_in(output)
        with torch.no_grad():
            sink(unit, functional.cosine_similarity(args[0].float(), out_BTD.float(), dim=-1))

    handles = [model.get_submodule(layer.name).register_forward_hook(partial(look, layer.unit)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
