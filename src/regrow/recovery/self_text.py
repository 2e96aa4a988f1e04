"""Text that the model writes itself, to calibrate and recover on when none is given.

Every text begins with a few tokens sampled from the model as it is, so that texts differ, and is then continued
with less chance; the texts that surprise the model most are dropped. The recipe for sampling and dropping is that of
"Beware of Calibration Data for Pruning Large Language Models" (arXiv 2410.17711), whose prefixes come from Wikipedia.

Not covered: chat templates; an instruction-tuned model writes as a base model would.

Shapes: B texts, T tokens of a text, start token included, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from regrow.errors import InputError
from regrow.evaluation.perplexity import inference, summed_loss
from regrow.progress import Progress
from regrow.recipe import Recipe
from regrow.settings import Generate

SCORED_AT_ONCE = 4
"""Texts whose logits are in memory together when they are scored."""
IGNORED = -100
"""A target that `torch.nn.functional.cross_entropy` leaves out."""


@dataclass(frozen=True)
class OwnText:
    """What the model wrote and what was kept of it."""

    documents: list[str]
    """In the order in which they were written."""
    tokens: int
    """Of the documents kept, as the model wrote them."""
    dropped: int
    """Texts left out: blank ones, and those that surprised the model most."""

    def to_json(self) -> dict[str, int]:
        """The figures."""
        return {"texts": len(self.documents), "tokens": self.tokens, "dropped_texts": self.dropped}


def tokens_to_write(recipe: Recipe, training_tokens: int) -> int:
    """How much a run can use, held-out parts and dropped texts included, at most `generate.tokens`.

    Args:
        training_tokens: what scoring and training can use.

    Raises:
        InputError: if `generate.tokens` is too little to hold out a window to evaluate on.
    """
    held_out, longest = recipe.data.held_out, max(recipe.data.sequence_length, *recipe.evaluation.windows)
    kept = max(training_tokens / (1 - 2 * held_out), 2 * longest / held_out)
    wanted = math.ceil(kept / (1 - recipe.generate.drop))
    least = math.ceil(2 * longest / held_out / (1 - recipe.generate.drop))
    if recipe.generate.tokens < least:
        raise InputError(
            f"generate.tokens = {recipe.generate.tokens} is too little text to hold out windows of {longest} tokens; "
            f"use at least {least}, or give your own text with --data"
        )
    return min(wanted, recipe.generate.tokens)


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a text of the model begins with: BOS, or what ends the text before.

    Raises:
        InputError: if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("the model cannot write text by itself: its tokenizer has neither BOS nor EOS; give --data")


def write_own_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Generate,
    tokens: int,
    seed: int,
    progress: Progress,
) -> OwnText:
    """Let the model write until it has written `tokens` tokens, and keep the texts that surprise it least.

    The same seed gives the same texts; the state of torch's random generators is left as it was. `progress` advances
    by the tokens written.

    Raises:
        InputError: if the tokenizer has no token to begin with.
    """
    start = start_token(tokenizer)
    texts: list[str] = []
    losses: list[float] = []
    lengths: list[int] = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), inference(model):
        torch.manual_seed(seed)
        while (left := tokens - sum(lengths)) > 0:
            ids_BT = _write(model, tokenizer, wanted, start)
            length_B = _lengths(ids_BT, tokenizer.eos_token_id)
            losses += _mean_losses(model, ids_BT, length_B).tolist()
            for ids_T, length in zip(ids_BT, length_B.tolist(), strict=True):
                texts.append(str(tokenizer.decode(ids_T[:length], skip_special_tokens=True)))
                lengths.append(length - 1)
            progress.advance(min(int(length_B.sum()) - len(length_B), left), f"{len(texts)} texts")
    losses = [loss if text.strip() else math.inf for text, loss in zip(texts, losses, strict=True)]
    kept = _least_surprising(losses, wanted.drop)
    return OwnText([texts[n] for n in kept], sum(lengths[n] for n in kept), len(texts) - len(kept))


def _least_surprising(losses: list[float], drop: float) -> list[int]:
    """Numbers, ascending, of all but the share `drop` with the highest losses; one that is infinite always goes."""
    finite = [number for number, loss in enumerate(losses) if math.isfinite(loss)]
    order = sorted(finite, key=lambda number: losses[number])
    return sorted(order[: len(losses) - math.floor(drop * len(losses))])


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: Generate, start: int) -> Tensor:
    """A batch of texts, `[B, T]`; after its end a text is padded with EOS."""
    ids_BT = torch.full((wanted.batch_size, 1), start, device=model.device)
    special = [token for token in tokenizer.all_special_ids if token is not None]
    for _ in range(min(wanted.prefix_tokens, wanted.length - 1)):
        logits_BV = model(input_ids=ids_BT, use_cache=False).logits[:, -1].float()
        logits_BV[:, special] = -math.inf
        logits_BV[:, len(tokenizer) :] = -math.inf  # rows of the embedding that no token has
        ids_BT = torch.cat([ids_BT, logits_BV.softmax(-1).multinomial(1)], 1)
    if ids_BT.shape[1] == wanted.length:
        return ids_BT
    how = GenerationConfig(
        do_sample=True,
        num_beams=1,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        repetition_penalty=wanted.repetition_penalty,
        max_length=wanted.length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=start if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
    )
    writer: Any = model  # transformers declares `generate` on each model class, not on their common one
    written: Tensor = writer.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=how)
    return written


def _lengths(ids_BT: Tensor, end: int | None) -> Tensor:
    """Tokens of each text up to the first `end` after the start, that included: `[B]`."""
    length = ids_BT.shape[1]
    if end is None:
        return torch.full((len(ids_BT),), length)
    ended_BT = (ids_BT[:, 1:] == end).cpu()
    return torch.where(ended_BT.any(1), ended_BT.int().argmax(1) + 2, length)


def _mean_losses(model: PreTrainedModel, ids_BT: Tensor, length_B: Tensor) -> Tensor:
    """Mean NLL per token of each text under the model as it is, nats: float64, `[B]`, on the CPU."""
    targets_BT = ids_BT.clone()
    positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    targets_BT[positions_T >= length_B.to(ids_BT.device)[:, None]] = IGNORED
    summed = []
    for ids, targets in zip(*(torch.split(ids, SCORED_AT_ONCE) for ids in (ids_BT, targets_BT)), strict=True):
        logits_BTV = model(input_ids=ids, use_cache=False).logits
        summed.append(summed_loss(logits_BTV[:, :-1], targets[:, 1:]).cpu())
    return torch.cat(summed) / (length_B - 1)
