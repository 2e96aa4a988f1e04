"""The recipe's sources of text: read, some of each held out, cut into windows."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from regrow.data.instructions import make_examples, pack_examples
from regrow.data.shards import holds_tokens, load_rows
from regrow.data.source import load_documents, load_records, path_of, split_documents, split_pieces
from regrow.data.tokens import Windows, join_windows, make_windows, mix_windows, pack_rows
from regrow.errors import InputError
from regrow.settings import Data, Stage, TextSource

CHARACTERS_PER_TOKEN = 12
"""More than any tokenizer's average: how much of an endless data set to read for a number of tokens."""

LEAST_TOKENS = 2_000_000
"""Read so many of text that is tokenized, however few are trained on: parts of them are held out."""

OWN_TEXT = "text by the model itself"
"""Name of the source when no text is given."""

HELD_OUT = "(held-out documents)"
"""What the name of a text ends in that was taken from the text to train on."""

INSTRUCTIONS = "instructions"
"""Name of the source that `data.instructions` gives."""


@dataclass(frozen=True)
class Source:
    """One source of text, as windows."""

    name: str
    stage: Stage
    weight: float
    """What it contributes to its stage at first, relative to the stage's other sources."""
    train: Windows
    validation: Windows
    """Of documents held out, drawn at random."""


@dataclass(frozen=True)
class Corpus:
    """All that is trained on, and what is held out of it."""

    sources: tuple[Source, ...]

    @cached_property
    def train(self) -> Windows:
        """Every source's windows, one source after another."""
        return join_windows([source.train for source in self.sources])

    @cached_property
    def validation(self) -> Windows:
        """Every source's held-out windows, one source after another."""
        return join_windows([source.validation for source in self.sources])

    @cached_property
    def ranges(self) -> list[range]:
        """Where each source's windows are in `train`."""
        bounds = itertools.accumulate((len(source.train) for source in self.sources), initial=0)
        return [range(start, stop) for start, stop in itertools.pairwise(bounds)]

    def members(self, stage: Stage) -> list[int]:
        """Numbers of a stage's sources."""
        return [number for number, source in enumerate(self.sources) if source.stage == stage]

    @cached_property
    def pretrain(self) -> "Corpus":
        """What models are scored, searched and analysed on: the sources of that stage alone."""
        return Corpus(tuple(self.sources[number] for number in self.members("pretrain")))

    def sample(self, count: int) -> Windows:
        """At most `count` windows to train on; see `mix_windows`."""
        return mix_windows([source.train for source in self.sources], self._weights, count)

    def held_out(self, count: int) -> Windows:
        """At most `count` held-out windows; see `mix_windows`."""
        return mix_windows([source.validation for source in self.sources], self._weights, count)

    @property
    def _weights(self) -> list[float]:
        return [source.weight for source in self.sources]


def writes_own_text(data: Data) -> bool:
    """Whether no text is given, so that the model has to write it."""
    return data.source is None and not data.sources


def list_sources(data: Data) -> tuple[TextSource, ...]:
    """What the recipe reads, whichever way it is written there.

    Raises:
        InputError: if there is no text, or it is not clear which.
    """
    if data.source is not None and data.sources:
        raise InputError("data.source (--data) and data.sources are both given; leave one of them out")
    sources = data.sources
    if data.source is not None:
        sources = (TextSource(name=Path(data.source).name, source=data.source, text_field=data.text_field),)
    if writes_own_text(data):
        sources = (TextSource(name=OWN_TEXT, source=OWN_TEXT),)
    if not any(source.stage == "pretrain" for source in sources):
        raise InputError("data.sources has no text of the pretrain stage; give one, or --data")
    if data.instructions is not None:
        sources += (TextSource(name=INSTRUCTIONS, source=data.instructions, stage="instruct"),)
    name, count = Counter(source.name for source in sources).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} sources of text are called {name!r}; give each a name of its own (data.sources)")
    return sources


def check_there(data: Data) -> None:
    """See that what can only be a file or a folder is there, before anything is read.

    Raises:
        InputError: if it is not.
    """
    for source in list_sources(data):
        if source.source != OWN_TEXT and not holds_tokens(source.source, source.text_field):
            path_of(source.source)
    if data.eval_source is not None:
        path_of(data.eval_source)


def read_corpus(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    eval_windows: int,
    seed: int,
    own_documents: Sequence[str] | None = None,
) -> tuple[Corpus, list[str]]:
    """Read every source, and hold documents out of each.

    Args:
        own_documents: the text, if the model has written it.
        max_tokens: use at most so many of each source.
        eval_windows: held-out windows of each source.

    Returns:
        The corpus, and documents to evaluate on: a share of each source of the pretraining stage, part of nothing
        else; none if the recipe has another text for that.

    Raises:
        InputError: if a source cannot be read, or is too short.
    """
    sources, test = [], []
    for wanted in list_sources(data):
        if wanted.stage == "pretrain":
            tested = data.eval_source is None
            if own_documents is None and holds_tokens(wanted.source, wanted.text_field):
                part = _part_rows(wanted, data, tokenizer, max_tokens, seed, tested)
            else:
                part = _part_text(own_documents, wanted, data, tokenizer, max_tokens, seed, tested)
            train, validation, held_out = part
            test += held_out
        else:
            train, validation = _read_instructions(wanted, data, tokenizer, max_tokens, seed)
        validation = validation.first(eval_windows)
        sources.append(Source(wanted.name, wanted.stage, wanted.weight, train, validation))
    return Corpus(tuple(sources)), test


def _part_text(
    own_documents: Sequence[str] | None,
    wanted: TextSource,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    seed: int,
    tested: bool,
) -> tuple[Windows, Windows, list[str]]:
    characters = CHARACTERS_PER_TOKEN * max_tokens
    documents = own_documents or load_documents(wanted.source, wanted.text_field, max_characters=characters)
    validation, *test, train = split_documents(documents, [data.held_out] * (1 + tested), seed)
    length, bos, held_out = data.sequence_length, data.bos, f"{wanted.source} (held out)"
    return (
        make_windows(train, tokenizer, length, bos=bos, source=wanted.source, max_tokens=max_tokens),
        make_windows(validation, tokenizer, length, bos=bos, source=held_out),
        list(itertools.chain(*test)),
    )


def _part_rows(
    wanted: TextSource, data: Data, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int, tested: bool
) -> tuple[Windows, Windows, list[str]]:
    """Of text tokenized before; what is held out to evaluate on is text again."""
    shares = [data.held_out] * (1 + tested)
    wanted_tokens = max(math.ceil(max_tokens / (1 - sum(shares))), LEAST_TOKENS)
    rows = load_rows(wanted.source, tokenizer, wanted_tokens, seed)
    validation, *test, train = split_pieces(rows, shares, seed, len)
    length, bos, held_out = data.sequence_length, data.bos, f"{wanted.source} (held out)"
    return (
        pack_rows(train, tokenizer, length, bos=bos, source=wanted.source, max_tokens=max_tokens),
        pack_rows(validation, tokenizer, length, bos=bos, source=held_out),
        [str(tokenizer.decode(row, skip_special_tokens=True)) for row in itertools.chain(*test)],
    )


def _read_instructions(
    wanted: TextSource, data: Data, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int
) -> tuple[Windows, Windows]:
    records = load_records(wanted.source, CHARACTERS_PER_TOKEN * max_tokens)
    examples = make_examples(records, tokenizer, data.template, wanted.source)
    validation, train = split_pieces(examples, [data.held_out], seed, len)
    length, bos, held_out = data.sequence_length, data.bos, f"{wanted.source} (held out)"
    return (
        pack_examples(train, tokenizer, length, bos=bos, source=wanted.source, max_tokens=max_tokens),
        pack_examples(validation, tokenizer, length, bos=bos, source=held_out),
    )
