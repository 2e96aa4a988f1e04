"""Instruction records as windows of tokens in which only the responses are scored.

A record is Alpaca-like (`instruction`, `output`, and perhaps `input`) or a chat (`messages`: a list of `role` and
`content`). Records are packed: one after another, cut into windows of one length, the tail dropped; a record may begin
in one window and end in the next, and windows without a scored token are left out. Not covered: attention is not
kept from crossing into the record before, and tool calls or content other than text are refused.

Shapes: N windows, T tokens in a window.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from transformers import PreTrainedTokenizerBase

from regrow.data.source import Record
from regrow.data.tokens import Windows
from regrow.errors import InputError
from regrow.settings import Bos, Template

INTRODUCTION = (
    "Below is an instruction that describes a task{with_input}. "
    "Write a response that appropriately completes the request."
)
WITH_INPUT = ", paired with an input that provides further context"
"""What the Alpaca format puts before every record."""


@dataclass(frozen=True)
class Example:
    """A record as text."""

    pieces: tuple[tuple[str, bool], ...]
    """In order; with each, whether it is a response, which is scored."""
    ended: bool
    """Whether the text marks its end itself, as chat templates do; else EOS follows."""

    def __len__(self) -> int:
        """Characters."""
        return sum(len(text) for text, _ in self.pieces)


def make_examples(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, template: Template, source: str
) -> list[Example]:
    """Records as text; those with a blank response are dropped.

    Args:
        template: `alpaca`, or `chat` for the tokenizer's own; `auto` is `chat` if the tokenizer has one.

    Raises:
        InputError: names the record and the field that is missing or cannot be used.
    """
    chat = template == "chat" or (template == "auto" and tokenizer.chat_template is not None)
    if chat and tokenizer.chat_template is None:
        raise InputError("data.template = 'chat': the model's tokenizer has no chat template; use alpaca")
    examples = []
    for number, record in enumerate(records, 1):
        where = f"{source}: record {number}"
        messages = _messages(record, where)
        if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
            continue
        if chat:
            examples.append(Example(tuple(_chat_pieces(messages, tokenizer, where)), ended=True))
        elif record.get("messages") is None:
            examples.append(Example(_alpaca_pieces(record), ended=False))
        else:
            raise InputError(
                f"{where} holds messages, for which the model's tokenizer has no template; give records "
                "with instruction, input and output instead"
            )
    if not examples:
        raise InputError(f"{source} holds no responses; give other instructions")
    return examples


def _messages(record: Record, where: str) -> list[dict[str, str]]:
    """A record as a chat."""
    if record.get("messages") is None:
        instruction, output = (_text(record, field, where) for field in ("instruction", "output"))
        further = _text(record, "input", where) if record.get("input") is not None else ""
        question = f"{instruction}\n\n{further}" if further else instruction
        return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{where}: field 'messages' is not a list of objects with role and content")
    return [
        {field: _text(message, field, f"{where}, message {number}") for field in ("role", "content")}
        for number, message in enumerate(messages, 1)
    ]


def _text(fields: dict[str, Any], field: str, where: str) -> str:
    value = fields.get(field)
    if value is None:
        there = ", ".join(name for name, content in fields.items() if content is not None)
        raise InputError(
            f"{where} has no field {field!r} but {there or 'nothing'}; "
            "instructions need instruction and output, or messages"
        )
    if not isinstance(value, str):
        raise InputError(f"{where}: field {field!r} is of type {type(value).__name__}, not text")
    return value


def _alpaca_pieces(record: Record) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """The Alpaca prompt (Stanford Alpaca, as alpaca-lora and LLM-Pruner lay it out), and the response."""
    further = record.get("input") or ""
    parts = [
        INTRODUCTION.format(with_input=WITH_INPUT if further else ""),
        f"### Instruction:\n{record['instruction']}",
    ]
    if further:
        parts.append(f"### Input:\n{further}")
    return ("\n\n".join([*parts, "### Response:\n"]), False), (record["output"], True)


def _chat_pieces(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str
) -> Iterator[tuple[str, bool]]:
    """A chat in the tokenizer's template, parted where the assistant begins and ends to speak.

    A turn that the template writes otherwise once the chat goes on (some drop the thoughts of earlier turns) is not
    scored, since the model would never write it so.
    """

    def render(count: int, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    done = 0
    try:
        whole = render(len(messages), False)
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number == 0:
                continue
            before, after = render(number, True), render(number + 1, False)
            if whole.startswith(after) and after.startswith(before):
                yield whole[done : len(before)], False
                yield whole[len(before) : len(after)], True
                done = len(after)
    except jinja2.TemplateError as error:
        raise InputError(f"{where}: the tokenizer's chat template refuses it: {error}") from error
    if not done:
        raise InputError(
            f"{where}: no turn of the assistant follows a prompt in the tokenizer's chat template; "
            "set data.template=alpaca, or give other records"
        )
    yield whole[done:], False


def _tokenize(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """An example's tokens, and which are scored.

    The text is tokenized as one. A response begins where its tokens leave those of the text before it alone, which are
    what a model that is to answer would be given.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    texts = [text for text, _ in example.pieces]
    ids = encode("".join(texts))
    scored: list[bool] = []
    for number, (_, counts) in enumerate(example.pieces, 1):
        until = encode("".join(texts[:number])) if number < len(texts) else ids
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(until, ids, strict=False))
        scored += [counts] * (sum(1 for _ in alike) - len(scored))
    return ids, scored


def pack_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    bos: Bos,
    source: str,
    max_tokens: int | None = None,
) -> Windows:
    """Tokenize examples, one after another, and cut the whole into windows of `length`.

    EOS ends each response and is scored, and BOS is as in `make_windows`; but neither is added to a chat, whose
    template has its own.

    Raises:
        InputError: if there is no window with a scored token.
    """
    ids: list[int] = []
    scored: list[bool] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for number, example in enumerate(examples):
        if max_tokens is not None and len(ids) >= max_tokens:
            break
        marked = bos == "document" or (bos == "once" and number == 0)
        if marked and not example.ended and tokenizer.bos_token_id is not None:
            ids.append(tokenizer.bos_token_id)
            scored.append(False)
        tokens, counts = _tokenize(example, tokenizer)
        tail = [] if example.ended else end
        ids += tokens + tail
        scored += counts + [True] * len(tail)
    count = len(ids) // length
    ids_NT = torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)
    scored_NT = torch.tensor(scored[: count * length], dtype=torch.bool).view(count, length)
    useful_N = scored_NT[:, 1:].any(1)
    if not useful_N.any():
        raise InputError(
            f"{source}: {len(ids)} tokens hold no window of {length} with a response in it; give more "
            "instructions or a shorter window"
        )
    return Windows(ids_NT[useful_N], source, bos, scored_NT[useful_N])
