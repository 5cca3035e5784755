import threading

import numpy as np
import pytest
import torch

from steerscale.data.config import DataConfig
from steerscale.data.consumed import ConsumedHash
from steerscale.data.dataset import SampleStream
from steerscale.data.loader import MicroBatch, MicroBatchLoader, make_micro_batch

SEQ_LEN = 10


@pytest.fixture
def stream(counted):
    return SampleStream(DataConfig(path=str(counted)), seq_len=SEQ_LEN, seed=3)


def loader(stream, *, rank=0, size=1, rows=2, **options):
    return MicroBatchLoader(stream, data_rank=rank, data_size=size, micro_batch_size=rows, **options)


def rows_of(batches):
    """(first token, ...) of all samples in micro-batches, inputs and last label."""
    return [(*tokens.tolist(), int(label[-1])) for b in batches for tokens, label in zip(b.tokens_BS, b.labels_BS)]


def step_rows(stream, *, consumed, global_batch, size, rows):
    """All samples of one step by global position, put together from all data ranks."""
    accumulation = global_batch // (size * rows)
    ranks = []
    for rank in range(size):
        with loader(stream, rank=rank, size=size, rows=rows) as one:
            ranks.append([rows_of([batch]) for batch in one.step(consumed, accumulation)])
    return [row for m in range(accumulation) for rank in range(size) for row in ranks[rank][m]]


@pytest.mark.parametrize(("size", "rows"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (6, 2)])
def test_global_batch_does_not_depend_on_the_layout(stream, size, rows):
    expected = [tuple(stream.tokens(position)) for position in range(24, 36)]
    assert step_rows(stream, consumed=24, global_batch=12, size=size, rows=rows) == expected


def test_resume_in_the_middle_and_on_another_layout_goes_on_exactly(stream):
    with loader(stream) as whole:
        samples = [row for step in range(10) for row in rows_of(whole.step(step * 6, 3))]
    with loader(stream) as resumed:
        assert rows_of(resumed.step(24, 3)) == samples[24:30]
    assert step_rows(stream, consumed=24, global_batch=6, size=3, rows=1) == samples[24:30]


def test_labels_are_the_next_tokens(stream):
    with loader(stream) as one:
        (batch,) = one.step(0, 1)
    assert batch.tokens_BS.shape == (2, SEQ_LEN)
    assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])
    assert (batch.tokens_BS.dtype, batch.labels_BS.dtype) == (torch.int64, torch.int64)
    assert torch.equal(batch.loss_mask_BS, torch.ones(2, SEQ_LEN))
    assert (batch.positions_BS, batch.documents_BS) == (None, None)
    assert batch.tokens_BS.is_contiguous()


def test_document_ends_by_hand():
    # eos is 0: documents (7 8 0) (0) (9 0) (5 6 ...; the second one is empty.
    batch = make_micro_batch(
        np.array([[7, 8, 0, 0, 9, 0, 5, 6, 4]]), eos_id=0, reset_at_document_end=True, mask_document_end=True
    )
    assert batch.tokens_BS.tolist() == [[7, 8, 0, 0, 9, 0, 5, 6]]
    assert batch.labels_BS.tolist() == [[8, 0, 0, 9, 0, 5, 6, 4]]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]
    assert batch.documents_BS.tolist() == [[0, 0, 0, 1, 2, 2, 3, 3]]
    assert batch.loss_mask_BS.tolist() == [[1, 1, 0, 0, 1, 0, 1, 1]]
    assert (batch.positions_BS.dtype, batch.documents_BS.dtype) == (torch.int64, torch.int32)


def test_reset_and_mask_are_independent():
    samples = np.array([[7, 0, 5, 6]])
    assert make_micro_batch(samples, eos_id=0, reset_at_document_end=True).loss_mask_BS.tolist() == [[1, 1, 1]]
    masked = make_micro_batch(samples, eos_id=0, mask_document_end=True)
    assert masked.loss_mask_BS.tolist() == [[1, 0, 1]]
    assert masked.positions_BS is None


@pytest.mark.parametrize(("size", "rows"), [(1, 1), (2, 2), (3, 2)])
def test_validation_counts_every_sample_once_on_any_layout(counted, size, rows):
    stream = SampleStream(DataConfig(path=str(counted)), seq_len=SEQ_LEN, split="valid", shuffle=False)
    counted_labels = []
    num_steps = -(-stream.num_samples // (size * rows))
    for rank in range(size):
        with loader(stream, rank=rank, size=size, rows=rows) as one:
            for step in range(num_steps):
                (batch,) = one.step(step * size * rows, 1)
                assert batch.tokens_BS.shape == (rows, SEQ_LEN)
                counted_labels += batch.labels_BS[batch.loss_mask_BS == 1].tolist()
    assert sorted(counted_labels) == list(range(2, 102))


@pytest.mark.parametrize("num_prefetch", [0, 1, 3])
def test_prefetch_changes_nothing(stream, num_prefetch):
    # Equal steps, then other sizes, a jump ahead and one back.
    requests = [(0, 2), (4, 2), (8, 2), (12, 3), (18, 3), (24, 1), (100, 2), (104, 2), (0, 2)]
    with loader(stream, num_prefetch=num_prefetch) as one:
        for consumed, accumulation in requests:
            expected = [tuple(stream.tokens(p)) for p in range(consumed, consumed + 2 * accumulation)]
            assert rows_of(one.step(consumed, accumulation)) == expected


def test_prefetch_runs_ahead_on_another_thread(stream, monkeypatch):
    seen = []
    locate = stream.locate

    def recorded(positions):
        seen.append((int(positions[0]), threading.current_thread() is threading.main_thread()))
        return locate(positions)

    monkeypatch.setattr(stream, "locate", recorded)
    one = loader(stream, num_prefetch=2)
    one.step(0, 1)
    one.step(2, 1)
    one.close()
    # Closing cancels what has not begun.
    assert seen[:2] == [(0, True), (2, False)]
    assert {first for first, _ in seen} <= {0, 2, 4, 6}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("micro-batches")]


def test_error_on_the_thread_is_raised_in_its_step(stream, monkeypatch):
    locate = stream.locate

    def failing(positions):
        if positions[0] == 4:
            raise OSError("disk on fire")
        return locate(positions)

    monkeypatch.setattr(stream, "locate", failing)
    with loader(stream) as one:
        one.step(0, 1)
        one.step(2, 1)
        with pytest.raises(OSError, match="disk on fire"):
            one.step(4, 1)
        assert rows_of(one.step(6, 1)) == [tuple(stream.tokens(p)) for p in (6, 7)]


@pytest.mark.parametrize(("size", "rows"), [(1, 1), (2, 3), (4, 1)])
def test_consumed_hash_does_not_depend_on_the_layout(stream, size, rows):
    def total(size, rows, *, steps=3):
        parts = []
        for rank in range(size):
            consumed = ConsumedHash()
            with loader(stream, rank=rank, size=size, rows=rows, consumed=consumed) as one:
                for step in range(steps):
                    one.step(step * 12, 12 // (size * rows))
            parts.append(consumed.value)
        return ConsumedHash.total(parts)

    reference = total(1, 12)
    assert total(size, rows) == reference
    assert total(size, rows, steps=2) != reference


def test_consumed_hash_survives_resume_and_overflow():
    samples = np.arange(12).reshape(3, 4)
    whole, first = ConsumedHash(), ConsumedHash()
    whole.add(*samples)
    first.add(*samples[:, :2])
    resumed = ConsumedHash(first.value)
    resumed.add(*samples[:, 2:])
    assert resumed.value == whole.value
    # An all-reduce in int64 wraps around; the total is right all the same.
    values = np.full(16, whole.value, dtype=np.int64) | 2**60
    assert ConsumedHash.total([int(values.sum())]) == ConsumedHash.total(values.tolist())


def test_moving_keeps_what_is_absent_absent():
    batch = make_micro_batch(np.array([[1, 2, 3]]), eos_id=0)
    moved = batch.to("cpu", non_blocking=True)
    assert isinstance(moved, MicroBatch)
    assert moved.positions_BS is None
    assert torch.equal(moved.tokens_BS, batch.tokens_BS)
