"""Micro-batches on torch, prepared by a background thread.

Shape suffixes: B micro-batch size, S sequence length.
"""

import dataclasses
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from steerscale.data.consumed import ConsumedHash
from steerscale.data.dataset import SampleStream


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward and backward pass of one replica reads."""

    tokens_BS: torch.Tensor
    """Inputs, int64."""
    labels_BS: torch.Tensor
    """The token after each input, int64."""
    loss_mask_BS: torch.Tensor
    """1 where the label counts, else 0, float32."""
    positions_BS: torch.Tensor | None = None
    """Position in the document, int64; None: in the sequence."""
    documents_BS: torch.Tensor | None = None
    """Running number of the document in the sequence, int32; attention stays within equal numbers. None: no limits."""

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        rows, length = self.tokens_BS.shape
        return rows, length

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "MicroBatch":
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory, from where a copy to CUDA can run beside computation."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: function(x) for name, x in tensors.items() if x is not None})


def make_micro_batch(
    samples: np.ndarray,
    *,
    eos_id: int,
    num_real: int | None = None,
    reset_at_document_end: bool = False,
    mask_document_end: bool = False,
) -> MicroBatch:
    """Cut samples into inputs and labels.

    Args:
        samples: int64 [B, S + 1].
        num_real: only the first so many rows are samples; the others fill up the batch and do not count in the loss.
        reset_at_document_end: number positions and documents anew after each eos; the eos belongs to the one it ends.
        mask_document_end: the label after an eos does not count.
    """
    tokens, labels = np.ascontiguousarray(samples[:, :-1]), np.ascontiguousarray(samples[:, 1:])
    ends = tokens == eos_id
    mask = np.ones(tokens.shape, dtype=np.float32)
    if mask_document_end:
        mask[ends] = 0
    if num_real is not None:
        mask[num_real:] = 0
    positions = documents = None
    if reset_at_document_end:
        begins = np.zeros_like(ends)
        begins[:, 1:] = ends[:, :-1]
        documents = torch.from_numpy(np.cumsum(begins, axis=1, dtype=np.int32))
        place = np.arange(tokens.shape[1], dtype=np.int64)
        positions = torch.from_numpy(place - np.maximum.accumulate(np.where(begins, place, 0), axis=1))
    return MicroBatch(
        tokens_BS=torch.from_numpy(tokens),
        labels_BS=torch.from_numpy(labels),
        loss_mask_BS=torch.from_numpy(mask),
        positions_BS=positions,
        documents_BS=documents,
    )


class _Step(NamedTuple):
    """The share of one data rank in one optimizer step."""

    batches: list[MicroBatch]
    samples: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Positions, datasets, first tokens of the real ones."""


class MicroBatchLoader:
    """Reads the share of one data rank, step by step, and prepares the steps it expects next on a thread.

    Micro-batch m of data rank r holds the global positions consumed + (m * data_size + r) * micro_batch_size + i. Past
    the end of a finite stream it holds rows of eos that do not count, so that any layout evaluates every sample exactly
    once.
    """

    def __init__(
        self,
        stream: SampleStream,
        *,
        data_rank: int,
        data_size: int,
        micro_batch_size: int,
        reset_at_document_end: bool = False,
        mask_document_end: bool = False,
        num_prefetch: int = 2,
        pin_memory: bool = False,
        consumed: ConsumedHash | None = None,
    ) -> None:
        """Give `consumed` to add every sample that is handed out to it; prefetched ones are not added before that."""
        self._stream = stream
        self._data_rank, self._data_size, self._micro_batch_size = data_rank, data_size, micro_batch_size
        self._reset, self._mask = reset_at_document_end, mask_document_end
        self._num_prefetch, self._pin_memory = num_prefetch, pin_memory
        self._consumed = consumed
        self._ahead: deque[tuple[tuple[int, int], Future[_Step]]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="micro-batches") if num_prefetch else None

    def step(self, consumed_samples: int, num_micro_batches: int) -> list[MicroBatch]:
        """The micro-batches of the optimizer step that begins after `consumed_samples` samples of all ranks.

        Consecutive steps of equal size come from the prefetch; any other request is right too, only slower. An error on
        the thread is raised here, when its step is asked for.
        """
        key = (consumed_samples, num_micro_batches)
        if self._ahead and self._ahead[0][0] != key:
            self._discard()
        step = self._ahead.popleft()[1].result() if self._ahead else self._prepare(*key)
        self._look_ahead(*key)
        if self._consumed is not None:
            self._consumed.add(*step.samples)
        return step.batches

    def close(self) -> None:
        """Stop the thread; `step` must not be called any more."""
        self._discard()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "MicroBatchLoader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _look_ahead(self, consumed_samples: int, num_micro_batches: int) -> None:
        if self._thread is None:
            return
        size = num_micro_batches * self._data_size * self._micro_batch_size
        end = self._stream.num_samples
        while len(self._ahead) < self._num_prefetch:
            begin = consumed_samples + (len(self._ahead) + 1) * size
            if end is not None and begin >= end:
                return
            key = (begin, num_micro_batches)
            self._ahead.append((key, self._thread.submit(self._prepare, *key)))

    def _discard(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _prepare(self, consumed_samples: int, num_micro_batches: int) -> _Step:
        rows = self._micro_batch_size
        first = consumed_samples + (np.arange(num_micro_batches) * self._data_size + self._data_rank) * rows
        positions = (first[:, None] + np.arange(rows)).reshape(-1)
        if self._stream.num_samples is not None:
            # Positions rise, so those past the end are the last ones.
            positions = positions[positions < self._stream.num_samples]
        corpora, starts = self._stream.locate(positions)
        batches = []
        for begin in range(0, num_micro_batches * rows, rows):
            real = self._stream.read(corpora[begin : begin + rows], starts[begin : begin + rows])
            filling = np.full((rows - len(real), self._stream.seq_len + 1), self._stream.eos_id)
            batch = make_micro_batch(
                np.concatenate([real, filling]),
                eos_id=self._stream.eos_id,
                num_real=len(real),
                reset_at_document_end=self._reset,
                mask_document_end=self._mask,
            )
            batches.append(batch.pin_memory() if self._pin_memory else batch)
        return _Step(batches, (positions, corpora, starts))
