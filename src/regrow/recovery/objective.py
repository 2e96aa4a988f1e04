"""What recovery minimises: the text's NLL, or that mixed with what a teacher says."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.state import State
from regrow.data.tokens import Batch
from regrow.recovery.losses import hidden_distance, language_loss, sampled_labels, token_loss
from regrow.recovery.teacher import Lesson, Teacher, layer_outputs
from regrow.settings import Distillation


class Objective:
    """`L = (1 - w) CE + w τ² KL(p_T ‖ p_S) + h H`; without a teacher `L = CE`.

    w, τ and h are the settings' `weight`, `temperature` and `hidden_weight`; the terms are those of
    `token_loss`, and `hidden_distance`. All are means over scored tokens, so L is one: scores read from its backward
    pass (`Gates.recording`) keep their scale "per token", and measure the mixed loss.
    """

    def __init__(
        self,
        settings: Distillation | None = None,
        teacher: Teacher | None = None,
        layers: str | None = None,
        layer_numbers: Sequence[int] | None = None,
    ) -> None:
        """The NLL of the text alone, or together with a teacher.

        Args:
            layers: dotted name of the list of decoder layers, if their outputs are to be matched.
            layer_numbers: of each of the student's layers, which one it was in the whole model; by default none
                have gone. Whoever removes layers sets it anew, as the `Pruner` does.
        """
        self.settings = settings or Distillation()
        self.teacher = teacher
        self.layers = layers
        self.layer_numbers = layer_numbers
        self.closed: frozenset[int] = frozenset()
        """Decoder layers that are there but compute nothing any more, by their numbers in the teacher."""
        self._steps: Counter[str] = Counter()
        self._seconds = 0.0
        self._bytes = 0

    def lesson(self, batch: Batch) -> Lesson | None:
        """Ask the teacher, if there is one. Before the student's own pass: then its activations do not exist yet."""
        if self.teacher is None:
            return None
        began = time.perf_counter()
        lesson = self.teacher.lesson(batch)
        if batch.ids_BT.device.type != "cpu":
            torch.accelerator.synchronize()
        self._seconds += time.perf_counter() - began
        return lesson

    def loss(
        self, model: PreTrainedModel, batch: Batch, lesson: Lesson | None, labels: torch.Generator | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Let the student answer the batch.

        Args:
            labels: samples the tokens to be predicted from the student's own answer, instead of the text's.

        Returns:
            The loss, and what it is made of (`ce`, `kl`, `hidden`; unweighted), empty if that is only the NLL.
        """
        with layer_outputs(model, self.layers) as hidden:
            logits_BTV = model(input_ids=batch.ids_BT, use_cache=False).logits
        wanted_BT = batch.ids_BT if labels is None else sampled_labels(logits_BTV, labels)
        if lesson is None:
            return language_loss(logits_BTV, wanted_BT, batch.scored_BT), {}
        settings = self.settings
        loss, ce, kl = token_loss(
            logits_BTV, wanted_BT, lesson.target, weight=settings.weight, temperature=settings.temperature,
            scored_BT=batch.scored_BT,
        )  # fmt: skip
        terms = {"ce": ce, "kl": kl}
        if self.layers is not None:
            numbers = range(len(hidden)) if self.layer_numbers is None else self.layer_numbers
            open_ = [place for place, number in enumerate(numbers) if number not in self.closed]
            taught = [lesson.hidden[numbers[place]] for place in open_]
            distance = hidden_distance([hidden[place] for place in open_], taught, batch.scored_BT)
            loss = loss + settings.hidden_weight * distance
            terms["hidden"] = distance.detach()
        return loss, terms

    def before_change(self) -> None:
        """To be called before base weights change: by a cut, a merge, a refit."""
        if self.teacher is not None:
            self.teacher.before_change()

    def count_step(self) -> None:
        """Note who taught an optimizer step."""
        if self.teacher is not None:
            self._steps[self.teacher.kind] += 1
            self._bytes = max(self._bytes, self.teacher.bytes)

    def state(self) -> State:
        """Who teaches, and what `summary` tells."""
        kind = None if self.teacher is None else self.teacher.kind
        return State({"kind": kind, "steps": dict(self._steps), "seconds": self._seconds, "bytes": self._bytes})

    def go_on(self, state: State) -> None:
        """Be where `state` was taken. The model is whole: a teacher that had taken its copy by then takes it now."""
        if self.teacher is not None and self.teacher.kind != state.values["kind"]:
            self.before_change()
        self._steps = Counter(state.values["steps"])
        self._seconds, self._bytes = state.values["seconds"], state.values["bytes"]

    def close(self) -> None:
        """Training is over: let the teacher go."""
        if self.teacher is not None:
            self.teacher.close()
        self.teacher = None

    def summary(self) -> dict[str, Any]:
        """Steps by kind of teacher, the most it took (bytes of memory; of disk if cached), and its seconds."""
        return {
            "teacher_steps": dict(self._steps),
            "teacher_bytes": self._bytes,
            "teacher_seconds": round(self._seconds, 3),
        }
