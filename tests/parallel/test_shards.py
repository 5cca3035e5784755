"""Boxes of shards tile the whole parameter, and cutting agrees with merging."""

from itertools import product

import pytest
import torch

from steerscale.parallel.shards import Shard

CASES = [
    (Shard(name="column", dim=0), (8, 3)),
    (Shard(name="row", dim=1), (3, 8)),
    (Shard(name="gated", dim=0, halves=2), (16, 3)),
    (Shard(name="bias", dim=0), (8,)),
    (Shard(name="gated bias", dim=0, halves=2), (16,)),
    (Shard(name="norm", dim=None), (5,)),
]


def _whole(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("shard", "shape"), CASES, ids=lambda value: getattr(value, "name", None))
def test_shard_parts_merge_to_the_whole(shard: Shard, shape: tuple[int, ...], size: int) -> None:
    whole = _whole(shape)
    parts = [shard.take(whole, rank=rank, size=size) for rank in range(size)]
    assert torch.equal(shard.merge(parts), whole)
    assert {shard.whole_shape(part.shape, size=size) for part in parts} == {shape}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("shard", "shape"), CASES, ids=lambda value: getattr(value, "name", None))
def test_shard_boxes_say_where_each_local_element_lies(shard: Shard, shape: tuple[int, ...], size: int) -> None:
    whole = _whole(shape)
    for rank in range(size):
        local = shard.take(whole, rank=rank, size=size)
        covered = 0
        for box in shard.boxes(local.shape, rank=rank, size=size):
            region = whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape))]
            assert torch.equal(local.reshape(-1)[box.start : box.stop], region.reshape(-1))
            assert box.start == covered
            covered = box.stop
        assert covered == local.numel()


@pytest.mark.parametrize(("shard", "shape"), CASES, ids=lambda value: getattr(value, "name", None))
def test_shard_boxes_of_all_ranks_cover_the_whole_once(shard: Shard, shape: tuple[int, ...]) -> None:
    count = torch.zeros(shape)
    for rank in range(4):
        local = shard.take(_whole(shape), rank=rank, size=4)
        for box in shard.boxes(local.shape, rank=rank, size=4):
            count[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape))] += 1
    assert torch.equal(count, torch.full(shape, 4.0 if shard.dim is None else 1.0))


def test_gated_shard_holds_the_same_rows_of_both_halves() -> None:
    shard = Shard(name="gated", dim=0, halves=2)
    whole = torch.tensor([10, 11, 12, 13, 20, 21, 22, 23])
    parts = [shard.take(whole, rank=rank, size=2).tolist() for rank in range(2)]
    assert parts == [[10, 11, 20, 21], [12, 13, 22, 23]]


@pytest.mark.parametrize(("from_size", "to_size"), [*product([1, 2, 4], repeat=2)])
def test_gated_shard_is_cut_anew(from_size: int, to_size: int) -> None:
    shard, whole = Shard(name="gated", dim=0, halves=2), _whole((16, 3))
    merged = shard.merge([shard.take(whole, rank=rank, size=from_size) for rank in range(from_size)])
    again = shard.merge([shard.take(merged, rank=rank, size=to_size) for rank in range(to_size)])
    assert torch.equal(again, whole)
