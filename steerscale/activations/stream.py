"""Shuffled activation vectors for training, made as fast as they are consumed.

Shapes: B vectors, S sequence, d width of a hook's activation.

Each lane's current block is consumed while the next one is produced, forward pass by forward pass: after every batch a lane
has produced the share of its next block that it has consumed of its current one, and lanes are out of step with each other,
so that no step waits for many passes. What a forward pass contains depends on lane, block and place in it alone, and what is
consumed on `order`: a stream that goes on from its cursors gives bit by bit what it would have given.

Where the model lives on ranks of its own, passes are asked for as soon as the other half is free, and each step waits for as
many as are due by the same reckoning: producers run ahead as far as the buffer reaches, and no step waits for many passes.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from steerscale.activations.buffer import ShuffleBuffer
from steerscale.activations.cache import CachedSource
from steerscale.activations.config import StreamConfig
from steerscale.activations.facts import buffer_dtype
from steerscale.activations.lanes import Lane, Production
from steerscale.activations.loading import check_tokenizer, load_source
from steerscale.activations.order import HALVES, Order, block_sequences
from steerscale.activations.passes import LocalPasses, Passes, Stopwatch
from steerscale.activations.remote import RemotePasses, RemoteSource
from steerscale.activations.source import ActivationSource
from steerscale.data.config import DataConfig
from steerscale.data.consumed import ConsumedHash
from steerscale.data.dataset import SampleStream
from steerscale.errors import CheckpointError, ConfigError, DataError, LayoutError
from steerscale.metrics import format_duration
from steerscale.parallel.context import ParallelContext

logger = logging.getLogger(__name__)

HOPELESS = 10_000
"""Sequences of a lane, one after the other, of which nothing is kept: no more are looked at."""
TELL_SECONDS = 10.0
"""Between words of progress while the buffer is filled for the first time."""


@dataclass(frozen=True, kw_only=True)
class StreamBatch:
    """Vectors of this replica, the same on all its ranks."""

    ids: torch.Tensor
    """What they are of: sequence * seq_len + position, int64 [B], on the CPU of every rank."""
    activations: dict[str, torch.Tensor]
    """[B, d] by hook on every tensor rank of the stage that owns it; absent on other stages."""


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
        self._time = Stopwatch()
        self.seconds = self._time.seconds
        """Time of this process so far: reading and ordering tokens; forward passes, or waiting for those of other ranks;
        writing, mixing and gathering vectors. On CUDA only what the host waited for."""
        dtype = buffer_dtype(config, source)
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
        owned = {hook: d for hook, d in source.widths.items() if hook in source.owned}
        self._buffer = ShuffleBuffer(
            owned,
            lanes=own,
            slots=sequences * (dataset.seq_len - config.drop_first),
            dtype=dtype,
            on_host=config.buffer_device == "host",
            context=context,
        )
        self._passes = self._make_passes()
        production = Production(
            order=self.order,
            buffer=self._buffer,
            passes=self._passes,
            batch_size=min(config.micro_batch_size, sequences),
            time=self._time,
        )
        self._per_block = production.per_block
        self._lanes = [Lane(rank * own + local, local, production) for local in range(own)]
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
        self.fill()
        ids = [part for lane in self._lanes for part in self._take(lane, each)]
        activations = self._flush()
        self._keep_pace()
        whole = np.concatenate(ids)
        self.consumed.add_ids(whole)
        return StreamBatch(ids=torch.from_numpy(whole), activations=activations)

    def fill(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Produce every lane's current block, the longest wait of a run, unless that was begun already.

        Returns False if `should_stop`, asked before each pass and as often on all ranks, put an end to it.
        """
        if any(lane.is_begun for lane in self._lanes):
            return True
        total = len(self._lanes) * self._per_block
        if self._passes.ahead:
            for block in range(HALVES):
                for lane in self._lanes:
                    lane.produce(lane.index + block, self._per_block)
        begin = told = time.monotonic()
        for done in range(total):
            if should_stop():
                return False
            now = time.monotonic()
            if now - told > TELL_SECONDS and done:
                told, left = now, (now - begin) / done * (total - done)
                logger.info(
                    "filling the shuffle buffer: %d of %d forward passes, ETA %s", done, total, format_duration(left)
                )
            lane = self._lanes[done // self._per_block]
            lane.produce(lane.index, done % self._per_block + 1)
            self._passes.keep_up((HALVES * total if self._passes.ahead else total) - done - 1)
        return True

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
                    "block_sequences follows from buffer_*, lanes, drop_first and widths), or start a new run"
                )
        self._passes.keep_up(0)  # nothing may be written any more
        for lane in self._lanes:
            lane.go_to(*map(int, state["cursors"][lane.number]))

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

    def _make_passes(self) -> Passes:
        if isinstance(self.source, RemoteSource):
            return RemotePasses(self.source, self._buffer, self._time)
        device, overlap = self.context.device, self.config.overlap
        return LocalPasses(self.source, self._buffer, device=device, overlap=overlap, stopwatch=self._time)

    def _take(self, lane: Lane, count: int) -> list[np.ndarray]:
        """Mark the lane's next `count` vectors to be read; their ids."""
        ids, crossed, empty = [], False, 0
        while count:
            block = lane.current()
            if lane.offset == len(block):
                empty = 0 if len(block) else empty + len(block.tokens_KS)
                if empty >= HOPELESS:
                    raise DataError(
                        f"{empty:,} sequences in a row hold nothing but tokens that the stream leaves out "
                        f"({len(self.order.special_ids)} special ones, stream.drop_first={self.order.drop_first}): look at the "
                        "data, whose tokens may all be unknown to the tokenizer, or set stream.drop_special=false"
                    )
                if crossed:
                    # What comes next is written over the block before this one, which is still to be read.
                    self._read()
                lane.step_on()
                crossed = True
                continue
            end = min(lane.offset + count, len(block))
            with self._time("shuffle"):
                self._rows.append(self._buffer.first_row(lane.index, lane.local) + block.order[lane.offset : end])
                ids.append(block.ids(lane.offset, end))
            count -= end - lane.offset
            lane.offset = end
        return ids

    def _keep_pace(self) -> None:
        """Produce as large a share of the lanes' next blocks as has been consumed of their current ones, lanes out of step."""
        if self._passes.ahead:
            behind = [lane for lane in self._lanes if lane.begun(lane.index + 1) < self._per_block]
            for passes in range(1, self._per_block + 1 if behind else 1):
                for lane in behind:
                    lane.produce(lane.index + 1, passes)
        left = 0
        for lane in self._lanes:
            phase = (lane.local + 0.5) / len(self._lanes)
            due = int(lane.consumed * self._per_block + phase)
            lane.produce(lane.index + 1, due)
            left += self._per_block - due
        self._passes.keep_up(left)

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


def left_out(config: StreamConfig, source: ActivationSource, dataset: SampleStream) -> tuple[int, ...]:
    """Token ids whose activations the stream leaves out."""
    return tuple(sorted(source.special_ids | {dataset.eos_id})) if config.drop_special else ()


def build_source(config: StreamConfig, hooks: Sequence[str], context: ParallelContext) -> ActivationSource:
    """The language model on the context's layout, behind its cache if there is one. Raises what `load_source` raises."""
    source = load_source(config, hooks, context)
    return source if config.cache is None else CachedSource(source, Path(config.cache), context)


def build_stream(
    config: StreamConfig,
    *,
    data: DataConfig,
    hooks: Sequence[str],
    context: ParallelContext,
    seed: int = 0,
    source: ActivationSource | None = None,
) -> ActivationStream:
    """The data and the stream of a language model's activations at `hooks`, on the context's layout. A collective.

    `source` is the model; None: it is loaded here. Raises what `load_source`, `SampleStream` and `ActivationStream` raise.
    """
    source = source or build_source(config, hooks, context)
    dataset = SampleStream(data, seq_len=source.seq_len, seed=seed)
    return ActivationStream(config, source, dataset, context, seed)
