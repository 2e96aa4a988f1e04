"""How much of the text that a model is measured on it has been trained or calibrated on."""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from regrow.data.tokens import Windows

NGRAM = 13
"""Tokens; the length that GPT-3's authors took (arXiv 2005.14165, appendix C)."""


@dataclass(frozen=True)
class Overlap:
    """What a text shares with another, in runs of `ngram` tokens."""

    ngram: int
    share: float
    """Of the evaluated text's n-grams, those that the training text has too."""
    windows: int
    """Windows of the evaluated text that have at least one."""


def overlap(train: Windows, test: Windows, ngram: int = NGRAM) -> Overlap:
    """The n-grams of `test` that occur in `train`, both within windows.

    Compared by 64-bit hashes, so that by chance one in some 10^19 / (number of training n-grams) is taken for another.

    Args:
        ngram: shortened to the shorter window.
    """
    ngram = min(ngram, train.length, test.length)
    known = np.unique(_hashes(train, ngram))
    shared_NG = np.isin(_hashes(test, ngram), known)
    return Overlap(ngram, float(shared_NG.mean()), int(shared_NG.any(1).sum()))


def _hashes(windows: Windows, ngram: int) -> NDArray[np.uint64]:
    """A random linear form of every n-gram, modulo 2^64: `[windows, n-grams in a window]`."""
    factors = np.random.default_rng(0).integers(1, 2**64, ngram, dtype=np.uint64) | np.uint64(1)
    ids_NT = windows.ids_NT.numpy().astype(np.uint64) + np.uint64(1)
    found: NDArray[np.uint64] = np.matmul(sliding_window_view(ids_NT, ngram, axis=1), factors)
    return found
