"""Which window of a corpus comes at which position: stateless, in O(1) memory, for every layout and run length alike."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 8
"""Feistel rounds. Four make a strong pseudo-random permutation (Luby and Rackoff 1988); small domains deserve more."""


def permute(index: np.ndarray, *, size: int, key: str) -> np.ndarray:
    """A keyed pseudo-random bijection of range(size), applied elementwise.

    A balanced Feistel network over the next power of four, walked until it lands inside (Black and Rogaway 2002): less
    than four walks on average.

    Args:
        index: int64 [N], each in [0, size).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.frombuffer(_digest(key), dtype="<u8")
    result = _feistel(index.astype(np.uint64), half, mask, keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half, mask, keys)
    return result.astype(np.int64)


def draw(size: int, *, key: str) -> int:
    """A pseudo-random number in range(size), determined by `key`."""
    return int.from_bytes(_digest(key), "little") % size


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()


def _feistel(value: np.ndarray, half: np.uint64, mask: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << half) | right


def mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): uint64 [N] -> uint64 [N], each bit depending on all bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class ShuffledWindows:
    """Training order of one corpus: epoch after epoch, each with other cuts and another order, without end.

    An epoch cuts the corpus into windows of seq_len + 1 tokens, each starting seq_len after the other, from an offset
    drawn in [0, seq_len): so neighbours overlap by the one token that is the label of one and the input of the other, and
    what stands together in a window changes from epoch to epoch. The number of windows is the same for every offset, at
    the price of leaving out fewer than 2 seq_len tokens at the ends.
    """

    num_tokens: int
    seq_len: int
    key: str
    random_offset: bool = True
    """False: the offset is 0 in every epoch."""

    @property
    def per_epoch(self) -> int:
        """Windows in one epoch."""
        return max(1, self.num_tokens // self.seq_len - 1)

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """First token of the windows at these positions: int64 [N] -> int64 [N]."""
        starts = np.empty_like(positions)
        epochs, indices = np.divmod(positions, self.per_epoch)
        offsets = min(self.seq_len, self.num_tokens - self.per_epoch * self.seq_len) if self.random_offset else 1
        for epoch in np.unique(epochs):
            key = f"{self.key}/{epoch}"
            chosen = epochs == epoch
            window = permute(indices[chosen], size=self.per_epoch, key=f"order/{key}")
            starts[chosen] = draw(offsets, key=f"offset/{key}") + window * self.seq_len
        return starts


@dataclass(frozen=True, kw_only=True)
class OrderedWindows:
    """Validation order of one corpus: once from the beginning to the end, fewer than seq_len tokens left over."""

    num_tokens: int
    seq_len: int

    @property
    def per_epoch(self) -> int:
        """Windows in all."""
        return (self.num_tokens - 1) // self.seq_len

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """First token of the windows at these positions: int64 [N] -> int64 [N]."""
        return positions * self.seq_len


@dataclass(frozen=True)
class Skip:
    """Positions without the given [start, end) ranges, counted anew from 0."""

    ranges: Sequence[Sequence[int]]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The positions that remain at these places: int64 [N] -> int64 [N]."""
        begins, skipped, total, last = [], [0], 0, 0
        for start, end in sorted(map(tuple, self.ranges)):
            start = max(start, last)  # ranges may overlap
            if end > start:
                begins.append(start - total)
                total += end - start
                skipped.append(total)
                last = end
        return positions + np.array(skipped)[np.searchsorted(begins, positions, side="right")]
