"""Perplexity over windows of token ids.

Shapes: N windows, T tokens per window, B windows per batch, V vocabulary.

Not covered: building the windows from text, padding (every token of a window is real), and windows that
overlap (each starts without a context, so longer ones mean a lower perplexity: compare only equal lengths).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from regrow.errors import InputError

UNSCORED = -100  # what PyTorch's cross-entropy passes over
LOGITS_AT_ONCE = 2**24  # upcast in one go: 64 MiB in float32, and as much again inside the cross-entropy


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by a text, and how well that is known."""

    value: float
    """exp(nll); infinite where that overflows."""
    nll: float
    """Mean negative log-likelihood per scored token, in nats."""
    tokens: int
    """Tokens that were scored: all but the first of each window."""
    windows: int
    window: int
    """Tokens per window, the unscored first one included."""
    standard_error: float | None
    """Of `nll`, from the spread over windows; unknown (None) with a single window."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is back in the mode it was in."""
    former = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in former:
            module.training = training


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without autograd."""
    with evaluation_mode(model), torch.inference_mode():
        yield


def perplexity(
    model: PreTrainedModel,
    windows_NT: Tensor,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> Perplexity:
    """Perplexity of the model over the windows, each scored on its own from its second token on.

    All windows have one length, so the mean over tokens is also the mean over windows.

    Args:
        model: any causal language model, on its device.
        windows_NT: token ids (int64), at least one window of at least two tokens.
        batch_size: windows per forward pass; it changes speed and memory, not the result.
        on_batch: called after every batch with the number of windows in it.

    Raises:
        InputError: if the loss of a window is NaN or infinite.
    """
    losses_N = window_losses(model, windows_NT, batch_size, on_batch)
    _demand_finite(losses_N)
    windows, window = windows_NT.shape
    means_N = losses_N / (window - 1)
    mean = means_N.mean()
    spread = float(means_N.std()) / math.sqrt(windows) if windows > 1 else None
    return Perplexity(float(mean.exp()), float(mean), windows * (window - 1), windows, window, spread)


def window_losses(
    model: PreTrainedModel,
    windows_NT: Tensor,
    batch_size: int,
    on_batch: Callable[[int], None] | None,
    scored_NT: Tensor | None = None,
) -> Tensor:
    """The summed negative log-likelihood of tokens 2..T of every window: nats, float64, `[N]`, on the CPU.

    Non-finite losses are returned as they are. `on_batch` gets the number of windows just scored. With `scored_NT`
    (boolean) only the tokens that it marks count.
    """
    targets_NT = windows_NT if scored_NT is None else windows_NT.masked_fill(~scored_NT, UNSCORED)
    losses = []
    with inference(model):
        for ids_BT, targets_BT in zip(
            torch.split(windows_NT, batch_size), torch.split(targets_NT, batch_size), strict=True
        ):
            logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
            losses.append(summed_loss(logits_BTV[:, :-1], targets_BT[:, 1:].to(logits_BTV.device)).cpu())
            if on_batch is not None:
                on_batch(len(ids_BT))
    return torch.cat(losses)


def summed_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy in float32, a few positions at a time, summed over each row in float64: `[B]`."""
    batch, _, vocabulary = logits_BTV.shape
    positions = max(1, LOGITS_AT_ONCE // (batch * vocabulary))
    total_B = torch.zeros(batch, dtype=torch.float64, device=logits_BTV.device)
    chunks = zip(torch.split(logits_BTV, positions, 1), torch.split(targets_BT, positions, 1), strict=True)
    for chunk, targets in chunks:
        nll = F.cross_entropy(chunk.float().flatten(0, 1), targets.flatten(), reduction="none")
        total_B += nll.view(batch, -1).double().sum(1)
    return total_B


def _demand_finite(losses_N: Tensor) -> None:
    bad = (~losses_N.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"the loss of window {bad[0]} is {float(losses_N[bad[0]])} ({len(bad)} of {len(losses_N)} "
            "windows are not finite). If all are, look for NaN or infinity in the weights; if only some are, "
            "activations overflow: load the model in bfloat16 or float32 instead of float16"
        )
