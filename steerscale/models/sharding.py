"""Which part of which whole parameter does this rank hold?

One answer for everything that crosses layouts: layout-independent initial weights, import and export of other formats, and
gathering parameters to compare runs. The *whole* form of a parameter is that of a single process: its global name (layers
numbered over the whole model) and its full shape. Tensor parallelism cuts along one dimension; a gated MLP's first matrix is
cut in both of its halves, [gate; up], so that a rank holds [gate_r; up_r].
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from steerscale.models.config import ModelConfig
from steerscale.models.gpt import GPT, output_std
from steerscale.parallel.context import ParallelContext


@dataclass(frozen=True, kw_only=True)
class Shard:
    """How one local parameter relates to the whole one."""

    name: str
    """Global name."""
    dim: int | None
    """Dimension that tensor parallelism cuts; None: every tensor rank holds the whole."""
    halves: int
    """1, or 2 for a gated MLP's [gate; up]."""

    def take(self, whole: torch.Tensor, *, rank: int, size: int) -> torch.Tensor:
        """The part of tensor rank `rank` of `size` (a view where possible)."""
        if self.dim is None or size == 1:
            return whole
        parts = [half.chunk(size, dim=self.dim)[rank] for half in whole.chunk(self.halves, dim=self.dim)]
        return parts[0] if self.halves == 1 else torch.cat(parts, dim=self.dim)

    def merge(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The whole from the parts of all tensor ranks, in rank order."""
        if self.dim is None or len(parts) == 1:
            return parts[0]
        halves = [part.chunk(self.halves, dim=self.dim) for part in parts]
        return torch.cat([half[index] for index in range(self.halves) for half in halves], dim=self.dim)


def named_shards(chunks: Iterable[GPT]) -> Iterator[tuple[Shard, torch.nn.Parameter]]:
    """Every parameter of this rank's model chunks with its place in the whole model.

    The head's copy of a tied embedding (pipelines only) comes under the embedding's name: it is the same parameter.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield _shard(chunk, name, parameter), parameter


def _shard(chunk: GPT, name: str, parameter: torch.nn.Parameter) -> Shard:
    name = re.sub(r"^decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{int(m[1]) + chunk.first_layer}", name)
    if chunk.model.tie_embeddings and name == "output_layer.weight":
        name = "embedding.word_embeddings.weight"
    split = getattr(parameter, "tensor_model_parallel", False)
    gated = chunk.model.gated and ".linear_fc1." in name
    return Shard(name=name, dim=parameter.partition_dim if split else None, halves=2 if gated else 1)  # type: ignore[attr-defined]


@torch.no_grad()
def initialize_parameters(chunks: Iterable[GPT], context: ParallelContext, *, seed: int) -> None:
    """Draw initial weights that depend on the seed and each parameter's global name alone, never on the layout.

    Normal with std `init_std`, scaled by 1/sqrt(2 L) for projections into the residual stream (GPT-2); norms at one, biases
    at zero. Each whole matrix is drawn on the device and cut, so it must fit once beside the shard.
    """
    size, rank = context.layout.tensor, context.at.tensor
    for shard, parameter in named_shards(chunks):
        if parameter.ndim == 1:
            parameter.fill_(1.0 if shard.name.endswith("norm.weight") else 0.0)
            continue
        shape = list(parameter.shape)
        if shard.dim is not None:
            shape[shard.dim] *= size
        whole = torch.empty(shape, dtype=torch.float32, device=parameter.device)
        if whole.device.type != "meta":
            generator = torch.Generator(device=whole.device).manual_seed(_seed(seed, shard.name))
            whole.normal_(0.0, _std(shard.name, next(iter(chunks)).model), generator=generator)
        parameter.copy_(shard.take(whole, rank=rank, size=size))


def _std(name: str, model: ModelConfig) -> float:
    into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return output_std(model) if into_residual else model.init_std


def _seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # generators take 63 bits


def gather_parameters(chunks: Iterable[GPT], context: ParallelContext) -> dict[str, torch.Tensor]:
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
