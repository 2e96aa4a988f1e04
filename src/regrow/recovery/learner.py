"""One LoRA optimizer step."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.checkpoint.state import State, named
from regrow.data.tokens import Batch
from regrow.errors import InputError
from regrow.processes import ALONE, Processes
from regrow.recovery.objective import Objective
from regrow.settings import Lora, Training
from regrow.structure.adapters import adapter_names, adapter_parameters, attach_lora
from regrow.structure.groups import Groups

Recording = Callable[[float], AbstractContextManager[None]]
"""Given the factor from the loss that runs backward to summed NLL: a context for one backward pass."""


class Diverged(InputError):
    """Too many updates in a row were not finite."""


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """Scale gradients so that their 2-norm is `largest` at most; what it was, even if its square is beyond float32."""
    norm, unit = torch.nn.utils.get_total_norm(_gradients(parameters)), 1.0
    if not torch.isfinite(norm):
        unit = float(torch.nn.utils.get_total_norm(_gradients(parameters), math.inf))
        if not math.isfinite(unit):
            return math.inf
        torch._foreach_div_(_gradients(parameters), unit)
        norm = torch.nn.utils.get_total_norm(_gradients(parameters))
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return unit * float(norm)


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    loss: float
    """Mean loss per token, nats (NLL, or what the objective mixes); not finite if the update was skipped."""
    gradient_norm: float
    """The 2-norm before clipping; infinite or not a number if the gradient was."""
    skipped: bool


def automatic_learning_rate(hidden_size: int, rule: str = "sqrt-width") -> float:
    """Peak learning rate by a model's width.

    `sqrt-width`: `3e-4 · sqrt(4096 / hidden_size)`, a 7B model's usual rate at its width. `width`: `1e-4 · 4096 /
    hidden_size`, Adam's scaling under the maximal update parametrisation (arXiv 2203.03466, table 3).
    """
    return 1e-4 * 4096 / hidden_size if rule == "width" else 3e-4 * math.sqrt(4096 / hidden_size)


def learning_rate_factor(step: int, steps: int, training: Training) -> float:
    """Share of the peak learning rate at a step (0-based)."""
    rise = math.ceil(training.warm_up * steps)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(steps - rise, 1)
    match training.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - progress
        case "constant":
            return 1.0


SECOND_PEAK = 0.5
"""Of the learning rate: where it begins anew when other weights have taken the place of the frozen ones."""


def attach(model: PreTrainedModel, groups: Groups, lora: Lora) -> None:
    """Give a model the adapters that a recipe asks for, as `attach_lora`."""
    rank, alpha, dropout, ranks = lora.rank, lora.alpha, lora.dropout, groups.expert_ranks(lora)
    attach_lora(
        model, groups.linears, rank=rank, alpha=alpha, dropout=dropout, targets=lora.targets, experts=ranks
    )  # fmt: skip


@contextmanager
def _old_names() -> Iterator[None]:
    """Within this context transformers does not say that newer 5.x has other names: these serve all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Learner:
    """Trains the adapters of a model; everything else is frozen."""

    def __init__(
        self, model: PreTrainedModel, training: Training, data: Iterator[Batch], processes: Processes = ALONE
    ) -> None:
        """Take charge of a LoRA-wrapped model.

        Args:
            data: whole batches, the same in every process.
            processes: those that share the batches.
        """
        self.processes = processes
        self.model = model
        self.training = training
        self.data = data
        self.objective = Objective()
        """What is minimised: the NLL of the text, until another takes its place."""
        self.terms: dict[str, float] = {}
        """What the last loss was made of, if of more than the NLL."""
        self.parameters = adapter_parameters(model)
        hidden = model.config.get_text_config().hidden_size
        self.learning_rate = training.learning_rate or automatic_learning_rate(hidden, training.learning_rate_rule)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.learning_rate, betas=(0.9, training.beta2), weight_decay=training.weight_decay
        )
        self.step_number = 0
        self.begun_anew: int | None = None
        """The step from which on the rate falls once more, from `SECOND_PEAK` of its peak to nothing."""
        self.skipped = 0
        self._skipped_in_a_row = 0
        if training.gradient_checkpointing:
            self.checkpoint_activations()

    def checkpoint_activations(self) -> None:
        """From now on recompute activations in the backward pass."""
        with _old_names():
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Within this context activations are recomputed in the backward pass, whatever the recipe says."""
        self.checkpoint_activations()
        yield
        if not self.training.gradient_checkpointing:
            with _old_names():
                self.model.gradient_checkpointing_disable()

    @property
    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 where the recipe and the hardware have it."""
        device = self.model.device.type
        wanted = self.training.precision
        if wanted == "bfloat16" or (wanted == "auto" and device == "cuda" and torch.cuda.is_bf16_supported()):
            return torch.autocast(device, torch.bfloat16)
        return nullcontext()

    @property
    def compute_dtype(self) -> str:
        """What is computed in: the weights' dtype, unless `autocast` takes another."""
        with self.autocast:
            device = self.model.device.type
            lower = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype
        return str(lower).removeprefix("torch.")

    def backward(
        self,
        data: Iterator[Batch],
        recording: Recording | None = None,
        labels: torch.Generator | None = None,
        look: Callable[[Batch], None] = lambda batch: None,
    ) -> float:
        """Gradients of one step: `accumulate` forward and backward passes, those of one batch of all their tokens.

        Args:
            labels: if given, the model's own predictions are sampled with it and take the place of the text as
                what is to be predicted: squared gradients are then the true Fisher information.
            look: sees every batch before its pass.

        Returns:
            The mean loss of the whole batches; not a number as soon as one is not finite.
        """
        self.model.train()
        total, self.terms = 0.0, {}
        drawn = [next(data) for _ in range(self.training.accumulate)]
        tokens = sum(whole.tokens for whole in drawn)
        for whole in drawn:
            batch = whole.rows(self.processes.rows(len(whole.ids_BT))).to(self.model.device)
            share = batch.tokens / max(tokens, 1)
            look(whole)
            with self.autocast:
                lesson = self.objective.lesson(batch)
            with recording(tokens) if recording else nullcontext():
                with self.autocast:
                    loss, terms = self.objective.loss(self.model, batch, lesson, labels)
                    loss = loss * share
                parts = [loss.item(), *(term.item() * share for term in terms.values())]
                summed, *parts = self.processes.sum(parts)
                if not math.isfinite(summed):
                    return math.nan
                loss.backward()  # type: ignore[no-untyped-call]
            total += summed
            for name, term in zip(terms, parts, strict=True):
                self.terms[name] = self.terms.get(name, 0.0) + term
        self.processes.add_gradients(self.parameters)
        return total

    def step(self, recording: Recording | None = None, before_update: Callable[[], bool] | None = None) -> Step:
        """One optimizer step; skipped, and counted, when the loss or the gradient is not finite.

        Args:
            before_update: sees the clipped gradients before the weights move; False skips the update.

        Raises:
            Diverged: after `max_skipped` skipped updates in a row.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self._factor()
        loss = self.backward(self.data, recording)
        norm = clip_gradients(self.parameters, self.training.clip)
        fine = math.isfinite(loss) and math.isfinite(norm) and (before_update is None or before_update())
        if fine:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.count_step()
        self.step_number += 1
        self.count(skipped=not fine)
        return Step(loss, norm, not fine)

    def _factor(self) -> float:
        """Share of the peak learning rate at the present step."""
        step, steps = self.step_number, self.training.steps
        if self.begun_anew is None:
            return learning_rate_factor(step, steps, self.training)
        return SECOND_PEAK * (steps - step) / (steps - self.begun_anew)

    def count(self, skipped: bool) -> None:
        """Count a skipped update (or batch that was to be scored), or the end of a row of them.

        Raises:
            Diverged: after `max_skipped` in a row.
        """
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        self.skipped += skipped
        if self._skipped_in_a_row >= self.training.max_skipped:
            remedy = (
                "lower training.learning_rate or training.clip, or look for what is odd in the text"
                if self.step_number
                else "look for NaN or infinity in the model's weights, or give other text"
            )
            raise Diverged(
                f"{self._skipped_in_a_row} updates in a row were not finite (step {self.step_number}); {remedy}"
            )

    def state(self) -> State:
        """Adapters, AdamW's moments and counters."""
        factors = dict(zip(adapter_names(self.model), self.parameters, strict=True))
        moments = {
            f"{name}/{key}": value
            for name, factor in factors.items()
            for key, value in self.optimizer.state.get(factor, {}).items()
        }
        counters = {"step": self.step_number, "skipped": self.skipped, "in_a_row": self._skipped_in_a_row}
        return State(counters, named("adapters", {**factors}) | named("moments", moments))

    def go_on(self, state: State) -> None:
        """Be where `state` was taken; the model has been cut as it was then."""
        self.step_number, self.skipped = state.values["step"], state.values["skipped"]
        self._skipped_in_a_row = state.values["in_a_row"]
        adapters = state.under("adapters")
        moments = State(tensors=state.under("moments"))
        for name, factor in zip(adapter_names(self.model), self.parameters, strict=True):
            factor.data.copy_(adapters[name])
            if held := moments.under(name):
                self.optimizer.state[factor] = {
                    key: moment.to(factor.device) if moment.shape == factor.shape else moment
                    for key, moment in held.items()
                }

    def snapshot(self) -> list[Tensor]:
        """Copies of the adapters, on the CPU."""
        return [parameter.detach().cpu().clone() for parameter in self.parameters]

    def restore(self, snapshot: list[Tensor]) -> None:
        """Put back adapters that `snapshot` copied."""
        for parameter, saved in zip(self.parameters, snapshot, strict=True):
            parameter.data.copy_(saved)
