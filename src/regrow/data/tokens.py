"""Windows of tokens: what models train on and are measured on.

Shapes: N windows, T tokens in a window, B windows in a batch.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.errors import InputError

Bos = Literal["document", "once", "none"]
DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of a tokenized text, none overlapping, the tail dropped."""

    ids_NT: Tensor
    source: str
    bos: Bos
    scored_NT: Tensor | None = None
    """Which tokens count in a loss, boolean; without it all do that have one before them to be predicted from."""

    def __len__(self) -> int:
        return len(self.ids_NT)

    @property
    def length(self) -> int:
        """T."""
        return self.ids_NT.shape[1]

    @property
    def tokens(self) -> int:
        """How many tokens count in a loss."""
        return self.ids_NT[:, 1:].numel() if self.scored_NT is None else int(self.scored_NT[:, 1:].sum())

    @property
    def sha256(self) -> str:
        """Hash of the tokens, and of which are scored, to tell whether two runs saw the same text."""
        scored = b"" if self.scored_NT is None else self.scored_NT.numpy().tobytes()
        return hashlib.sha256(self.ids_NT.numpy().tobytes() + scored).hexdigest()

    def first(self, count: int | None) -> "Windows":
        """At most `count` windows, evenly spread over the text."""
        if count is None or count >= len(self):
            return self
        chosen = torch.linspace(0, len(self) - 1, count).long()
        scored_NT = None if self.scored_NT is None else self.scored_NT[chosen]
        return Windows(self.ids_NT[chosen], self.source, self.bos, scored_NT)

    def batch(self, numbers_B: Tensor) -> "Batch":
        """The windows of these numbers."""
        scored_BT = None if self.scored_NT is None else self.scored_NT[numbers_B]
        return Batch(self.ids_NT[numbers_B], scored_BT, numbers_B)


@dataclass(frozen=True)
class Batch:
    """Windows that pass through a model together."""

    ids_BT: Tensor
    scored_BT: Tensor | None = None
    """Which tokens count in the loss, boolean; without it all do that have one before them to be predicted from."""
    numbers_B: Tensor | None = None
    """Which of the `Windows` these are; unknown where a batch was not drawn from any."""

    @property
    def tokens(self) -> int:
        """How many tokens count in the loss."""
        return self.ids_BT[:, 1:].numel() if self.scored_BT is None else int(self.scored_BT[:, 1:].sum())

    def rows(self, rows: slice) -> "Batch":
        """Some of the windows."""
        scored_BT = None if self.scored_BT is None else self.scored_BT[rows]
        numbers_B = None if self.numbers_B is None else self.numbers_B[rows]
        return Batch(self.ids_BT[rows], scored_BT, numbers_B)

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device; window numbers stay where they are."""
        scored_BT = None if self.scored_BT is None else self.scored_BT.to(device)
        return Batch(self.ids_BT.to(device), scored_BT, self.numbers_B)


def make_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    bos: Bos,
    source: str,
    max_tokens: int | None = None,
) -> Windows:
    """Tokenize documents, join them and cut the whole into windows of `length`.

    With `bos="once"` documents are joined by a blank line and tokenized as one text with one BOS at its
    start, as the literature does with WikiText-2. A tokenizer without BOS adds none.

    Raises:
        InputError: if the text is shorter than one window.
    """
    mark = [] if bos == "none" or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if bos == "once":
        documents = ["\n\n".join(documents)]
    ids: list[int] = []
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        batch = list(documents[start : start + DOCUMENTS_AT_ONCE])
        for tokens in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += mark + tokens
        if max_tokens is not None and len(ids) >= max_tokens:
            ids = ids[:max_tokens]
            break
    count = len(ids) // length
    if count == 0:
        raise InputError(
            f"{source}: {len(ids)} tokens are fewer than one window of {length}; give more text or a shorter window"
        )
    return Windows(torch.tensor(ids[: count * length]).view(count, length), source, bos)


def join_windows(parts: Sequence[Windows]) -> Windows:
    """One after the other. Where any has a mask, the others' tokens are all scored."""
    if len(parts) == 1:
        return parts[0]
    scored_NT = None
    if any(part.scored_NT is not None for part in parts):
        masks = [
            torch.ones_like(part.ids_NT, dtype=torch.bool) if part.scored_NT is None else part.scored_NT
            for part in parts
        ]
        scored_NT = torch.cat(masks)
    source = ", ".join(part.source for part in parts)
    return Windows(torch.cat([part.ids_NT for part in parts]), source, parts[0].bos, scored_NT)


def window_order(count: int, seed: int) -> Iterator[int]:
    """Numbers of windows without end: every epoch a new permutation, from the seed alone."""
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from torch.randperm(count, generator=generator).tolist()


def batches(windows: Windows, size: int, seed: int) -> Iterator[Batch]:
    """Batches of `size` without end, in `window_order`."""
    order = window_order(len(windows), seed)
    while True:
        yield windows.batch(torch.tensor(list(itertools.islice(order, size))))
