"""Shuffled activation vectors for training, made as fast as they are consumed.

Shapes: B vectors, S sequence, d width of a hook's activation.

Each lane's current block is consumed while the next one is produced, forward pass by forward pass: after every batch a lane
has produced the share of its next block that it has consumed of its current one, and lanes are out of step with each other,
so that no step waits for many passes. What a forward pass contains depends on lane, block and place in it alone, and what is
consumed on `order`: a stream that goes on from its cursors gives bit by bit what it would have given.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from steerscale.activations.buffer import ShuffleBuffer
from steerscale.activations.cache import CachedSource
from steerscale.activations.config import StreamConfig
from steerscale.activations.loading import check_tokenizer, load_source
from steerscale.activations.order import Block, Order, block_sequences
from steerscale.activations.source import ActivationSource
from steerscale.data.config import DataConfig
from steerscale.data.consumed import ConsumedHash
from steerscale.data.dataset import SampleStream
from steerscale.errors import CheckpointError, ConfigError, LayoutError
from steerscale.metrics import format_duration
from steerscale.parallel.context import ParallelContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


logger = logging.getLogger(__name__)

TELL_SECONDS = 10.0
"""Between words of progress while the buffer is filled for the first time."""


@dataclass(frozen=True, kw_only=True)
class StreamBatch:
    """Vectors of this replica, the same on all its ranks."""

    ids: torch.Tensor
    """What they are of: sequence * seq_len + position, int64 [B], on the CPU of every rank."""
    activations: dict[str, torch.Tensor]
    """[B, d] by hook on every tensor rank of the stage that owns it; absent on other stages."""


@dataclass
class _Lane:
    """One lane of this replica."""

    number: int
    """Over all replicas."""
    local: int
    """In this one."""
    index: int = 0
    """Block that is being consumed."""
    offset: int = 0
    """Vectors of it that have been."""
    blocks: dict[int, Block] = field(default_factory=dict)
    """The current one and the next, once they are begun."""
    passes: dict[int, int] = field(default_factory=dict)
    """Forward passes done for each of these."""
    ready: dict[int, Any] = field(default_factory=dict)
    """On CUDA: the event behind the last pass of a block that nobody has waited for yet."""


class ActivationStream:
    """Endless batches of shuffled activations. Build with `build_stream`."""

    def __init__(
        self,
        config: StreamConfig,
        source: ActivationSource,
        dataset: SampleStream,
        context: ParallelContext,
        seed: int = 0,
    ) -> None:
        """A collective: memory for the buffer is checked and allocated. Nothing is read or run before the first `next`.

        Args:
            dataset: an endless sample stream of `source.seq_len` tokens a sample, made with the source's tokenizer.
            seed: of the shuffling.
        Raises:
            ConfigError: a buffer too small or too large, or settings that leave nothing over.
            LayoutError: replicas that cannot share the lanes.
            DataError: a dataset of another tokenizer.
        """
        assert dataset.num_samples is None
        assert dataset.seq_len == source.seq_len
        check_tokenizer(source, dataset)
        replicas, rank = context.layout.data, context.at.data
        if config.lanes % replicas:
            raise LayoutError(
                f"parallel.data must divide stream.lanes: {replicas} does not divide {config.lanes}; each replica streams "
                "whole lanes"
            )
        self.config, self.source, self.context = config, source, context
        self.consumed = ConsumedHash()
        """Hash over the ids of what this replica was given."""
        self.seconds = {"data": 0.0, "lm": 0.0, "shuffle": 0.0}
        """Time of this process so far: reading and ordering tokens; forward passes; writing, mixing and gathering vectors.
        On CUDA only what the host waited for."""
        dtype = source.dtype if config.buffer_dtype == "auto" else DTYPES[config.buffer_dtype]
        bytes_per_vector = sum(source.widths.values()) * dtype.itemsize
        sequences = block_sequences(config, seq_len=dataset.seq_len, bytes_per_vector=bytes_per_vector)
        self.order = Order(
            dataset=dataset,
            lanes=config.lanes,
            block_sequences=sequences,
            seed=seed,
            special_ids=left_out(config, source, dataset),
            drop_first=config.drop_first,
        )
        own = config.lanes // replicas
        self._lanes = [_Lane(number=rank * own + local, local=local) for local in range(own)]
        self._batch_size = min(config.micro_batch_size, sequences)
        self._passes = -(-sequences // self._batch_size)
        owned = {hook: d for hook, d in source.widths.items() if hook in source.owned}
        self._buffer = ShuffleBuffer(
            owned,
            lanes=own,
            slots=sequences * (dataset.seq_len - config.drop_first),
            dtype=dtype,
            on_host=config.buffer_device == "host",
            context=context,
        )
        self._on_cuda = context.device.type == "cuda"
        self._side = torch.cuda.Stream(context.device) if config.overlap and self._on_cuda else None
        self._rows: list[np.ndarray] = []
        self._parts: list[dict[str, torch.Tensor]] = []

    def next(self, count: int) -> StreamBatch:
        """The next `count` vectors of this replica, as many of each of its lanes, lane by lane.

        Call it once a step: then the replicas' batches, one after the other, are the same vectors in the same order for
        any number of replicas. Runs the forward passes that are due. Raises ConfigError unless the lanes divide `count`.
        """
        each, rest = divmod(count, len(self._lanes))
        if rest or count <= 0:
            raise ConfigError(
                f"stream.lanes={self.config.lanes} must divide the global batch: {count} vectors on each of "
                f"{self.context.layout.data} replicas are no equal parts of its {len(self._lanes)} lanes"
            )
        if not any(lane.blocks for lane in self._lanes):
            self._fill()
        ids = [part for lane in self._lanes for part in self._take(lane, each)]
        activations = self._flush()
        for lane in self._lanes:
            self._keep_pace(lane)
        whole = np.concatenate(ids)
        self.consumed.add_ids(whole)
        return StreamBatch(ids=torch.from_numpy(whole), activations=activations)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, for a checkpoint; JSON-able, the same on all ranks, valid on any layout.

        A collective over the replicas: two integers a lane.
        """
        parts: list = [None] * self.context.layout.data
        own = [[lane.index, lane.offset] for lane in self._lanes]
        dist.all_gather_object(parts, own, group=self.context.groups.dp)
        return {**self._identity(), "cursors": [cursor for part in parts for cursor in part]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`, whatever layout wrote it: the next `next` runs the current blocks through the model again.

        The hash of consumed ids is left alone. Raises CheckpointError if the state is of another order.
        """
        for key, now in self._identity().items():
            if state.get(key) != now:
                raise CheckpointError(
                    f"the activation stream of the checkpoint had {key}={state.get(key)!r}, now it is {now!r}: its vectors "
                    "would be others, or in another order; go on with the settings it was begun with (stream.*, hooks, seed; "
                    "block_sequences follows from buffer_gib, lanes, drop_first and widths), or start a new run"
                )
        for lane in self._lanes:
            lane.index, lane.offset = map(int, state["cursors"][lane.number])
            for begun in (lane.blocks, lane.passes, lane.ready):
                begun.clear()

    def close(self) -> None:
        """Wait for what is still on its way between stages."""
        self.source.close()

    def _identity(self) -> dict[str, Any]:
        """What the order of vectors, and their values, follow from."""
        order = self.order
        return {
            "lm": self.source.identity,
            "lanes": order.lanes,
            "block_sequences": order.block_sequences,
            "seq_len": order.dataset.seq_len,
            "seed": order.seed,
            "special_ids": list(order.special_ids),
            "drop_first": order.drop_first,
        }

    def _fill(self) -> None:
        """Produce every lane's current block: the longest wait of a run, so it is told how long."""
        total, begin, told = len(self._lanes) * self._passes, time.monotonic(), time.monotonic()
        for done, lane in enumerate(self._lanes):
            now = time.monotonic()
            if now - told > TELL_SECONDS and done:
                told, left = now, (now - begin) / done * (len(self._lanes) - done)
                logger.info(
                    "filling the shuffle buffer: %d of %d forward passes, ETA %s",
                    *(done * self._passes, total, format_duration(left)),
                )
            self._produce(lane, lane.index, self._passes)

    def _take(self, lane: _Lane, count: int) -> list[np.ndarray]:
        """Mark the lane's next `count` vectors to be read; their ids."""
        ids, crossed = [], False
        while count:
            block = self._complete(lane)
            if lane.offset == len(block):
                if crossed:
                    # What comes next is written over the block before this one, which is still to be read.
                    self._read()
                del lane.blocks[lane.index], lane.passes[lane.index]
                lane.index, lane.offset, crossed = lane.index + 1, 0, True
                continue
            end = min(lane.offset + count, len(block))
            with self._time("shuffle"):
                self._rows.append(self._buffer.first_row(lane.index, lane.local) + block.order[lane.offset : end])
                ids.append(block.ids(lane.offset, end))
            count -= end - lane.offset
            lane.offset = end
        return ids

    def _complete(self, lane: _Lane) -> Block:
        """The lane's current block, all of it in the buffer."""
        self._produce(lane, lane.index, self._passes)
        if (ready := lane.ready.pop(lane.index, None)) is not None:
            self._buffer.wait(ready)
        return lane.blocks[lane.index]

    def _keep_pace(self, lane: _Lane) -> None:
        """Produce as large a share of the next block as has been consumed of the current one, lanes out of step."""
        consumed = lane.offset / max(len(lane.blocks[lane.index]), 1)
        phase = (lane.local + 0.5) / len(self._lanes)
        self._produce(lane, lane.index + 1, int(consumed * self._passes + phase))

    def _produce(self, lane: _Lane, index: int, passes: int) -> None:
        """Run the first `passes` forward passes of a block, if they have not been."""
        if passes <= lane.passes.get(index, 0):
            return
        if index not in lane.blocks:
            with self._time("data"):
                lane.blocks[index], lane.passes[index] = self.order.block(lane.number, index), 0
        with self._beside():
            for number in range(lane.passes[index], passes):
                self._run(lane, lane.blocks[index], number)
            lane.passes[index] = passes
            if self._on_cuda and passes == self._passes:
                lane.ready[index] = torch.cuda.current_stream().record_event()

    def _run(self, lane: _Lane, block: Block, number: int) -> None:
        """One forward pass, and what is kept of it into the buffer."""
        begin = number * self._batch_size
        end = min(begin + self._batch_size, len(block.tokens_KS))
        with self._time("lm"):
            tokens_BS = torch.from_numpy(block.tokens_KS[begin:end]).to(self.context.device)
            (activations,) = self.source.run([tokens_BS])
        with self._time("shuffle"):
            kept, before = block.rows(begin, end)
            chosen = torch.from_numpy(kept).to(self.context.device)
            row = self._buffer.first_row(block.index, lane.local) + before
            for hook, x_BSd in activations.items():
                self._buffer.write(hook, row, x_BSd.flatten(0, 1), chosen)

    def _read(self) -> None:
        """Read what is marked."""
        if self._rows:
            with self._time("shuffle"):
                self._parts.append(self._buffer.read(np.concatenate(self._rows)))
            self._rows.clear()

    def _flush(self) -> dict[str, torch.Tensor]:
        """All that was marked since the last time, in that order."""
        self._read()
        first, *more = self._parts
        self._parts.clear()
        return {hook: torch.cat([x, *(part[hook] for part in more)]) for hook, x in first.items()} if more else first

    def _beside(self) -> AbstractContextManager:
        """Where forward passes run: on CUDA on a stream of their own, behind the reads that they may write over."""
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._side)

    @contextlib.contextmanager
    def _time(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - begin


def left_out(config: StreamConfig, source: ActivationSource, dataset: SampleStream) -> tuple[int, ...]:
    """Token ids whose activations the stream leaves out."""
    return tuple(sorted(source.special_ids | {dataset.eos_id})) if config.drop_special else ()


def build_stream(
    config: StreamConfig, *, data: DataConfig, hooks: Sequence[str], context: ParallelContext, seed: int = 0
) -> ActivationStream:
    """The language model, its data and the stream of its activations at `hooks`, on the context's layout. A collective.

    Raises what `load_source`, `SampleStream` and `ActivationStream` raise.
    """
    source = load_source(config, hooks, context)
    dataset = SampleStream(data, seq_len=source.seq_len, seed=seed)
    if config.cache is not None:
        source = CachedSource(source, Path(config.cache), context)
    return ActivationStream(config, source, dataset, context, seed)
