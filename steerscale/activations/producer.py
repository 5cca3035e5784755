"""The producers' side: a language model that does what trainers ask of it, until they are done.

Shapes: B sequences, S sequence, d width of a hook's activation, V vectors that are kept.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from steerscale.activations.buffer import columns_of_rank
from steerscale.activations.commands import Command, Inbox, Kind
from steerscale.activations.facts import SourceFacts
from steerscale.activations.placement import Placement
from steerscale.activations.remote import STOP
from steerscale.activations.source import ActivationSource
from steerscale.models.hooks import HookFunction
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.link import Link


class Producer:
    """One rank of the language model."""

    def __init__(
        self,
        source: ActivationSource,
        link: Link,
        placement: Placement,
        context: ParallelContext,
        *,
        store: dist.Store,
        dtype: torch.dtype,
    ) -> None:
        """A collective of all producers. `dtype` is the buffer's; `store` that of all worlds."""
        self._source, self._link, self._placement, self._context = source, link, placement, context
        self._store, self._dtype = store, dtype
        self._at = context.at
        leader, *mates = placement.ranks_of_producer(self._at.data)
        leads = self._at.pipeline == self._at.tensor == 0
        clients = placement.clients_of(self._at.data)
        self._mates = mates if leads else []
        sources = [placement.trainer_rank(client, 0) for client in clients] if leads else [leader]
        facts = SourceFacts.of(source, context)
        if context.rank == 0:
            facts.send(link, range(placement.trainers.world_size))
        self._inbox = Inbox(link, sources, leads=leads)

    def serve(self, stop: Callable[[], str | None]) -> None:
        """Do what comes, until the trainers are done. `stop`: the signal by which this rank was asked to stop, if any;
        the trainers are told and decide.
        """
        told = False

        def look() -> None:
            nonlocal told
            if not told and (name := stop()) is not None:
                self._store.set(STOP, name)
                told = True

        while True:
            command = self._inbox.next(look)
            command.send(self._link, self._mates)
            if command.kind is Kind.CLOSE:
                break
            self._carry_out(command)
        self._inbox.close()
        self._source.close()
        self._link.close()

    def _carry_out(self, command: Command) -> None:
        tokens_BS = command.tokens_BS.to(self._context.device)
        if command.kind is Kind.LOSSES:
            self._losses(command, tokens_BS)
            return
        (activations,) = self._source.run([tokens_BS])
        for hook in self._source.in_order:
            if hook not in activations:
                continue
            if command.kind is Kind.ACTIVATIONS:
                self._send_whole(command.client, activations[hook])
            else:
                self._send_vectors(command, activations[hook].flatten(0, 1))

    def _send_vectors(self, command: Command, x_Vd: torch.Tensor) -> None:
        """To each trainer the columns it stores: V x d elements over all of them."""
        if not len(command.numbers):
            return
        width = columns_of_rank(x_Vd.shape[1], self._placement.trainers.tensor)
        kept_Vd = x_Vd.index_select(0, command.numbers.to(x_Vd.device)).to(self._dtype)
        for tensor in self._placement.tensor_receivers(self._at.tensor):
            part = kept_Vd[:, tensor * width : (tensor + 1) * width]
            if part.shape[1] < width:
                part = torch.nn.functional.pad(part, (0, width - part.shape[1]))
            self._link.send_vectors(part, to=self._placement.trainer_rank(command.client, tensor))

    def _send_whole(self, client: int, x_BSd: torch.Tensor) -> None:
        for tensor in self._placement.tensor_receivers(self._at.tensor):
            self._link.send(x_BSd, to=self._placement.trainer_rank(client, tensor))

    def _losses(self, command: Command, tokens_BS: torch.Tensor) -> None:
        labels, hooks = command.numbers.split([tokens_BS.numel(), len(command.numbers) - tokens_BS.numel()])
        functions: dict[str, HookFunction] = {
            self._source.in_order[number]: partial(self._ask, command.client) for number in hooks.tolist()
        }
        losses_BS = self._source.losses(tokens_BS, labels.view_as(tokens_BS).to(tokens_BS.device), functions)
        if losses_BS is not None and self._at.tensor == 0:
            self._link.send(losses_BS.float(), to=self._placement.trainer_rank(command.client, 0))

    def _ask(self, client: int, x_BSd: torch.Tensor) -> torch.Tensor:
        """What the trainers' function makes of an activation; see `RemoteSource.losses`."""
        self._send_whole(client, x_BSd)
        sender = self._placement.trainer_rank(client, self._at.tensor % self._placement.trainers.tensor)
        return self._link.receive(tuple(x_BSd.shape), x_BSd.dtype, source=sender).to(x_BSd.device)
