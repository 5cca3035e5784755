"""Which part of which whole GPT parameter does this rank hold?

One answer for everything that crosses layouts: layout-independent initial weights, checkpoints, import and export of other
formats, and gathering parameters to compare runs. See `parallel.shards` for what the whole form is.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from steerscale.models.config import ModelConfig
from steerscale.models.gpt import output_std
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.shards import Shard, seed_of


class Chunk(Protocol):
    """A part of a GPT: a pipeline chunk of it, or a single layer."""

    model: ModelConfig
    first_layer: int
    """Number of the first transformer layer in it."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Named as in a GPT, with layers counted from `first_layer`."""
        ...


def named_shards(chunks: Iterable[Chunk]) -> Iterator[tuple[Shard, torch.nn.Parameter]]:
    """Every parameter of this rank's model chunks with its place in the whole model.

    The head's copy of a tied embedding (pipelines only) comes under the embedding's name: it is the same parameter.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield _shard(chunk, name, parameter), parameter


def _shard(chunk: Chunk, name: str, parameter: torch.nn.Parameter) -> Shard:
    name = re.sub(r"^decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{int(m[1]) + chunk.first_layer}", name)
    duplicate = chunk.model.tie_embeddings and name == "output_layer.weight"
    if duplicate:
        name = "embedding.word_embeddings.weight"
    split = getattr(parameter, "tensor_model_parallel", False)
    gated = chunk.model.gated and ".linear_fc1." in name
    dim = parameter.partition_dim if split else None  # type: ignore[attr-defined]
    return Shard(name=name, dim=dim, halves=2 if gated else 1, duplicate=duplicate)


@torch.no_grad()
def initialize_parameters(chunks: Sequence[Chunk], context: ParallelContext, *, seed: int) -> None:
    """Draw initial weights that depend on the seed and each parameter's global name alone, never on the layout.

    Normal with std `init_std`, scaled by 1/sqrt(2 L) for projections into the residual stream (GPT-2); norms at one, biases
    at zero. Each whole matrix is drawn on the device and cut, so it must fit once beside the shard.
    """
    size, rank = context.layout.tensor, context.at.tensor
    for shard, parameter in named_shards(chunks):
        if parameter.ndim == 1:
            parameter.fill_(1.0 if shard.name.endswith("norm.weight") else 0.0)
            continue
        whole_shape = shard.whole_shape(parameter.shape, size=size)
        whole = torch.empty(whole_shape, dtype=torch.float32, device=parameter.device)
        if whole.device.type != "meta":
            generator = torch.Generator(device=whole.device).manual_seed(seed_of(seed, shard.name))
            whole.normal_(0.0, _std(shard.name, chunks[0].model), generator=generator)
        parameter.copy_(shard.take(whole, rank=rank, size=size))


def _std(name: str, model: ModelConfig) -> float:
    into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return output_std(model) if into_residual else model.init_std


def gather_parameters(chunks: Sequence[Chunk], context: ParallelContext) -> dict[str, torch.Tensor]:
    """The whole model's parameters by global name, on the CPU of every rank. For tests and exports of small models.

    Two all-gathers of objects: shards over the tensor group, whole parameters over the pipeline group.
    """
    parts = [(shard, parameter.detach().cpu()) for shard, parameter in named_shards(chunks)]
    over_tensor: list = [None] * context.layout.tensor
    dist.all_gather_object(over_tensor, [tensor for _, tensor in parts], group=context.groups.tp)
    wholes = {shard.name: shard.merge([rank[i] for rank in over_tensor]) for i, (shard, _) in enumerate(parts)}
    over_pipeline: list = [None] * context.layout.pipeline
    dist.all_gather_object(over_pipeline, wholes, group=context.groups.pp)
    merged: dict[str, torch.Tensor] = {}
    for stage in over_pipeline:
        merged.update(stage)
    return dict(sorted(merged.items()))
