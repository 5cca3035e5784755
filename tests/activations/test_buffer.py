"""Vectors come back as they were stored, from all tensor ranks; memory is counted over the ranks of a host."""

import numpy as np
import pytest
import torch

from steerscale.activations.buffer import ShuffleBuffer, check_memory, free_host_memory
from steerscale.errors import ConfigError
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.ranks import RankPool

LANES, SLOTS, WIDTHS = 3, 7, {"a": 10, "b": 5}


def write_and_read(layout: ParallelLayout) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Fill every slot of every half and lane with numbers that tell them apart, read some rows in a mixed order."""
    with initialize(layout) as context:
        buffer = ShuffleBuffer(WIDTHS, lanes=LANES, slots=SLOTS, dtype=torch.float32, on_host=False, context=context)
        for half in range(2):
            for lane in range(LANES):
                for hook, d in WIDTHS.items():
                    # Twice as many as are chosen: rows 1, 3, 5 ... are stored, in two goes.
                    x_Bd = 1000 * (half * LANES + lane) + torch.arange(2 * SLOTS * d).view(2 * SLOTS, d).float()
                    first = buffer.first_row(2 + half, lane)
                    buffer.write(hook, first, x_Bd, torch.tensor([1, 3, 5]))
                    buffer.write(hook, first + 3, x_Bd, torch.tensor([7, 9, 11, 13]))
        rows = np.array([buffer.first_row(1, 2) + 6, buffer.first_row(0, 0), buffer.first_row(0, 1) + 3])
        stored = {hook: storage.numel() for hook, storage in buffer._storage.items()}
        return {hook: x.numpy() for hook, x in buffer.read(rows).items()}, stored


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tensor=2), ParallelLayout(tensor=4)], ids=str)
def test_buffer_gives_whole_vectors_back(layout: ParallelLayout, pool: RankPool) -> None:
    for read, stored in pool.run(write_and_read, layout, ranks=layout.world_size):
        for hook, d in WIDTHS.items():
            base = np.arange(2 * SLOTS * d, dtype=np.float32).reshape(2 * SLOTS, d)
            expected = np.stack([5000 + base[13], base[1], 1000 + base[7]])
            np.testing.assert_array_equal(read[hook], expected)
            assert stored[hook] == 2 * LANES * SLOTS * -(-d // layout.tensor)


def ask(layout: ParallelLayout, share: float) -> str | None:
    """The error of asking for this share of the host's memory on every rank; nothing is allocated."""
    free = free_host_memory()
    assert free is not None
    assert free > 2**27
    with initialize(layout) as context:
        try:
            check_memory(int(share * free), context.device)
        except ConfigError as error:
            return str(error)
    return None


def test_memory_is_counted_over_the_ranks_of_a_host(pool: RankPool) -> None:
    assert pool.run(ask, ParallelLayout(), 0.7, ranks=1) == [None]
    first, second = pool.run(ask, ParallelLayout(tensor=2), 0.7, ranks=2)
    assert first == second
    assert first is not None
    assert "lower stream.buffer_gib, or change stream.buffer_device" in first
