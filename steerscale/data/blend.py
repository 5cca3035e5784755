"""Several corpora in one order: global position -> (corpus, position within the corpus), stateless and in O(1)."""

from collections.abc import Sequence

import numpy as np

PATTERN = 4096
"""Length of the repeating pattern: weights are met to 1/4096 over the long run."""


class Blend:
    """A pattern of PATTERN corpus numbers, repeated for ever.

    Counts follow the weights by largest remainder. The j-th of a corpus' n places stands at (j + 1/2) / n of the pattern,
    so that every prefix is close to the weights, not only the whole.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights`: positive, any sum, each at least 1/PATTERN of the sum."""
        ideal = np.asarray(weights, dtype=np.float64) / sum(weights) * PATTERN
        self.counts = np.floor(ideal).astype(np.int64)
        # Stable, so that equal remainders go to the corpus named first.
        neediest = np.argsort(self.counts - ideal, kind="stable")
        self.counts[neediest[: PATTERN - self.counts.sum()]] += 1
        corpus = np.repeat(np.arange(len(self.counts)), self.counts)
        rank = np.concatenate([np.arange(count) for count in self.counts])
        places = np.argsort((rank + 0.5) / self.counts[corpus], kind="stable")
        self._corpus, self._rank = corpus[places], rank[places]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus number and position within that corpus: int64 [N] -> (int64 [N], int64 [N])."""
        block, place = np.divmod(positions, PATTERN)
        corpus = self._corpus[place]
        return corpus, block * self.counts[corpus] + self._rank[place]


class Concatenation:
    """One corpus after the other, once, for validation."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes`: samples of each corpus."""
        self._ends = np.cumsum(sizes)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus number and position within that corpus: int64 [N] -> (int64 [N], int64 [N])."""
        corpus = np.searchsorted(self._ends, positions, side="right")
        return corpus, positions - np.concatenate([[0], self._ends])[corpus]
