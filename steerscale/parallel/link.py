"""Messages between ranks of different worlds, point to point.

Vectors travel straight from where they are made to where they are stored: by NCCL if that is on CUDA devices, else by gloo.
Everything else (commands, tokens, losses) is small or rare and goes by gloo, from host memory.

Nothing here times out: a trainer may take any time between two commands. A rank that is gone breaks its connections under
gloo; under NCCL it is for the launcher to notice.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from steerscale.parallel.p2p import Outbox
from steerscale.parallel.worlds import World

FOREVER = timedelta(days=3650)
COMMANDS, VECTORS, WHOLE = 1, 2, 3
"""Tags: messages of one kind between two ranks arrive in the order they were sent."""
IN_FLIGHT = 32
"""Messages that may be on their way from one rank."""


class Patient:
    """A message on its way; `wait` has no time limit."""

    def __init__(self, work: Any, *, stays: bool) -> None:
        self._work, self._stays = work, stays

    def wait(self) -> None:
        """Until it is there. Of vectors on CUDA only what comes next on the current stream waits."""
        if self._stays:
            self._work.wait(FOREVER)
        else:
            self._work.wait()


class Link:
    """This rank's connections to ranks of other worlds, by their number among all processes."""

    def __init__(self, world: World, *, device: torch.device) -> None:
        """A collective of all processes of all worlds. `device`: where vectors are sent from and stored, alike on all."""
        self.device = device
        place = (world.rank_of_all, world.size_of_all)
        # Backends by themselves, not groups: these need no world of their own. Their methods are not in torch's stubs.
        self._host: Any = dist.ProcessGroupGloo(dist.PrefixStore("link", world.everyone), *place, FOREVER)
        self._vectors: Any = self._host
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = FOREVER
            self._vectors = dist.ProcessGroupNCCL(dist.PrefixStore("vectors", world.everyone), *place, options)
        self._outbox = Outbox(at_most=IN_FLIGHT)

    def send(self, message: torch.Tensor, *, to: int, tag: int = WHOLE) -> None:
        """Send; blocks only while too many earlier messages are still on their way."""
        message = message.to("cpu").contiguous()
        self._outbox.make_room()
        self._outbox.add(Patient(self._host.send([message], to, tag), stays=True), message)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, *, source: int, tag: int = WHOLE) -> torch.Tensor:
        """The next message with `tag` of a rank, in host memory; blocks until it is there."""
        message = torch.empty(shape, dtype=dtype)
        self._host.recv([message], source, tag).wait(FOREVER)
        return message

    def send_vectors(self, message: torch.Tensor, *, to: int) -> None:
        """Send from the link's device; blocks as `send` does."""
        message = message.to(self.device).contiguous()
        self._outbox.make_room()
        self._outbox.add(self._patient(self._vectors.send([message], to, VECTORS)), message)

    def receive_vectors(self, target: torch.Tensor, *, source: int) -> Patient:
        """Have the next vectors of a rank written to `target`, contiguous, on the link's device; returns at once.

        Under NCCL call it after telling the sender what to send: the first message between two ranks waits for both.
        """
        assert target.is_contiguous()
        return self._patient(self._vectors.recv([target], source, VECTORS))

    def _patient(self, work: Any) -> Patient:
        # NCCL takes a time limit in `wait` for leave to block the host.
        return Patient(work, stays=self._vectors is self._host)

    def close(self) -> None:
        """Wait until everything sent has been received."""
        self._outbox.empty()
