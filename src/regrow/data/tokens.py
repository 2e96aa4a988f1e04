"""Windows of tokens: what models train on and are measured on.

Shapes: N windows, T tokens in a window, B windows in a batch.
"""

import hashlib
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

    def __len__(self) -> int:
        return len(self.ids_NT)

    @property
    def length(self) -> int:
        """T."""
        return self.ids_NT.shape[1]

    @property
    def sha256(self) -> str:
        """Hash of the tokens, to tell whether two runs saw the same text."""
        return hashlib.sha256(self.ids_NT.numpy().tobytes()).hexdigest()

    def first(self, count: int | None) -> "Windows":
        """At most `count` windows, evenly spread over the text."""
        if count is None or count >= len(self):
            return self
        chosen = torch.linspace(0, len(self) - 1, count).long()
        return Windows(self.ids_NT[chosen], self.source, self.bos)


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


def batches(windows: Windows, size: int, seed: int) -> Iterator[Batch]:
    """Batches of `size` without end: every epoch a new permutation of the windows, from the seed alone."""
    epoch, left = 0, torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            left = torch.cat([left, torch.randperm(len(windows), generator=generator)])
            epoch += 1
        yield Batch(windows.ids_NT[left[:size]], numbers_B=left[:size])
        left = left[size:]
