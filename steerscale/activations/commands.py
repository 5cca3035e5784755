"""What trainers ask of producers.

A command goes from the first rank of a trainers' replica to the leader of a producers' replica (its first rank), which
passes it on to its mates. Shapes: B sequences, S sequence.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from steerscale.parallel.link import COMMANDS, Link

LOOK_SECONDS = 0.2
"""Between looks at whether a stop was asked for."""


class Kind(IntEnum):
    """What is to be done."""

    VECTORS = 0
    """A forward pass; the vectors at `numbers` of it into the trainers' buffer."""
    ACTIVATIONS = 1
    """A forward pass; everything it finds."""
    LOSSES = 2
    """The whole model's losses; `numbers` are the labels and then which hooks to ask the trainers at."""
    CLOSE = 3
    """Nothing any more."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One thing to do."""

    kind: Kind
    client: int
    """The trainers' replica that asks."""
    tokens_BS: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    """Int64, in host memory."""
    numbers: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Int64; what they say depends on the kind."""

    def send(self, link: Link, ranks: Sequence[int]) -> None:
        """To each of these ranks: five integers, then all tokens and numbers."""
        header = torch.tensor([self.kind, self.client, *self.tokens_BS.shape, len(self.numbers)])
        body = torch.cat([self.tokens_BS.reshape(-1), self.numbers])
        for rank in ranks:
            link.send(header, to=rank, tag=COMMANDS)
            if len(body):
                link.send(body, to=rank, tag=COMMANDS)

    @classmethod
    def receive(cls, link: Link, source: int) -> "Command":
        """The next one from a rank; blocks until it is there."""
        kind, client, size, length, count = link.receive((5,), torch.int64, source=source, tag=COMMANDS).tolist()
        if not size * length + count:
            return cls(kind=Kind(kind), client=client)
        body = link.receive((size * length + count,), torch.int64, source=source, tag=COMMANDS)
        tokens, numbers = body.split([size * length, count])
        return cls(kind=Kind(kind), client=client, tokens_BS=tokens.view(size, length), numbers=numbers)


class Inbox:
    """Commands as they come, from several ranks at once, each listened to by a thread.

    A leader takes what a trainer is waiting for (anything but vectors) before what is made ahead; its mates take what it
    passes on, in that order.
    """

    def __init__(self, link: Link, sources: Sequence[int], *, leads: bool) -> None:
        self._leads = leads
        self._arrived: queue.SimpleQueue[Command | Exception] = queue.SimpleQueue()
        self._vectors: deque[Command] = deque()
        self._open = len(sources)
        self._threads = [
            threading.Thread(target=self._listen, args=(link, source), name=f"commands of {source}", daemon=True)
            for source in sources
        ]
        for thread in self._threads:
            thread.start()

    def next(self, look: Callable[[], None]) -> Command:
        """The command to carry out now; waits for one, and calls `look` meanwhile. Raises what broke a connection.

        CLOSE comes when every source has said it, as one may still wait for what it asked for when another is done.
        """
        while True:
            look()
            try:
                item = self._arrived.get(timeout=0 if self._vectors else LOOK_SECONDS)
            except queue.Empty:
                if self._vectors:
                    return self._vectors.popleft()
                continue
            if isinstance(item, Exception):
                raise item
            if item.kind is Kind.CLOSE:
                self._open -= 1
                self._vectors = deque(asked for asked in self._vectors if asked.client != item.client)
                if self._open:
                    continue
            if not self._leads or item.kind is not Kind.VECTORS:
                return item
            self._vectors.append(item)

    def close(self) -> None:
        """Wait for the last word of each source."""
        for thread in self._threads:
            thread.join()

    def _listen(self, link: Link, source: int) -> None:
        try:
            while True:
                command = Command.receive(link, source)
                self._arrived.put(command)
                if command.kind is Kind.CLOSE:
                    return
        except Exception as error:  # noqa: BLE001 - it is raised where the commands are read
            self._arrived.put(error)
