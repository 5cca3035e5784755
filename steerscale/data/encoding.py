"""Blocks of text -> tokens sorted into splits, in one process or many, with the same result."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
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

AHEAD = 3
"""Blocks a helping process has in hand or waiting, so that it never waits for the reader."""
MOST_PENDING = 16
"""Blocks in memory for each process, when those after a very slow one are done before it."""


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
    """Encode blocks in as many processes, this one included, and yield them in order.

    Raises DataError from the blocks' reader or parser, or if a worker process dies.
    """
    encoder, helpers = Encoder(encoding), workers - 1
    with _helpers(encoding, helpers) as pool:
        pending: deque[Future[EncodedBlock]] = deque()
        for block in blocks:
            if pool is not None and sum(not future.done() for future in pending) < AHEAD * helpers:
                pending.append(_submit(pool, block))
            else:
                # All helpers are busy for a while; so this process, which would only wait for them, does one itself.
                pending.append(_encode_here(encoder, block))
            while pending and (pending[0].done() or len(pending) > MOST_PENDING * workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextlib.contextmanager
def _helpers(encoding: Encoding, number: int) -> Iterator[ProcessPoolExecutor | None]:
    if number == 0:
        yield None
        return
    # spawn: a fork could copy locks that threads of the caller hold.
    context = multiprocessing.get_context("spawn")
    with _interrupts_deferred():  # halfway through, its semaphores would be nobody's to remove
        pool = ProcessPoolExecutor(number, context, initializer=_start_worker, initargs=(encoding,))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, perhaps for lack of memory: try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_here(encoder: Encoder, block: Block) -> Future[EncodedBlock]:
    future: Future[EncodedBlock] = Future()
    try:
        future.set_result(encoder(block))
    except DataError as error:
        # Raised in its turn, so that of several errors the first is reported, whoever met it first.
        future.set_exception(error)
    return future


def _submit(pool: ProcessPoolExecutor, block: Block) -> Future[EncodedBlock]:
    with _interrupts_deferred():  # submitting may start a process
        return pool.submit(_work, block)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; processes started in it never see one.

    A terminal sends it to the whole process group. Helpers inherit the blocked signal, so that this process alone decides
    what happens. Blocking does not protect this process itself, because any other thread may take the signal and Python
    then raises KeyboardInterrupt here: hence the handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held_back = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: held_back.append(arguments))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if held_back:
            signal.raise_signal(signal.SIGINT)


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
