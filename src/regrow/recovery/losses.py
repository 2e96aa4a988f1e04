"""The terms of the loss: the text's NLL, the divergence from a teacher, the distance from its hidden states.

Each is a mean over scored positions. Position t predicts token t + 1, so the last position never counts, and with a
mask position t counts if token t + 1 is scored.

NLL and divergence are computed together, in float32, a few positions at a time, and their gradient along with them:
beside the logits and their gradient there are never more than a few copies of `LOGITS_AT_ONCE` numbers, and each
softmax is taken once. With large vocabularies the logits are most of what a training step needs.

Shapes: B sequences, T tokens, V vocabulary, D hidden size, P positions taken at once, K tokens known of a teacher's
distribution.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from regrow.evaluation.perplexity import LOGITS_AT_ONCE

RULED_OUT = -1e30
"""Stands for the log of a probability of 0: `0 · log 0` is then 0, as the divergence means it."""


class Target(Protocol):
    """What a teacher says about the next token, at positions 1 to T - 1 of a batch."""

    def log_probs(self, positions: slice, log_student_BPV: Tensor) -> Tensor:
        """Log p_T at some positions, float32 `[B, P, V]`.

        Args:
            log_student_BPV: the student's, for a teacher who leaves it to the student how to share out the
                probability that it does not know in detail.
        """


@dataclass(frozen=True)
class FullTarget:
    """A teacher that has given all its logits."""

    logits_BTV: Tensor
    temperature: float

    def log_probs(self, positions: slice, log_student_BPV: Tensor) -> Tensor:
        """`log_softmax(logits / temperature)`."""
        return (self.logits_BTV[:, positions].float() / self.temperature).log_softmax(-1)


@dataclass(frozen=True)
class TopTarget:
    """A teacher's K most likely tokens, and the sum of the others as one bucket.

    Sharing the bucket out as the student does within it makes the divergence over all V tokens equal to that over
    the K + 1 outcomes, `Σ_k p_k log(p_k / q_k) + p_tail log(p_tail / q_tail)`, which by the data-processing inequality
    is at most the full one; the gradient is that of the K + 1 outcomes, too.
    """

    tokens_BTK: Tensor
    """int64, here and below for T - 1 positions."""
    log_probs_BTK: Tensor
    log_tail_BT: Tensor
    """-inf where the K are all there is."""

    def log_probs(self, positions: slice, log_student_BPV: Tensor) -> Tensor:
        """`log p_k` for the K; for the others `log p_tail + log(q / q_tail)`."""
        tokens_BPK = self.tokens_BTK[:, positions]
        log_q_tail_BP = log_student_BPV.scatter(-1, tokens_BPK, -torch.inf).logsumexp(-1)
        completed = log_student_BPV + (self.log_tail_BT[:, positions] - log_q_tail_BP)[..., None]
        return completed.scatter_(-1, tokens_BPK, self.log_probs_BTK[:, positions])


class TokenLoss(NamedTuple):
    """What `token_loss` finds; scalars, float32, nats. Only `total` has a gradient."""

    total: Tensor
    ce: Tensor
    """Mean NLL of the text."""
    kl: Tensor
    """Mean `KL(p_T ‖ p_S)`; 0 without a teacher."""


def token_loss(
    logits_BTV: Tensor,
    ids_BT: Tensor,
    target: Target | None = None,
    *,
    weight: float = 0.0,
    temperature: float = 1.0,
    scored_BT: Tensor | None = None,
) -> TokenLoss:
    """`(1 - w) CE + w τ² KL(p_T ‖ p_S)` (Hinton et al., arXiv 1503.02531); no gradient goes to the teacher.

    Args:
        ids_BT: the text, of which tokens 2 to T are predicted, or those among them that are scored.
        target: what the teacher says, at the same temperature τ.
        weight: w.
    """
    return TokenLoss(
        *_TokenLoss.apply(logits_BTV, ids_BT, _counting(logits_BTV, scored_BT), target, weight, temperature)  # type: ignore[no-untyped-call]
    )


def language_loss(logits_BTV: Tensor, ids_BT: Tensor, scored_BT: Tensor | None = None) -> Tensor:
    """Mean NLL of tokens 2 to T, or of those among them that are scored; nats, float32."""
    return token_loss(logits_BTV, ids_BT, scored_BT=scored_BT).total


def divergence(logits_BTV: Tensor, target: Target, temperature: float, scored_BT: Tensor | None = None) -> Tensor:
    """Mean `KL(p_T ‖ p_S)`, nats, of the softmax of the student's logits / temperature from a teacher's."""
    nothing_BT = torch.zeros(logits_BTV.shape[:2], dtype=torch.long, device=logits_BTV.device)
    loss = token_loss(logits_BTV, nothing_BT, target, weight=1.0, temperature=temperature, scored_BT=scored_BT)
    return loss.total / temperature**2


def sampled_labels(logits_BTV: Tensor, chance: torch.Generator) -> Tensor:
    """Tokens drawn from the model's own predictions, at the place where the text's would be: int64 `[B, T]`.

    The squared gradient of their NLL has the true Fisher information as its mean.
    """
    probabilities = logits_BTV.detach()[:, :-1].float().softmax(-1).flatten(0, 1).cpu()
    drawn = torch.multinomial(probabilities, 1, generator=chance).view(len(logits_BTV), -1)
    return functional.pad(drawn, (1, 0)).to(logits_BTV.device)


class _TokenLoss(torch.autograd.Function):
    """The gradient is found in the forward pass, where both distributions are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_BTV: Tensor,
        ids_BT: Tensor,
        counting_BT: Tensor,
        target: Target | None,
        weight: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = counting_BT.sum().clamp(min=1)
        ce, kl = torch.zeros(2, device=logits_BTV.device)
        grad_BTV = torch.zeros_like(logits_BTV) if ctx.needs_input_grad[0] else None
        for positions in position_chunks(logits_BTV):
            counts_BP = counting_BT[:, positions]
            next_BP1 = ids_BT[:, 1:][:, positions, None]
            chunk_BPV = logits_BTV[:, positions].float()
            log_q = chunk_BPV.log_softmax(-1)
            ce -= log_q.gather(-1, next_BP1)[..., 0][counts_BP].sum()
            log_q_soft, p = log_q, None
            if target is not None:
                log_q_soft = log_q if temperature == 1 else (chunk_BPV / temperature).log_softmax(-1)
                log_p = target.log_probs(positions, log_q_soft).clamp_(min=RULED_OUT)
                p = log_p.exp()
                kl += torch.linalg.vecdot(p, log_p.sub_(log_q_soft))[counts_BP].sum()
            if grad_BTV is None:
                continue
            if p is None:
                gradient = log_q.exp_()
            elif temperature == 1:
                gradient = log_q.exp_().sub_(p, alpha=weight)
            else:
                soft = log_q_soft.exp_().sub_(p)
                gradient = log_q.exp_().mul_(1 - weight).add_(soft, alpha=weight * temperature)
            gradient.scatter_add_(-1, next_BP1, torch.full_like(next_BP1, weight - 1, dtype=gradient.dtype))
            gradient.masked_fill_(~counts_BP[..., None], 0.0)
            grad_BTV[:, positions] = gradient.div_(count).to(grad_BTV.dtype)
        ctx.grad_BTV = grad_BTV
        ce, kl = ce / count, kl / count
        ctx.mark_non_differentiable(ce, kl)
        return (1 - weight) * ce + weight * temperature**2 * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return ctx.grad_BTV * grads[0], None, None, None, None, None


def position_chunks(logits_BTV: Tensor) -> Iterator[slice]:
    """Positions 1 to T - 1 (0-based: 0 to T - 2), a few at a time."""
    batch, tokens, vocabulary = logits_BTV.shape
    size = max(1, LOGITS_AT_ONCE // (batch * vocabulary))
    for start in range(0, tokens - 1, size):
        yield slice(start, min(start + size, tokens - 1))


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], scored_BT: Tensor | None = None) -> Tensor:
    """Mean over layers l and scored positions t of `‖h_S(l, t) - h_T(l, t)‖² / ‖h_T(l, t)‖²`, float32.

    That is the mean squared error of hidden states divided by the teacher's root mean square over D at the same
    position: no layer, and no token with an outsized norm (as the first one has), outweighs the others. Where a
    teacher's state is all zero, its norm counts as one.

    Args:
        student: outputs `[B, T, D]` of the decoder layers.
        teacher: of the layers that they are matched with.
    """
    counting_BT = _counting(student[0], scored_BT)
    total = torch.zeros((), device=student[0].device)
    for own_BTD, wanted_BTD in zip(student, teacher, strict=True):
        wanted_BTD = wanted_BTD[:, :-1].float()
        size_BT = wanted_BTD.square().mean(-1)
        error_BT = (own_BTD[:, :-1].float() - wanted_BTD).square().mean(-1) / size_BT.where(size_BT > 0, 1.0)
        total = total + error_BT[counting_BT].sum() / counting_BT.sum().clamp(min=1)
    return total / len(student)


def _counting(states_BTX: Tensor, scored_BT: Tensor | None) -> Tensor:
    """Which of the positions 1 to T - 1 count, boolean `[B, T - 1]`."""
    if scored_BT is not None:
        return scored_BT[:, 1:]
    batch, tokens, _ = states_BTX.shape
    return torch.ones(batch, tokens - 1, dtype=torch.bool, device=states_BTX.device)
