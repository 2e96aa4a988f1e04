"""A fast tokenizer as llama.cpp's: sentencepiece-like (LLaMA, Mistral) or byte-level BPE (GPT-2, Llama 3, Qwen).

llama.cpp knows no merges in the first kind: it joins the neighbours whose union scores highest. The rank of the first
merge that makes a token, negated, orders the unions as the merges do. The second kind it splits into words by a rule
known to it by name, so the tokenizer's own rule must be one of those.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from regrow.checkpoint.load import load_tokenizer
from regrow.errors import InputError
from regrow.formats.source import Checkpoint

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {None: "gpt-2", LLAMA3: "llama-bpe", LLAMA3.replace("{1,3}", ""): "qwen2"}
"""How byte-level tokenizers split text into words (None: as GPT-2) -> llama.cpp's name for it."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NEVER_MERGED = -1e9


def add_vocabulary(writer: gguf.GGUFWriter, source: Checkpoint) -> None:
    """Tokens, scores or merges, special tokens and chat template.

    Raises:
        InputError: if llama.cpp has no tokenizer that works alike.
    """
    tokenizer = load_tokenizer(str(source.folder))
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unknown("no fast one")
    # As transformers runs it: some classes (Qwen2's) put a splitter of their own in the place of the file's.
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        add_sentencepiece(writer, described, source.config.vocab_size)
    elif model["type"] == "BPE" and described["pre_tokenizer"]:
        add_byte_level(writer, described, source.config.vocab_size)
    else:
        raise _unknown(f"a {model['type']} model without bytes")
    _add_special(writer, source, tokenizer)


def add_sentencepiece(writer: gguf.GGUFWriter, described: Mapping[str, Any], rows: int) -> None:
    """Tokens with scores, from a BPE with byte fallback."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(described["model"]["merges"]):
        scores.setdefault("".join(_pair(merge)), -float(rank))
    tokens, types = token_list(described, rows)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([scores.get(token, NEVER_MERGED) for token in tokens])
    writer.add_token_types(types)
    writer.add_add_space_prefix(_adds_space(described))


def add_byte_level(writer: gguf.GGUFWriter, described: Mapping[str, Any], rows: int) -> None:
    """Tokens, merges and the name of the splitter, from a byte-level BPE.

    Raises:
        InputError: if the splitter is none that llama.cpp has under a name known here.
    """
    tokens, types = token_list(described, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter(described))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(_pair(merge)) for merge in described["model"]["merges"]])


def splitter(described: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text.

    Raises:
        InputError: if there is none.
    """
    steps = described["pre_tokenizer"].get("pretokenizers", [described["pre_tokenizer"]])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return SPLITTERS[None]
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and not steps[1]["add_prefix_space"]:
        name = SPLITTERS.get(steps[0]["pattern"].get("Regex"))
        # llama.cpp takes whole words of the vocabulary before it merges where it splits as Llama 3, and only there.
        if name is not None and bool(described["model"].get("ignore_merges")) == (name == "llama-bpe"):
            return name
    raise _unknown("a pre-tokenizer " + " + ".join(kinds))


def token_list(described: Mapping[str, Any], rows: int) -> tuple[list[str], list[gguf.TokenType]]:
    """The tokens' texts and types, by id, one for each row of the embedding."""
    names = {number: token for token, number in described["model"]["vocab"].items()}
    added = {token["id"]: token for token in described["added_tokens"]}
    names |= {number: token["content"] for number, token in added.items()}
    unknown = described["model"].get("unk_token")
    types = []
    for number in range(rows):
        if number not in names:
            types.append(gguf.TokenType.UNUSED)
        elif names[number] == unknown:
            types.append(gguf.TokenType.UNKNOWN)
        elif number in added:
            types.append(gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.BYTE if BYTE.fullmatch(names[number]) else gguf.TokenType.NORMAL)
    return [names.get(number, f"[PAD{number}]") for number in range(rows)], types


def _adds_space(described: Mapping[str, Any]) -> bool:
    """Whether text begins with a space that is not there: a normalizer's or the pre-tokenizer's doing."""
    normalizer = described["normalizer"] or {}
    steps: Sequence[Mapping[str, Any]] = normalizer.get("normalizers", [normalizer])
    before = described["pre_tokenizer"] or {}
    return any(step.get("type") == "Prepend" for step in steps) or before.get("prepend_scheme") in ("always", "first")


def _add_special(writer: gguf.GGUFWriter, source: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """Special tokens and whether they are added, as the tokenizer does with a text; the chat template."""
    logging.getLogger("gguf").setLevel(logging.ERROR)
    special = gguf.SpecialVocab(source.folder, n_vocab=source.config.vocab_size)
    ids = tokenizer("a")["input_ids"]
    special.add_special_token |= {
        "bos": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }
    special.add_to_gguf(writer, quiet=True)


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    """The two sides of a merge; older tokenizer files have them in one string."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _unknown(what: str) -> InputError:
    return InputError(f"the tokenizer ({what}) is none that can be written for llama.cpp here; give --converter")
