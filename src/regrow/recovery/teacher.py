"""Teachers: the model as it was before anything was removed, asked about every batch.

All of them compute the same thing, and differ in what they cost: `SelfTeacher` a forward pass and no memory, for as
long as the base weights are untouched; `ModelTeacher` a second copy of the model; `CachedTeacher` (in `cached.py`)
disk space, and less exact an answer.

Shapes: B sequences, T tokens, V vocabulary, D hidden size.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.data.tokens import Batch
from regrow.errors import InputError
from regrow.evaluation.perplexity import evaluation_mode
from regrow.recovery.losses import FullTarget, Target
from regrow.structure.adapters import adapter_parameters, adapters_off, take_off
from regrow.structure.gates import Gates
from regrow.structure.offload import Offloaded, come_and_go
from regrow.structure.prefix import states_in
from regrow.structure.quantise import quantisable, quantise
from regrow.structure.quantised import Quantization, copy_into, held_bytes, kept_as, quantised_linears
from regrow.structure.trace import unhook

Kept = torch.dtype | Quantization
"""How a copy of a model keeps its weights."""


@dataclass(frozen=True)
class Lesson:
    """What a teacher has to say about one batch."""

    target: Target
    hidden: list[Tensor]
    """Outputs `[B, T, D]` of all the teacher's decoder layers; empty unless asked for."""


@dataclass(frozen=True)
class Wish:
    """What is wanted of a teacher."""

    temperature: float
    layers: str | None = None
    """Dotted name of the list of decoder layers whose outputs are wanted; None: only logits are."""


class Teacher(Protocol):
    """Somebody who knows what the whole model says."""

    @property
    def kind(self) -> str:
        """`self`, `model` or `cached`: who answers at present."""

    @property
    def bytes(self) -> int:
        """What it takes beyond the model that is trained: of memory, or (cached) of disk."""

    def lesson(self, batch: Batch) -> Lesson:
        """The answer to one batch, outside autograd; nothing of the student is changed."""

    def before_change(self) -> None:
        """Told before base weights change: a cut, a merge, a refit.

        Raises:
            InputError: if it cannot teach afterwards.
        """

    def close(self) -> None:
        """Training is over."""


class SelfTeacher:
    """The student's own weights with all gates at 1 and the adapters off."""

    kind = "self"
    bytes = 0

    def __init__(self, model: PreTrainedModel, gates: Gates, wish: Wish) -> None:
        self.model = model
        self.gates = gates
        self.wish = wish

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        with evaluation_mode(self.model), adapters_off(self.model), self.gates.opened():
            yield

    def logits(self, ids_BT: Tensor) -> Tensor:
        """The whole model's logits, `[B, T, V]`."""
        with self._as_it_was():
            return _ask(self.model, ids_BT, None)[0]

    def lesson(self, batch: Batch) -> Lesson:
        """See `Teacher`."""
        with self._as_it_was():
            logits_BTV, hidden = _ask(self.model, batch.ids_BT, self.wish.layers)
        return Lesson(FullTarget(logits_BTV, self.wish.temperature), hidden)

    def before_change(self) -> None:
        """See `Teacher`."""
        raise InputError(
            "distillation.teacher=self learns from the model's own weights, which compensation is about to change; "
            "choose auto, model or cached"
        )

    def close(self) -> None:
        """Nothing to let go of."""


class ModelTeacher:
    """A frozen copy of the model without its adapters."""

    kind = "model"

    def __init__(self, model: PreTrainedModel, wish: Wish, kept: Kept | None = None) -> None:
        """Copy a model whose base weights are still whole.

        Args:
            kept: how the copy keeps its weights; by default as the model does.
        """
        self.model = copy_without_adapters(model, kept)
        self.wish = wish

    @property
    def bytes(self) -> int:
        """Of its parameters, tied ones once."""
        return held_bytes(self.model)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """The whole model's logits, `[B, T, V]`."""
        return _ask(self.model, ids_BT, None)[0]

    def lesson(self, batch: Batch) -> Lesson:
        """See `Teacher`."""
        logits_BTV, hidden = _ask(self.model, batch.ids_BT, self.wish.layers)
        return Lesson(FullTarget(logits_BTV, self.wish.temperature), hidden)

    def before_change(self) -> None:
        """It has its own weights."""

    def close(self) -> None:
        """Nothing to let go of but itself."""


class AutoTeacher:
    """`SelfTeacher` while the base is whole; just before it first changes, the `ModelTeacher` takes over."""

    def __init__(self, model: PreTrainedModel, gates: Gates, wish: Wish, kept: Kept | None = None) -> None:
        self.model = model
        self.kept = kept
        self.present: SelfTeacher | ModelTeacher = SelfTeacher(model, gates, wish)

    @property
    def kind(self) -> str:
        """See `Teacher`."""
        return self.present.kind

    @property
    def bytes(self) -> int:
        """See `Teacher`."""
        return self.present.bytes

    def logits(self, ids_BT: Tensor) -> Tensor:
        """The whole model's logits, `[B, T, V]`."""
        return self.present.logits(ids_BT)

    def lesson(self, batch: Batch) -> Lesson:
        """See `Teacher`."""
        return self.present.lesson(batch)

    def before_change(self) -> None:
        """Copy the model while it is whole."""
        if isinstance(self.present, SelfTeacher):
            self.present = ModelTeacher(self.model, self.present.wish, self.kept)

    def close(self) -> None:
        """See `Teacher`."""
        self.present.close()


@contextmanager
def layer_outputs(model: nn.Module, layers: str | None) -> Iterator[list[Tensor]]:
    """The outputs `[B, T, D]` of a list of decoder layers, filled in by a forward pass within this context."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(states_in(output))

    found = model.get_submodule(layers).children() if layers else ()
    handles = [layer.register_forward_hook(keep) for layer in found]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def copy_without_adapters(model: PreTrainedModel, kept: Kept | None) -> PreTrainedModel:
    """A frozen copy in evaluation mode, without adapters and hooks; parameters never exist twice in two precisions.

    Args:
        kept: how the copy keeps its weights (quantised: those of the decoder layers' linears), or as the model does;
            what is quantised already stays as it is.
    """
    memo: dict[int, Any] = {id(factor): factor for factor in adapter_parameters(model)}
    dtype = kept if isinstance(kept, torch.dtype) else None
    if kept == "int8" or kept == "nf4":
        for linear in quantisable(model, kept, model.device).values():
            if not kept_as(linear.get_parameter("weight")):
                memo[id(linear)] = quantise(linear, kept, model.dtype)
                memo |= {id(parameter): parameter for parameter in linear.parameters()}  # not copied, for not reached
    for linear in quantised_linears(model):
        copy_into(memo, linear)
    for parameter in model.parameters():
        if isinstance(parameter, Offloaded):
            memo[id(parameter)] = parameter.twin(dtype)
        elif id(parameter) not in memo:
            copied = parameter.detach().to(dtype or parameter.dtype, copy=True)
            memo[id(parameter)] = nn.Parameter(copied, requires_grad=False)
    teacher: PreTrainedModel = copy.deepcopy(model, memo)
    take_off(teacher)
    unhook(teacher)
    come_and_go(teacher)
    teacher.eval()
    return teacher


@torch.no_grad()
def _ask(model: PreTrainedModel, ids_BT: Tensor, layers: str | None) -> tuple[Tensor, list[Tensor]]:
    """Logits and, where a list of layers is named, their outputs. Not in inference mode: autograd saves them."""
    with layer_outputs(model, layers) as outputs:
        return model(input_ids=ids_BT, use_cache=False).logits, outputs
