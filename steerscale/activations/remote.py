"""The trainers' side of a language model that lives on ranks of its own.

Shapes: B sequences, S sequence, d width of a hook's activation.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist

from steerscale.activations.buffer import ShuffleBuffer
from steerscale.activations.commands import Command, Kind
from steerscale.activations.facts import DTYPES, SourceFacts
from steerscale.activations.passes import Arrival, Pass, Stopwatch
from steerscale.activations.placement import Placement
from steerscale.models.hooks import HookFunction
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.link import Link, Patient

STOP = "stop"
"""Under this key a producer tells the trainers that it was asked to stop."""


class RemoteSource:
    """An `ActivationSource` whose model is elsewhere. All trainers own all hooks."""

    def __init__(self, link: Link, placement: Placement, context: ParallelContext, store: dist.Store) -> None:
        """Waits until the producers have loaded the model. `store` is that of all worlds."""
        self.link, self.placement, self.context, self._store = link, placement, context, store
        facts = SourceFacts.receive(link, placement.producer_rank(0, 0, 0))
        self.stages, self.in_order = facts.stages, tuple(facts.stages)
        self.widths, self.owned, self.dtype = facts.widths, frozenset(facts.widths), DTYPES[facts.dtype]
        self.seq_len, self.special_ids = facts.seq_len, frozenset(facts.special_ids)
        self.tokenizer_hash, self.vocab_size, self.identity = facts.tokenizer_hash, facts.vocab_size, facts.identity
        self._producers = placement.producers_of(context.at.data)

    def run(self, batches: Iterable[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """See `ActivationSource.run`."""
        producer = self._producers[0]
        for tokens_BS in batches:
            self._ask(producer, Command(kind=Kind.ACTIVATIONS, client=self.context.at.data, tokens_BS=tokens_BS.cpu()))
            yield {hook: self._whole(hook, producer, tokens_BS.shape) for hook in self.in_order}

    def losses(
        self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, functions: Mapping[str, HookFunction]
    ) -> torch.Tensor | None:
        """See `ActivationSource.losses`; the functions are called here. None but on the first tensor rank."""
        producer = self._producers[0]
        asked = torch.tensor(
            [number for number, hook in enumerate(self.in_order) if hook in functions], dtype=torch.int64
        )
        numbers = torch.cat([labels_BS.flatten().cpu(), asked])
        kind, client = Kind.LOSSES, self.context.at.data
        self._ask(producer, Command(kind=kind, client=client, tokens_BS=tokens_BS.cpu(), numbers=numbers))
        for hook in self.in_order:
            if hook in functions:
                x_BSd = self._whole(hook, producer, tokens_BS.shape)
                replacement = functions[hook](x_BSd)
                self._answer(hook, producer, x_BSd if replacement is None else replacement)
        if self.context.at.tensor:
            return None
        last = self.placement.producer_rank(producer, self.placement.producers.pipeline - 1, 0)
        return self.link.receive(tuple(tokens_BS.shape), torch.float32, source=last).to(self.context.device)

    def begin(self, one: Pass, targets: Mapping[str, torch.Tensor]) -> list[Patient]:
        """Have this rank's columns of a pass's kept vectors written to `targets`, by hook; returns at once."""
        producer = self.placement.producer_of(one.lane)
        tokens_BS, kept = torch.from_numpy(one.tokens_BS), torch.from_numpy(one.kept)
        self._ask(producer, Command(kind=Kind.VECTORS, client=self.context.at.data, tokens_BS=tokens_BS, numbers=kept))
        if not len(kept):
            return []
        return [self.link.receive_vectors(targets[hook], source=self._sender(hook, producer)) for hook in self.in_order]

    def stop_asked(self) -> str | None:
        """The signal by which a producer was asked to stop, if one was; known to the first rank only."""
        return self._store.get(STOP).decode() if self.context.rank == 0 and self._store.check([STOP]) else None

    def close(self) -> None:
        """Let the producers go; passes that were asked for and have not begun are not run any more."""
        # A connection that is broken by now was reported where it was missed.
        with contextlib.suppress(RuntimeError):
            for producer in self._producers:
                self._ask(producer, Command(kind=Kind.CLOSE, client=self.context.at.data))
            self.link.close()

    def _ask(self, producer: int, command: Command) -> None:
        """Tell the leader of a producers' replica; one rank speaks for this replica."""
        if self.context.at.tensor == 0:
            command.send(self.link, [self.placement.producer_rank(producer, 0, 0)])

    def _sender(self, hook: str, producer: int) -> int:
        tensor = self.placement.tensor_sender(self.context.at.tensor)
        return self.placement.producer_rank(producer, self.stages[hook], tensor)

    def _whole(self, hook: str, producer: int, shape: torch.Size) -> torch.Tensor:
        """A hook's activation [B, S, d] on this rank's device: B x S x d elements to each trainer."""
        shape_BSd = (*shape, self.widths[hook])
        received = self.link.receive(shape_BSd, self.dtype, source=self._sender(hook, producer))
        return received.to(self.context.device)

    def _answer(self, hook: str, producer: int, x_BSd: torch.Tensor) -> None:
        """Give back what the model shall go on with: B x S x d elements to each of the stage's ranks, over all trainers."""
        step = self.placement.trainers.tensor
        for tensor in range(self.context.at.tensor, self.placement.producers.tensor, step):
            rank = self.placement.producer_rank(producer, self.stages[hook], tensor)
            self.link.send(x_BSd.to(self.dtype), to=rank)


class RemotePasses:
    """`Passes` that producers run. They are asked for as soon as the buffer has room for what comes of them."""

    ahead = True

    def __init__(self, source: RemoteSource, buffer: ShuffleBuffer, stopwatch: Stopwatch) -> None:
        self._source, self._buffer, self._time = source, buffer, stopwatch
        self._coming: deque[Arrival] = deque()

    def begin(self, one: Pass) -> Arrival | None:
        """See `Passes.begin`."""
        targets = {hook: self._buffer.rows(hook, one.row, len(one.kept)) for hook in self._source.widths}
        arrival = partial(self._wait, self._source.begin(one, targets))
        self._coming.append(arrival)
        return arrival

    def keep_up(self, left: int) -> None:
        """See `Passes.keep_up`: they come in the order they were begun."""
        while len(self._coming) > left:
            self._coming.popleft()()

    def _wait(self, works: list[Patient]) -> None:
        with self._time("lm"):
            while works:
                works.pop().wait()
