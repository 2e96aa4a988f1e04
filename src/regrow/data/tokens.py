"""Windows of tokens: what models train on and are measured on.

Shapes: N windows, T tokens in a window, B windows in a batch.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.data.store import Ids, keep, name_of
from regrow.errors import InputError
from regrow.settings import Bos

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
        digest = hashlib.sha256(np.ascontiguousarray(self.ids_NT.numpy()).data)
        if self.scored_NT is not None:
            digest.update(np.ascontiguousarray(self.scored_NT.numpy()).data)
        return digest.hexdigest()

    def first(self, count: int | None) -> "Windows":
        """At most `count` windows, evenly spread over the text."""
        if count is None or count >= len(self):
            return self
        return self.only(torch.linspace(0, len(self) - 1, count).long())

    def only(self, numbers_N: Tensor) -> "Windows":
        """The windows of these numbers, in this order."""
        scored_NT = None if self.scored_NT is None else self.scored_NT[numbers_N]
        return Windows(self.ids_NT[numbers_N], self.source, self.bos, scored_NT)

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

    Tokens that were made before are taken from disk (`data/store.py`), and mapped rather than read.

    With `bos="once"` documents are joined by a blank line and tokenized as one text with one BOS at its
    start, as the literature does with WikiText-2. A tokenizer without BOS adds none.

    Raises:
        InputError: if the text is shorter than one window.
    """
    if bos == "once":
        documents = ["\n\n".join(documents)]
    mark = _mark(tokenizer, bos)
    name = name_of(documents, tokenizer, (mark, max_tokens))
    return _cut(keep(name, lambda: _first(_tokenized(documents, tokenizer, mark), max_tokens)), length, bos, source)


def pack_rows(
    rows: Sequence[Ids],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    bos: Bos,
    source: str,
    max_tokens: int | None = None,
) -> Windows:
    """As `make_windows`, of documents that have been tokenized; one that begins with BOS gets no other.

    Raises:
        InputError: if they are shorter than one window.
    """
    mark = np.array(_mark(tokenizer, bos), dtype=np.int64)

    def marked() -> Iterator[Ids]:
        for number, row in enumerate(rows):
            wanted = bos == "document" or number == 0
            yield np.concatenate([mark, row]) if wanted and not np.array_equal(row[:1], mark) else row

    ids = np.concatenate(list(_first(marked(), max_tokens)))
    return _cut(torch.from_numpy(ids), length, bos, source)


def _mark(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> list[int]:
    return [] if bos == "none" or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _tokenized(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, mark: list[int]) -> Iterator[Ids]:
    """Some documents at a time, `mark` before each."""
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        batch = list(documents[start : start + DOCUMENTS_AT_ONCE])
        rows = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield np.array(list(itertools.chain.from_iterable(mark + row for row in rows)), dtype=np.int64)


def _first(parts: Iterable[Ids], count: int | None) -> Iterator[Ids]:
    """Tokens until there are so many; all, if no number is given."""
    for ids in parts:
        yield ids[:count]
        if count is not None:
            count -= len(ids[:count])
            if not count:
                return


def _cut(ids: Tensor, length: int, bos: Bos, source: str) -> Windows:
    count = len(ids) // length
    if count == 0:
        raise InputError(
            f"{source}: {len(ids)} tokens are fewer than one window of {length}; give more text or a shorter window"
        )
    return Windows(ids[: count * length].view(count, length), source, bos)


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


def mix_windows(parts: Sequence[Windows], weights: Sequence[float], count: int) -> Windows:
    """At most `count` windows, of each part its share by weight, evenly spread over it; any stretch of them is mixed.

    A part that has fewer gives all that it has.
    """
    ends = [round(count * end / sum(weights)) for end in itertools.accumulate(weights)]
    chosen = [part.first(end - start) for part, (start, end) in zip(parts, itertools.pairwise([0, *ends]), strict=True)]
    places = torch.cat([(torch.arange(len(each)) + 0.5) / max(len(each), 1) for each in chosen])
    mixed = join_windows(chosen)
    return mixed if len(parts) == 1 else mixed.only(places.argsort(stable=True))


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
