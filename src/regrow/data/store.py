"""Tokens of texts that have been tokenized before, in files that are mapped into memory.

They lie in the folder that the environment variable REGROW_CACHE names (empty: nothing is kept), by default in
`regrow/tokens` beside the hub's cache. A file is named by what its tokens were made of: the text, the tokenizer and its
version, and how BOS is set. Those used least lately go when all are more than `LIMIT` bytes.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

VARIABLE = "REGROW_CACHE"
LIMIT = 4 * 2**30
SUFFIX, PARTIAL = ".int64", ".partial"
DAY = 24 * 60 * 60
"""Seconds; nothing is written for longer."""

Ids = NDArray[np.int64]


def home() -> Path | None:
    """Where tokens are kept, if they are."""
    given = os.environ.get(VARIABLE)
    if given is None:
        return Path(constants.HF_HOME) / "regrow" / "tokens"
    return Path(given) if given else None


def name_of(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, how: object) -> str | None:
    """The name of a text's tokens; None if none are kept, or the tokenizer cannot be told by what it is made of.

    Args:
        how: whatever else they depend on.
    """
    if home() is None or not tokenizer.is_fast:
        return None
    digest = hashlib.sha256(f"{version('tokenizers')} {how} {tokenizer.split_special_tokens}".encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode(errors="surrogatepass"))
    for document in documents:
        text = document.encode(errors="surrogatepass")
        digest.update(len(text).to_bytes(8))
        digest.update(text)
    return digest.hexdigest()


def keep(name: str | None, make: Callable[[], Iterator[Ids]]) -> Tensor:
    """A row of tokens: from the file of that name if it is there, else made, and kept if there is a place for it."""
    folder = home()
    if folder is None or name is None:
        return _in_memory(make)
    file = folder / (name + SUFFIX)
    try:
        if not file.is_file():
            _write(file, make())
            _make_room(folder, file)
        os.utime(file)
    except OSError:  # no right to write there, no room
        if not file.is_file():
            return _in_memory(make)
    count = file.stat().st_size // 8
    # A private map: what is not looked at is not read, and what somebody wrote into it would not reach the file.
    return torch.from_file(str(file), shared=False, size=count, dtype=torch.int64) if count else torch.zeros(0).long()


def _in_memory(make: Callable[[], Iterator[Ids]]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *make()]))


def _write(file: Path, tokens: Iterable[Ids]) -> None:
    """Piece by piece, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=PARTIAL)
    try:
        with open(handle, "wb") as out:
            for ids in tokens:
                out.write(ids.tobytes())
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _make_room(folder: Path, newest: Path) -> None:
    for file in folder.glob(f".*{PARTIAL}"):  # of processes that were killed
        if file.stat().st_mtime < time.time() - DAY:
            file.unlink(missing_ok=True)
    files = sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
    excess = sum(file.stat().st_size for file in files) - LIMIT
    for file in files:
        if excess <= 0:
            return
        if file != newest:
            excess -= file.stat().st_size
            with contextlib.suppress(OSError):  # mapped by somebody, on a system that minds
                file.unlink()
