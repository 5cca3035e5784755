"""Messages from stage to stage arrive whole and in order, and a stage does not wait for the next one to take them."""

import torch
import torch.distributed as dist

from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.parallel.p2p import IN_FLIGHT, StageLink
from steerscale.testing.ranks import RankPool

MESSAGES = 6


def relay(layout: ParallelLayout) -> list[float]:
    """Stage 0 makes messages, later ones add a tenth of what they are and pass on; what this rank received."""
    with initialize(layout) as context:
        link, received = StageLink(context), []
        if context.is_first_stage:
            for index in range(IN_FLIGHT):  # nobody receives before the barrier
                link.send(torch.full((3, 2), float(100 * context.rank + index)))
        dist.barrier()
        for index in range(MESSAGES):
            if context.is_first_stage:
                if index < IN_FLIGHT:
                    continue
                message = torch.full((2, 3), float(100 * context.rank + index)).T  # no contiguous one
            else:
                message = link.receive((3, 2), torch.float32)
                received.append(message.unique().tolist())
                message = message + 0.25
            if not context.is_last_stage:
                link.send(message)
        link.close()
        return [value for (value,) in received]


def test_messages_go_down_the_pipeline_of_each_replica_and_tensor_rank(pool: RankPool) -> None:
    layout = ParallelLayout(pipeline=3, tensor=2)
    answers = pool.run(relay, layout, ranks=layout.world_size)
    for rank, answer in enumerate(answers):
        at = layout.coordinates(rank)
        if at.pipeline == 0:
            assert answer == []
        else:
            assert answer == [100 * at.tensor + index + 0.25 * (at.pipeline - 1) for index in range(MESSAGES)]
