"""In which order the tokens of a sample stream are consumed: arithmetic on positions and token ids, no model.

Sequence i of the sample stream belongs to lane i mod L. A lane goes through its sequences in blocks of K; of a block, the
kept tokens are consumed in the order of a keyed permutation, all of them before the next block. L lanes at a time give the
same number of vectors to every batch, so what a batch holds depends on (seed, L, K, position) alone, not on who computes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from steerscale.activations.config import StreamConfig
from steerscale.data.dataset import SampleStream
from steerscale.data.order import permute
from steerscale.errors import ConfigError

GIB = 2**30
HALVES = 2
"""Of the buffer: the block that is consumed, and the next."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """K sequences of one lane, and the order in which their kept tokens are consumed."""

    lane: int
    index: int
    """Number of the block in its lane."""
    tokens_KS: np.ndarray
    """Int64."""
    first_ids_K: np.ndarray
    """Id of each sequence's first token, int64; ids count on along the sequence."""
    kept: np.ndarray
    """Places of the kept tokens in the flattened block, rising: int64 [n]."""
    order: np.ndarray
    """Order of consumption: indices into `kept`, int64 [n]."""

    def __len__(self) -> int:
        return len(self.kept)

    @cached_property
    def ends_K(self) -> np.ndarray:
        """Kept tokens up to the end of each sequence: int64."""
        rows, length = self.tokens_KS.shape
        return np.searchsorted(self.kept, np.arange(1, rows + 1) * length)

    def ids(self, begin: int, end: int) -> np.ndarray:
        """Ids of what is consumed from place `begin` to `end`: int64, sequence * seq_len + position."""
        row, position = np.divmod(self.kept[self.order[begin:end]], self.tokens_KS.shape[1])
        return self.first_ids_K[row] + position

    def rows(self, begin: int, end: int) -> tuple[np.ndarray, int]:
        """Of the sequences `begin` to `end`: the kept places, counted from their first token, and how many come before."""
        before = int(self.ends_K[begin - 1]) if begin else 0
        return self.kept[before : self.ends_K[end - 1]] - begin * self.tokens_KS.shape[1], before


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a stream, block by block."""

    dataset: SampleStream
    """Endless."""
    lanes: int
    block_sequences: int
    """Sequences in a block, K."""
    seed: int
    special_ids: tuple[int, ...] = ()
    """Token ids to leave out."""
    drop_first: int = 0
    """First positions of each sequence to leave out."""

    def block(self, lane: int, index: int) -> Block:
        """Block `index` of `lane`, read from the dataset."""
        places = index * self.block_sequences + np.arange(self.block_sequences)
        sequences = lane + self.lanes * places
        tokens_KS = np.ascontiguousarray(self.dataset.read(*self.dataset.locate(sequences))[:, :-1])
        kept = np.flatnonzero(keeps(tokens_KS, special_ids=self.special_ids, drop_first=self.drop_first))
        key = f"activations/{self.seed}/{lane}/{index}"
        order = permute(np.arange(len(kept)), size=len(kept), key=key) if len(kept) else kept
        return Block(
            lane=lane,
            index=index,
            tokens_KS=tokens_KS,
            first_ids_K=sequences * self.dataset.seq_len,
            kept=kept,
            order=order,
        )


def keeps(tokens_BS: np.ndarray, *, special_ids: Iterable[int], drop_first: int) -> np.ndarray:
    """bool [B, S]: which tokens of these sequences are not left out."""
    keep_BS = np.ones(tokens_BS.shape, dtype=bool)
    for token in special_ids:
        keep_BS &= tokens_BS != token
    keep_BS[:, :drop_first] = False
    return keep_BS


def block_sequences(config: StreamConfig, *, seq_len: int, bytes_per_vector: int) -> int:
    """Sequences in a block, K: as many as fit into half of the buffer, of which each lane has its share; at least one.

    Args:
        bytes_per_vector: of all hooks together.
    Raises:
        ConfigError: not a single one fits, or nothing of a sequence is kept.
    """
    kept = seq_len - config.drop_first
    if kept < 1:
        raise ConfigError(f"stream.drop_first={config.drop_first} leaves nothing of sequences of {seq_len} tokens")
    vectors = HALVES * config.lanes * kept
    per_sequence = vectors * bytes_per_vector
    sequences = int(config.buffer_gib * GIB // per_sequence)
    if sequences < 1:
        raise ConfigError(
            f"stream.buffer_gib={config.buffer_gib} holds less than a sequence for each of stream.lanes={config.lanes}: it "
            f"must be at least {per_sequence / GIB:.4g}; or take fewer lanes"
        )
    return min(sequences, max(config.buffer_vectors // vectors, 1))
