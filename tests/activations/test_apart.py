"""The language model on ranks of its own: the same vectors in the same order as on the ranks that train."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steerscale.activations.placement import Placement
from steerscale.errors import LayoutError
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.parity import ACTIVATIONS
from steerscale.testing.ranks import RankPool
from tests.activations.streams import LANES, MODELS, ONE, Seen, build, see, see_apart
from tests.activations.test_stream import HOOKS, SIZES, assert_same

TP2, DP2, PP2 = ParallelLayout(tensor=2), ParallelLayout(data=2), ParallelLayout(pipeline=2)


def placed(trainers: ParallelLayout, producers: ParallelLayout) -> Placement:
    return Placement(trainers=trainers, producers=producers, lanes=LANES)


PLACEMENTS = {
    "TP1 from TP1": placed(ONE, ONE),
    "TP1 from TP2": placed(ONE, TP2),
    "TP2 from PP2": placed(TP2, PP2),
    "TP4 from TP2+SP": placed(ParallelLayout(tensor=4), ParallelLayout(tensor=2, sequence=True)),
    "DP2 from DP1": placed(DP2, ONE),
    "DP2 from TP2xPP2": placed(DP2, ParallelLayout(tensor=2, pipeline=2)),
    "TP2 from DP2": placed(TP2, DP2),
}


def run_apart(pool: RankPool, placement: Placement, *args: Any) -> tuple[list[Seen], list[list[bytes]]]:
    """What the trainers saw, and the tokens of each pass of each producer."""
    trainers = placement.trainers.world_size
    ranks = pool.run(see_apart, placement, *args, ranks=trainers + placement.producers.world_size)
    return ranks[:trainers], ranks[trainers:]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_parity_stream_apart(name: str, pool: RankPool, german_data: Path) -> None:
    placement = PLACEMENTS[name]
    # A width that two ranks cannot halve, where they are to store halves.
    model = MODELS["gpt2" if placement.trainers.tensor == 1 else "llama"]
    expected = see(ONE, german_data, model, HOOKS, SIZES)
    seen, passes = run_apart(pool, placement, german_data, model, HOOKS, SIZES)
    assert_same(seen, expected, 0.0 if placement.producers.tensor == 1 else ACTIVATIONS)
    assert all(rank.activations.keys() == set(HOOKS) for rank in seen)
    # Each replica of the producers has run an equal part, and no pass twice.
    replicas = placement.producers.data
    assert {len(of_rank) * replicas for of_rank in passes} == {len(set().union(*passes))}


def test_resumes_what_the_other_placement_left(pool: RankPool, german_data: Path) -> None:
    model, first, second = MODELS["gpt2"], SIZES[:6], SIZES[6:]
    whole = see(ONE, german_data, model, HOOKS, SIZES)
    here = see(ONE, german_data, model, HOOKS, first)
    (there,), _ = run_apart(pool, PLACEMENTS["TP1 from TP1"], german_data, model, HOOKS, first)
    assert there.state == here.state
    rest, _ = run_apart(pool, PLACEMENTS["DP2 from DP1"], german_data, model, HOOKS, second, here.state)
    back = see(ONE, german_data, model, HOOKS, second, there.state)
    for step, (wanted, got) in enumerate(zip(whole.activations[HOOKS[0]][6:], back.activations[HOOKS[0]], strict=True)):
        assert np.array_equal(wanted, got)
        assert np.array_equal(wanted, np.concatenate([rank.activations[HOOKS[0]][step] for rank in rest]))


def test_vectors_are_rounded_once(pool: RankPool, german_data: Path) -> None:
    changes, sizes = {"buffer_dtype": "bf16", "drop_first": 2}, [64] * 6
    with initialize(ONE) as context, closing(build(german_data, MODELS["gpt2"], HOOKS, context, **changes)) as stream:
        wanted = [stream.next(size).activations for size in sizes]
    arguments = (MODELS["gpt2"], HOOKS, sizes, None, changes)
    (seen,), _ = run_apart(pool, PLACEMENTS["TP1 from TP1"], german_data, *arguments)
    for step, activations in enumerate(wanted):
        for hook in HOOKS:
            assert activations[hook].dtype == torch.bfloat16
            assert np.array_equal(activations[hook].float().numpy(), seen.activations[hook][step])


def test_placement_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        LayoutError, match=r"parallel.pipeline=2 cuts the language model.*set stream.producers.pipeline"
    ):
        placed(PP2, ONE)
    with pytest.raises(LayoutError, match=r"stream\.producers\.data must divide stream\.lanes: 3 does not divide 8"):
        placed(ONE, ParallelLayout(data=3))


def test_every_lane_has_one_producer_and_every_trainer_a_sender() -> None:
    for trainers in (1, 2, 4):
        for producers in (1, 2, 4, 8):
            placement = placed(
                ParallelLayout(data=trainers, tensor=2), ParallelLayout(data=producers, tensor=4, pipeline=2)
            )
            served = [placement.producer_of(lane) for lane in range(LANES)]
            assert served == sorted(served)
            assert [served.count(producer) for producer in range(producers)] == [LANES // producers] * producers
            for producer in range(producers):
                clients = placement.clients_of(producer)
                assert all(producer in placement.producers_of(client) for client in clients)
            ranks = [rank for producer in range(producers) for rank in placement.ranks_of_producer(producer)]
            assert sorted(ranks) == list(range(2 * trainers, 2 * trainers + 8 * producers))
    receivers = [tensor for sender in range(4) for tensor in placement.tensor_receivers(sender)]
    assert receivers == [0, 1]
