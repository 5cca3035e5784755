"""What of an SAE is in a checkpoint beside parameters and moments: dead-latent counters, scales, averages; any layout reads it.

Counters and the like are cut as the latents are; what is not cut, the first rank of the SAE's world writes.
"""

from collections.abc import Iterator

import torch

from steerscale.checkpoint.fragments import Fragment, FragmentReader
from steerscale.parallel.shards import Shard
from steerscale.sae.base import SparseAutoencoder

STATE, AVERAGE = "state", "average"
"""Kinds of fragments."""


def state_fragments(sae: SparseAutoencoder) -> Iterator[Fragment]:
    """This rank's part of the state beside parameters and moments."""
    at, size = sae.context.at, sae.context.layout.tensor
    for kind, shard, tensor in _tensors(sae):
        if at.data != 0 or (shard.dim is None and at.tensor != 0):
            continue
        (box,) = shard.boxes(tensor.shape, rank=at.tensor, size=size)
        yield Fragment(
            kind=kind,
            name=shard.name,
            whole_shape=shard.whole_shape(tensor.shape, size=size),
            offset=box.offset,
            shape=box.shape,
            start=0,
            data=tensor.reshape(-1),
        )


@torch.no_grad()
def load_state(sae: SparseAutoencoder, reader: FragmentReader) -> None:
    """Fill the state beside parameters and moments. Raises CheckpointError where it is not there.

    Averages begin with the first update: a checkpoint from before it holds none, and they begin then.
    """
    if sae.spec.config.ema and (AVERAGE, f"{sae.spec.name}.b_dec") in reader.names:
        sae.averages = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    at, size = sae.context.at, sae.context.layout.tensor
    for kind, shard, tensor in _tensors(sae):
        (box,) = shard.boxes(tensor.shape, rank=at.tensor, size=size)
        whole_shape = shard.whole_shape(tensor.shape, size=size)
        values = reader.read(
            kind, shard.name, offset=box.offset, shape=box.shape, start=0, stop=tensor.numel(), whole_shape=whole_shape
        )
        tensor.copy_(values.reshape(tensor.shape))
    sae.count_dead()


def _tensors(sae: SparseAutoencoder) -> Iterator[tuple[str, Shard, torch.Tensor]]:
    name = sae.spec.name
    for key, tensor in sae.latent_state.items():
        yield STATE, Shard(name=f"{name}.{key}", dim=0), tensor
    for key, tensor in sae.scalar_state.items():
        yield STATE, Shard(name=f"{name}.{key}", dim=None), tensor
    for shard, _ in sae.shards():
        key = shard.name.removeprefix(f"{name}.")
        if key in sae.averages:
            yield AVERAGE, shard, sae.averages[key]
