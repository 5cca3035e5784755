"""Blocks of text -> tokens sorted into splits, in one process or many, with the same result."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from steerscale.data.blocks import Block, Reading, parse
from steerscale.data.indexed import token_dtype
from steerscale.data.order import draw, mix
from steerscale.errors import DataError
from steerscale.tokenizers.registry import load_tokenizer

AHEAD = 4
"""Blocks a worker has in hand or waiting, so that it never waits for the reader."""


class EncodedSplit(NamedTuple):
    """The documents of one block that belong to one split."""

    tokens: bytes
    """Ids end to end, eos after each document, in the dataset's dtype."""
    lengths: np.ndarray
    """Tokens of each document, int32 [documents]."""
    text_bytes: int
    """UTF-8 bytes of the texts."""


class EncodedBlock(NamedTuple):
    """One block, tokenized."""

    source: int
    """Number of the source."""
    stored_bytes: int
    """Of the source, read so far."""
    splits: dict[str, EncodedSplit]
    """By name, every split of the dataset."""


def assign_splits(records: np.ndarray, *, source: int, seed: int, shares: np.ndarray) -> np.ndarray:
    """Number of the split of each document, by a hash of its place: int64 [N] -> int64 [N].

    Args:
        records: record numbers within the source.
        shares: of the documents, by split, float64 [splits], summing to 1.
    """
    key = np.uint64(draw(2**64, key=f"split/{seed}/{source}"))
    uniform = (mix(mix(records.astype(np.uint64)) ^ key) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(np.cumsum(shares)[:-1], uniform, side="right")


@dataclass(frozen=True)
class Encoding:
    """All a worker needs to know; small, because it is sent to every one."""

    tokenizer: Path
    """Tokenizer directory."""
    reading: Reading
    fractions: dict[str, float]
    """Share of the documents by split, without those of share 0."""
    seed: int


class Encoder:
    """Encodes block after block."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._tokenizer = load_tokenizer(encoding.tokenizer)
        self._dtype = token_dtype(self._tokenizer.vocab_size)
        self._shares = np.array(list(encoding.fractions.values()))

    def __call__(self, block: Block) -> EncodedBlock:
        """Parse, tokenize and split one block. Raises DataError as `parse` does."""
        records, texts = parse(block, self._encoding.reading)
        documents = self._tokenizer.encode_documents(texts)
        assigned = assign_splits(
            np.array(records, dtype=np.int64), source=block.source, seed=self._encoding.seed, shares=self._shares
        )
        splits = {}
        for number, name in enumerate(self._encoding.fractions):
            mine = np.flatnonzero(assigned == number).tolist()
            tokens = [np.empty(0, np.int32), *(documents[index] for index in mine)]
            splits[name] = EncodedSplit(
                tokens=np.concatenate(tokens, dtype=self._dtype, casting="unsafe").tobytes(),
                lengths=np.fromiter((len(documents[index]) for index in mine), dtype=np.int32, count=len(mine)),
                text_bytes=len("".join([texts[index] for index in mine]).encode()),
            )
        return EncodedBlock(block.source, block.stored_bytes, splits)


def encode_blocks(blocks: Iterable[Block], encoding: Encoding, *, workers: int) -> Generator[EncodedBlock]:
    """Encode blocks in as many processes (1: in this one), in order.

    Raises DataError from the blocks' reader or parser, or if a worker process dies.
    """
    if workers == 1:
        yield from map(Encoder(encoding), blocks)
        return
    # spawn: a fork could copy locks that threads of the caller hold.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(encoding,)
    )
    try:
        blocks = iter(blocks)
        pending = deque(_submit(pool, block) for block in itertools.islice(blocks, AHEAD * workers))
        while pending:
            encoded = pending.popleft().result()
            pending.extend(_submit(pool, block) for block in itertools.islice(blocks, 1))
            yield encoded
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, perhaps for lack of memory: try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, block: Block) -> Future[EncodedBlock]:
    # Submitting may start a worker, which inherits the mask: Ctrl-C, which a terminal sends to the whole process group,
    # then reaches this process alone, and it decides what happens.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_work, block)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_encoder: Encoder | None = None
"""Of a worker process: an executor has no other place for what its tasks share."""


def _start_worker(encoding: Encoding) -> None:
    global _encoder
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # The Rust tokenizers would start a thread for each core in each worker.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(encoding)


def _exit_with_parent() -> None:
    # An executor's worker waits for ever on a queue whose other end it holds open itself.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(block: Block) -> EncodedBlock:
    assert _encoder is not None
    return _encoder(block)
