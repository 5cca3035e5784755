"""A running hash of what training really consumed, the same for every layout."""

import hashlib
import struct
from collections.abc import Iterable

import numpy as np

from steerscale.data.order import mix

MODULUS = 2**61
"""Divides 2^64: ranks may add their parts in int64, overflow and all, and take the sum modulo this."""


class ConsumedHash:
    """The sum modulo 2^61 of an 8-byte digest of each sample. Addition commutes, so neither order nor split matters.

    It tells runs apart that ought to agree; it is no defence against someone who wants a collision.
    """

    def __init__(self, value: int = 0) -> None:
        """Begin with `value`: on resume one rank goes on from the checkpoint's total, the others from 0."""
        self.value = value % MODULUS

    def add(self, positions: np.ndarray, corpora: np.ndarray, starts: np.ndarray) -> None:
        """Add samples: their global positions, datasets and first tokens, each int64 [N]."""
        for sample in zip(positions.tolist(), corpora.tolist(), starts.tolist()):
            digest = hashlib.blake2b(struct.pack("<3q", *sample), digest_size=8).digest()
            self.value = (self.value + int.from_bytes(digest, "little")) % MODULUS

    def add_ids(self, ids: np.ndarray) -> None:
        """Add samples known by one number each, int64 [N]: activation vectors, too many for a digest of bytes each."""
        digests = mix(mix(ids.astype(np.uint64)) + np.uint64(1))
        self.value = (self.value + int(digests.sum(dtype=np.uint64))) % MODULUS

    @staticmethod
    def total(parts: Iterable[int]) -> int:
        """The hash over all ranks, from the ranks' values or from their int64 sum as the only element."""
        return sum(parts) % MODULUS
