"""Batches from several sources of text, each sequence from a source drawn by chance."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from regrow.data.tokens import Batch, Windows, window_order

SEED_STEP = 7919
"""Between the seeds of two sources' orders, so that none walks its windows as another does."""


@dataclass
class SamplerState:
    """Where a sampler stands: with the same windows and seed, another goes on from here."""

    weights: list[float]
    """Probability of each source; may be changed between batches."""
    taken: list[int]
    """Windows drawn from each source."""
    batches: int = 0


class Sampler:
    """Batches without end. Each sequence is the next window of source i with probability q_i.

    A source's windows come in one permutation after the other, as in `batches`, which a sampler with a single source
    repeats exactly. Which sources batch n draws from depends on the seed, n and the weights alone.
    """

    def __init__(self, windows: Windows, sources: Sequence[range], size: int, seed: int, state: SamplerState) -> None:
        """Draw from windows of which each source has a range.

        Args:
            size: sequences in a batch.
            state: where to begin; kept up to date, not copied.
        """
        self.windows = windows
        self.sources = tuple(sources)
        self.size = size
        self.seed = seed
        self.go_on(state)

    def go_on(self, state: SamplerState) -> None:
        """Stand where `state` says; it is kept up to date from here on, not copied."""
        self.state = state
        self._orders = [
            itertools.islice(window_order(len(source), self.seed + SEED_STEP * number), taken, None)
            for number, (source, taken) in enumerate(zip(self.sources, state.taken, strict=True))
        ]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.windows.batch(torch.tensor(self.draw()))

    def draw(self) -> list[int]:
        """Numbers of the next batch's windows, which count as drawn."""
        chance = random.Random(f"{self.seed} {self.state.batches}")
        drawn = chance.choices(range(len(self.sources)), self.state.weights, k=self.size)
        numbers = [self.sources[source][next(self._orders[source])] for source in drawn]
        for source in drawn:
            self.state.taken[source] += 1
        self.state.batches += 1
        return numbers
