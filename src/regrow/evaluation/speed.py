"""How fast models read a prompt and write on, compared on one machine at one time.

The models take turns, so that whatever else the machine is doing slows them all alike: trust the ratios more
than the rates. Plain transformers forwards, no compilation, no serving engine.

Not covered: padding, sampling, and beams; quantised kernels run as the model brings them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.load import most_positions
from regrow.errors import InputError
from regrow.evaluation.perplexity import inference

CACHES = ("cache", "past_key_values", "cache_params")
"""What models may call the argument for what they keep of what they have read; the first since transformers 5.24."""


@dataclass(frozen=True)
class Rate:
    """Tokens per second over the repeats: the median and the two quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """One model at one batch size."""

    batch: int
    prompt: int
    """Tokens of each prompt, after clipping to what the models can hold."""
    new_tokens: int
    prefill: Rate
    """Prompt tokens read per second, over the whole batch; logits are computed at every position."""
    decode: Rate
    """New tokens per second, over the whole batch, one at a time with the KV cache; prefill not included."""
    repeats: int
    threads: int
    """Of torch's CPU pool."""
    device: str


@dataclass(frozen=True)
class Speedup:
    """How many times faster one model is than another, median against median."""

    batch: int
    prefill: float
    decode: float


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    batches: Sequence[int] = (1, 4),
    prompt: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    warm_up: int = 2,
    on_repeat: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[Speed, ...]]:
    """Time all models in turns: A, B, A, B, … for each batch size.

    The prompts are the same random ids for all models, below the smallest vocabulary. The prompt is shortened
    where prompt and new tokens together exceed the positions of a model. Threads are left as they are: set
    `torch.set_num_threads` first.

    Args:
        models: what to compare, by name, in the order of the turns.
        batches: how many prompts at once, one measurement for each.
        prompt: tokens of every prompt.
        new_tokens: tokens to write after it.
        repeats: timed turns of each model.
        warm_up: turns of each model before them that are run and forgotten.
        on_repeat: called with the model's name after every turn, warm-up included.
        clock: seconds, monotonic.

    Returns:
        For every name one `Speed` per batch size, in the order of `batches`.

    Raises:
        InputError: if `new_tokens` leave no room for a prompt.
    """
    prompt = _clip(models, prompt, new_tokens)
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    speeds: dict[str, list[Speed]] = {name: [] for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(inference(model))
        for batch in batches:
            generator = torch.Generator().manual_seed(0)
            ids_BT = torch.randint(vocabulary, (batch, prompt), generator=generator)
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
            for turn in range(warm_up + repeats):
                for name, model in models.items():
                    taken = _turn(model, ids_BT.to(model.device), new_tokens, clock)
                    if turn >= warm_up:
                        seconds[name].append(taken)
                    if on_repeat is not None:
                        on_repeat(name)
            for name, model in models.items():
                speeds[name].append(_speed(seconds[name], batch, prompt, new_tokens, model.device))
    return {name: tuple(found) for name, found in speeds.items()}


def ratios(dense: Sequence[Speed], other: Sequence[Speed]) -> tuple[Speedup, ...]:
    """Speed-ups of `other` over `dense`, entry by entry; both come from one `measure_speed`."""
    return tuple(
        Speedup(a.batch, b.prefill.median / a.prefill.median, b.decode.median / a.decode.median)
        for a, b in zip(dense, other, strict=True)
    )


def _clip(models: Mapping[str, PreTrainedModel], prompt: int, new_tokens: int) -> int:
    for name, model in models.items():
        limit = most_positions(model.config)
        if limit is None:  # no position embeddings of any kind (ALiBi, state spaces)
            continue
        prompt = min(prompt, limit - new_tokens)
        if prompt < 1:
            raise InputError(f"{name} has only {limit} positions; {new_tokens} new tokens leave no prompt")
    return prompt


def cache_names(model: PreTrainedModel) -> list[str]:
    """Under which names a model takes what it has kept of what it has read; none if it keeps nothing."""
    return [name for name in CACHES if name in signature(model.forward).parameters]


def _turn(model: PreTrainedModel, ids_BT: Tensor, new_tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds for the prompt, and seconds for the greedy new tokens after it.

    A model that keeps nothing of what it has read reads everything again for each token.
    """
    names = cache_names(model)
    _wait(model.device)
    start = clock()
    output = model(input_ids=ids_BT, use_cache=True)
    _wait(model.device)
    read = clock()
    for _ in range(new_tokens):
        next_B1 = output.logits[:, -1:].argmax(-1)
        kept = {name: output[name] for name in names if name in output}
        ids_BT = next_B1 if kept else torch.cat([ids_BT, next_B1], 1)
        output = model(input_ids=ids_BT, use_cache=True, **kept)
    _wait(model.device)
    return read - start, clock() - read


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speed(
    seconds: Sequence[tuple[float, float]], batch: int, prompt: int, new_tokens: int, device: torch.device
) -> Speed:
    prefill, decode = zip(*seconds, strict=True)
    return Speed(
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        prefill=_rate(batch * prompt, prefill),
        decode=_rate(batch * new_tokens, decode),
        repeats=len(seconds),
        threads=torch.get_num_threads(),
        device=str(device),
    )


def _rate(tokens: int, seconds: Sequence[float]) -> Rate:
    rates = tokens / torch.tensor(seconds, dtype=torch.float64)
    low, median, high = rates.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Rate(median, low, high)
