"""Engine state in the engine-neutral form: float32 weight and AdamW moments of every whole parameter.

Three kinds of Megatron-Core optimizer hold that state differently: the distributed one owns flat ranges of parameters, the
plain ones whole local parameters, with (bf16) or without (fp32) a main copy of the weights. Here they all look alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from steerscale.checkpoint.fragments import Fragment, FragmentReader
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.shards import Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class OwnedRange:
    """The part of a local parameter whose optimizer state this rank holds."""

    start: int
    """First element of the flattened parameter."""
    stop: int
    """One past the last."""
    tensors: dict[str, torch.Tensor]
    """"weight" (float32 main weights) and the moments, each with stop - start elements."""


def owned_ranges(optimizer: Any) -> dict[torch.nn.Parameter, OwnedRange]:
    """Every parameter of which this rank holds optimizer state, by model parameter."""
    owned: dict[torch.nn.Parameter, OwnedRange] = {}
    for part in optimizer.chained_optimizers:
        for parameter, main, span in _main_parameters(part):
            state = part.optimizer.state[main]
            for name in MOMENTS:  # fused optimizers would create them at the first step, too late for a resume
                state.setdefault(name, torch.zeros_like(main, dtype=torch.float32))
            tensors = {"weight": main.data, **{name: state[name] for name in MOMENTS}}
            start, stop = span or (0, parameter.numel())
            owned[parameter] = OwnedRange(start=start, stop=stop, tensors=tensors)
    return owned


def _main_parameters(part: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, tuple[int, int] | None]]:
    """(model parameter, its float32 main parameter, its range or None for all) of one Megatron-Core optimizer."""
    if hasattr(part, "model_param_group_index_map"):  # distributed
        for parameter, (group, order) in part.model_param_group_index_map.items():
            span = part._get_model_param_range_map(parameter)["param"]
            yield parameter, part.optimizer.param_groups[group]["params"][order], (span.start, span.end)
    elif hasattr(part, "float16_groups"):  # bf16 with main weights
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups):
            for parameter, main in zip(models, mains):
                yield parameter, main, None
        for group in part.fp32_from_fp32_groups:
            for parameter in group:
                yield parameter, parameter, None
    else:  # fp32
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, None


def state_fragments(
    shards: Sequence[tuple[Shard, torch.nn.Parameter]],
    owned: Mapping[torch.nn.Parameter, OwnedRange],
    context: ParallelContext,
    *,
    distributed: bool,
) -> list[Fragment]:
    """What this rank has to write so that all ranks together write every element once.

    Args:
        owned: the optimizer state that this rank holds; `distributed`: and no other replica does.
    """
    fragments: list[Fragment] = []
    for number, (shard, parameter) in enumerate(shards):
        replica = shard.dim is None and context.at.tensor != 0
        # Replicas hold the same state unless it is distributed: they take turns, for an even load.
        anothers_turn = not distributed and number % context.layout.data != context.at.data
        if parameter in owned and not (replica or shard.duplicate or anothers_turn):
            fragments.extend(_cut(shard, parameter, owned[parameter], context))
    return fragments


def _cut(
    shard: Shard, parameter: torch.nn.Parameter, owned: OwnedRange, context: ParallelContext
) -> Iterator[Fragment]:
    size, rank = context.layout.tensor, context.at.tensor
    local = local_shape(parameter)
    for box in shard.boxes(local, rank=rank, size=size):
        low, high = max(owned.start, box.start), min(owned.stop, box.stop)
        if low >= high:
            continue
        for kind, tensor in owned.tensors.items():
            yield Fragment(
                kind=kind,
                name=shard.name,
                whole_shape=shard.whole_shape(local, size=size),
                offset=box.offset,
                shape=box.shape,
                start=low - box.start,
                data=tensor.reshape(-1)[low - owned.start : high - owned.start],
            )


@torch.no_grad()
def load_fragments(
    shards: Sequence[tuple[Shard, torch.nn.Parameter]],
    owned: Mapping[torch.nn.Parameter, OwnedRange],
    context: ParallelContext,
    reader: FragmentReader,
    *,
    whole: Callable[[torch.nn.Parameter], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Fill this rank's weights, main weights and moments from a checkpoint of any layout and any engine."""
    load_weights(shards, context, reader, whole=whole)
    for shard, parameter in shards:
        mine = owned.get(parameter)
        if mine is None:
            continue
        for kind, tensor in mine.tensors.items():
            values = _read(reader, kind, shard, parameter, context, start=mine.start, stop=mine.stop)
            tensor.copy_(values.reshape(tensor.shape))


def set_steps(optimizer: Any, steps: int) -> None:
    """Tell the parts of a Megatron-Core optimizer how many updates they have applied."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            # The fused optimizers count per group, and before their first step not at all; torch's counts per parameter.
            if not isinstance(part.optimizer, torch.optim.AdamW):
                group["step"] = steps
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(steps)


@torch.no_grad()
def load_weights(
    shards: Sequence[tuple[Shard, torch.nn.Parameter]],
    context: ParallelContext,
    reader: FragmentReader,
    *,
    whole: Callable[[torch.nn.Parameter], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Fill this rank's model parameters, without an optimizer: for sampling, evaluation and export.

    Args:
        whole: gives a context in which a parameter is there in its local shape (ZeRO-3 has but a part of it).
    """
    for shard, parameter in shards:
        shape = local_shape(parameter)
        values = _read(reader, "weight", shard, parameter, context, start=0, stop=prod(shape))
        with whole(parameter):
            parameter.copy_(values.reshape(shape))


def local_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of this rank's shard; under ZeRO-3, which empties parameters between their uses, DeepSpeed remembers it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _read(
    reader: FragmentReader,
    kind: str,
    shard: Shard,
    parameter: torch.nn.Parameter,
    context: ParallelContext,
    *,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Elements [start, stop) of the flattened local parameter."""
    pieces = []
    local = local_shape(parameter)
    whole_shape = shard.whole_shape(local, size=context.layout.tensor)
    for box in shard.boxes(local, rank=context.at.tensor, size=context.layout.tensor):
        low, high = max(start, box.start), min(stop, box.stop)
        if low < high:
            pieces.append(
                reader.read(
                    kind,
                    shard.name,
                    offset=box.offset,
                    shape=box.shape,
                    start=low - box.start,
                    stop=high - box.start,
                    whole_shape=whole_shape,
                )
            )
    return torch.cat(pieces)
