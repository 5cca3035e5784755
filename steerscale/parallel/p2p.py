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


class StageLink:
    """This rank's connection to the same tensor rank of the stages before and after its own, in one replica."""

    def __init__(self, context: ParallelContext) -> None:
        self._group = context.groups.pp
        self._ranks = dist.get_process_group_ranks(self._group)
        self._stage, self._device = context.at.pipeline, context.device
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next message of the stage before; blocks until it is there."""
        message = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(message, src=self._ranks[self._stage - 1], group=self._group)
        return message

    def send(self, message: torch.Tensor) -> None:
        """Hand on to the stage after; blocks only while `IN_FLIGHT` earlier messages are still on their way."""
        while len(self._sent) >= IN_FLIGHT:
            self._wait()
        message = message.contiguous()
        work = dist.isend(message, dst=self._ranks[self._stage + 1], group=self._group)
        self._sent.append((work, message))  # its memory must stay until it has left

    def close(self) -> None:
        """Wait until everything sent has been received."""
        while self._sent:
            self._wait()

    def _wait(self) -> None:
        work, _ = self._sent.popleft()
        work.wait()
