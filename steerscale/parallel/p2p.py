"""Hidden states from each pipeline stage to the next, forward only: what a frozen model's pipeline needs.

The training schedules alternate forward and backward, and end each call with all micro-batches through all stages. Here a
stage hands on what it has computed and goes on to its next micro-batch at once.
"""

from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from steerscale.parallel.context import ParallelContext

IN_FLIGHT = 2
"""Messages a stage may be ahead of its successor; more would pile up memory, not speed."""


class Outbox:
    """What has been sent and may still be on its way; its memory must stay until it has left."""

    def __init__(self, *, at_most: int) -> None:
        self._at_most = at_most
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()

    def make_room(self) -> None:
        """Wait until one more message may be sent."""
        self._wait(self._at_most - 1)

    def add(self, work: Any, message: torch.Tensor) -> None:
        """Remember a message and torch.distributed's handle of it."""
        self._sent.append((work, message))

    def empty(self) -> None:
        """Wait until everything has left."""
        self._wait(0)

    def _wait(self, left: int) -> None:
        while len(self._sent) > left:
            work, _ = self._sent.popleft()
            work.wait()


class StageLink:
    """This rank's connection to the same tensor rank of the stages before and after its own, in one replica."""

    def __init__(self, context: ParallelContext) -> None:
        self._group = context.groups.pp
        self._ranks = dist.get_process_group_ranks(self._group)
        self._stage, self._device = context.at.pipeline, context.device
        self._outbox = Outbox(at_most=IN_FLIGHT)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next message of the stage before; blocks until it is there."""
        message = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(message, src=self._ranks[self._stage - 1], group=self._group)
        return message

    def send(self, message: torch.Tensor) -> None:
        """Hand on to the stage after; blocks only while `IN_FLIGHT` earlier messages are still on their way."""
        self._outbox.make_room()
        message = message.contiguous()
        self._outbox.add(dist.isend(message, dst=self._ranks[self._stage + 1], group=self._group), message)

    def close(self) -> None:
        """Wait until everything sent has been received."""
        self._outbox.empty()
