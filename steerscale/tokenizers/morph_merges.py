"""Learning the merges of a byte-pair encoding from counted words and their morpheme boundaries.

The score of a pair of tokens is the number of its occurrences in the text, each times 1, or times 1 - bias where a morpheme
boundary lies between the two. The pair with the highest score is merged, again and again, ties going to the smaller (left id,
right id). At bias 0 that is byte-pair encoding (Sennrich et al. 2016) as `tokenizers` trains it; at bias 1 nothing is merged
across a boundary in training (MorphBPE, arXiv 2502.00894).
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from steerscale import native
from steerscale.tokenizers.morph_merges_python import SCORE_ONE, PythonTrainer


class Learned(NamedTuple):
    """Merges, and what they make of the words they were learned from."""

    merges: np.ndarray
    """int32 [M, 3]: left id, right id, id of the result. Now and then two merges have the same result."""
    starts: np.ndarray
    """bool, a value for each byte of the words in a row: whether a token begins there."""


def learn_merges(
    words: Sequence[bytes],
    borders: Sequence[Sequence[int]],
    counts: Sequence[int],
    *,
    tokens: Sequence[bytes],
    byte_ids: Sequence[int],
    vocab_size: int,
    bias: float,
    compiled: bool = True,
) -> Learned:
    """Merges until there are `vocab_size` tokens, or fewer where nothing is left to merge.

    Args:
        words: different words; no merge goes beyond one.
        borders: of each word, byte offsets in (0, length) where a morpheme ends and the next begins.
        counts: how often each word occurs.
        tokens: the vocabulary to begin with, ids 0, 1, ...
        byte_ids: the ids of the 256 bytes in it.
        bias: 0 to 1, see the module; counted in steps of 2^-20, and anything below 1 as less than 1.
        compiled: use the C++ trainer where there is a compiler; False: Python, with the same result, some 20 times slower.
    """
    keep = round((1 - bias) * SCORE_ONE)
    if bias < 1:
        keep = max(keep, 1)
    library = native.bpe_library() if compiled else None
    if library is None:
        trainer = PythonTrainer(words, borders, counts, tokens=tokens, byte_ids=byte_ids, keep=keep)
        trainer.run(vocab_size)
        merges = np.array(trainer.merges, np.int32).reshape(-1, 3)
        return Learned(merges, np.fromiter(trainer.starts(), bool))
    return _learn_compiled(library, words, borders, counts, tokens, byte_ids, vocab_size, keep)


def _learn_compiled(
    library: ctypes.CDLL,
    words: Sequence[bytes],
    borders: Sequence[Sequence[int]],
    counts: Sequence[int],
    tokens: Sequence[bytes],
    byte_ids: Sequence[int],
    vocab_size: int,
    keep: int,
) -> Learned:
    text = np.frombuffer(b"".join(words), np.uint8)
    ends = np.cumsum([len(word) for word in words], dtype=np.int64)
    flags = np.zeros(len(text), np.uint8)
    offset = 0
    for word, inside in zip(words, borders):
        for at in inside:
            flags[offset + at] = 1
        offset += len(word)
    token_text = np.frombuffer(b"".join(tokens), np.uint8)
    token_ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    weights, ids = np.array(counts, np.int64), np.array(byte_ids, np.int32)
    trainer = library.bpe_train(
        *(array.ctypes.data for array in (text, flags, ends, weights)),
        len(words),
        *(array.ctypes.data for array in (token_text, token_ends)),
        len(tokens),
        ids.ctypes.data,
        vocab_size,
        keep,
    )
    if not trainer:
        raise MemoryError(f"not enough memory to learn merges from {len(words):,} different words")
    try:
        merges = np.empty((library.bpe_num_merges(trainer), 3), np.int32)
        starts = np.empty(len(text), bool)
        library.bpe_result(trainer, merges.ctypes.data, starts.ctypes.data)
    finally:
        library.bpe_free(trainer)
    return Learned(merges, starts)
