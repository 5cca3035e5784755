"""Whole parameters, one at a time, on the first rank of each replica."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from steerscale.parallel.context import ParallelContext
from steerscale.parallel.shards import Shard


@torch.no_grad()
def whole_parameters(
    shards: Sequence[tuple[Shard, torch.nn.Parameter]], context: ParallelContext, names: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Each of `names` with its whole parameter on the CPU of stage 0's tensor rank 0, and with None on every other rank.

    Every rank has to go through to the end. For each parameter: an all-gather of the shards over the owning stage's tensor
    group, then one message of the whole to stage 0. No rank holds more than one whole parameter, and its shards.
    """
    owned = {shard.name: (shard, parameter) for shard, parameter in shards if not shard.duplicate}
    size = context.layout.tensor
    shapes = {name: (shard.whole_shape(p.shape, size=size), p.dtype) for name, (shard, p) in owned.items()}
    stages: list[dict] = [{}] * context.layout.pipeline
    dist.all_gather_object(stages, shapes, group=context.groups.pp)
    for name in names:
        owner = next(stage for stage, parameters in enumerate(stages) if name in parameters)
        whole = _merge(*owned[name], context) if owner == context.at.pipeline else None
        if context.at.tensor != 0:
            whole = None
        elif owner != 0:
            shape, dtype = stages[owner][name]
            whole = _send_to_first_stage(whole, owner, shape, dtype, context)
        yield name, None if whole is None else whole.cpu()


def _send_to_first_stage(
    whole: torch.Tensor | None, owner: int, shape: tuple[int, ...], dtype: torch.dtype, context: ParallelContext
) -> torch.Tensor | None:
    ranks = dist.get_process_group_ranks(context.groups.pp)
    if whole is not None:
        dist.send(whole, dst=ranks[0], group=context.groups.pp)
        return None
    if context.at.pipeline != 0:
        return None
    received = torch.empty(shape, dtype=dtype, device=context.device)
    dist.recv(received, src=ranks[owner], group=context.groups.pp)
    return received


def _merge(shard: Shard, parameter: torch.nn.Parameter, context: ParallelContext) -> torch.Tensor:
    local = parameter.detach().contiguous()
    if shard.dim is None:
        return local
    parts = [torch.empty_like(local) for _ in range(context.layout.tensor)]
    dist.all_gather(parts, local, group=context.groups.tp)
    return shard.merge(parts).contiguous()
