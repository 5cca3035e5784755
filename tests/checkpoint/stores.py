"""Checkpoints of a few made-up tensors on the pool's ranks. Every function is called by all ranks together."""

import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from steerscale.checkpoint import store as store_module
from steerscale.checkpoint.config import CheckpointConfig
from steerscale.checkpoint.fragments import Fragment, FragmentReader
from steerscale.checkpoint.store import CheckpointStore
from steerscale.errors import CheckpointError

ELEMENTS = 1000
"""On each rank."""


def tensor_at(step: int, rank: int, elements: int = ELEMENTS) -> torch.Tensor:
    """What `rank` holds at `step`."""
    return torch.randn(elements, generator=torch.Generator().manual_seed(1000 * step + rank))


def fragments_of(data: torch.Tensor) -> list[Fragment]:
    """This rank's row of the only parameter."""
    size, rank = dist.get_world_size(), dist.get_rank()
    shape, offset = (1, data.numel()), (rank, 0)
    whole_shape = (size, data.numel())
    return [Fragment(kind="weight", name="w", whole_shape=whole_shape, offset=offset, shape=shape, start=0, data=data)]


@contextmanager
def log_of() -> Iterator[Callable[[], str]]:
    """What is logged in this context."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("steerscale")
    logger.addHandler(handler)
    try:
        yield stream.getvalue
    finally:
        logger.removeHandler(handler)


def save(
    directory: Path, steps: Sequence[int], settings: dict[str, Any], elements: int = ELEMENTS
) -> tuple[list[bool], str]:
    """Checkpoints of `steps`; (whether each was written, the log)."""
    with log_of() as log:
        store = CheckpointStore(directory, CheckpointConfig(**settings))
        written = []
        for step in steps:
            data = tensor_at(step, dist.get_rank(), elements)
            written.append(store.save(step, lambda data=data: fragments_of(data), {"step": step}) and store.wait())
        return written, log()


def latest(directory: Path, settings: dict[str, Any]) -> tuple[str | None, str]:
    """(name of the checkpoint that would be used, or the error's text; the log)."""
    with log_of() as log:
        store = CheckpointStore(directory, CheckpointConfig(**settings))
        try:
            found = store.latest()
        except CheckpointError as error:
            return f"error: {error}", log()
        return found.name if found else None, log()


def resume_and_save(directory: Path, step: int, settings: dict[str, Any]) -> None:
    """Look for a checkpoint as a resumed run does, and write the next one."""
    store = CheckpointStore(directory, CheckpointConfig(**settings))
    store.latest()
    assert store.save(step, lambda: fragments_of(tensor_at(step, dist.get_rank())), {})


def save_with_broken_rank(directory: Path, broken: int, asynchronous: bool) -> tuple[bool, bool, str]:
    """One rank fails to put its state together, then, for the next step, to write it."""

    def fragments() -> list[Fragment]:
        if dist.get_rank() == broken:
            raise MemoryError("no room for a copy")
        return fragments_of(tensor_at(1, dist.get_rank()))

    def write(*args: Any) -> dict[str, Any]:
        if dist.get_rank() == broken:
            raise OSError(5, "Input/output error")
        return write_rank(*args)

    write_rank = store_module._write_rank
    with log_of() as log:
        store = CheckpointStore(directory, CheckpointConfig(asynchronous=asynchronous))
        first = store.save(1, fragments, {})
        with mock.patch.object(store_module, "_write_rank", write):
            second = store.save(2, lambda: fragments_of(tensor_at(2, dist.get_rank())), {}) and store.wait()
        return first, second, log()


def save_while_training(directory: Path) -> list[Any]:
    """An asynchronous checkpoint whose writing is held up while the state it was taken from changes."""
    data = tensor_at(1, dist.get_rank())
    before = data.clone()
    hold = store_module.threading.Event()

    def write(*args: Any) -> dict[str, Any]:
        hold.wait(30)
        return write_rank(*args)

    write_rank = store_module._write_rank
    store = CheckpointStore(directory, CheckpointConfig(asynchronous=True))
    with mock.patch.object(store_module, "_write_rank", write):
        assert store.save(1, lambda: fragments_of(data), {})
        data.add_(1.0)
        store.poll()
        seen = [sorted(path.name for path in directory.iterdir()), store.newest_step]
        dist.barrier()  # both ranks have looked
        if dist.get_rank() == 0:
            hold.set()  # one rank is done, the other is not: nothing is published yet
            time.sleep(0.05)
        store.poll()
        seen.append(store.newest_step)
        dist.barrier()
        hold.set()
        pending = store._pending
        assert pending is not None
        pending.thread.join()
        store.poll()
    row = {"offset": (dist.get_rank(), 0), "shape": (1, ELEMENTS)}
    stored = FragmentReader(directory / "step_00000001").read("weight", "w", **row)
    return [*seen, store.newest_step, torch.equal(stored, before)]
