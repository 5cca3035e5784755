"""Process groups and devices of one rank: everything that differs between one process and a thousand.

`ParallelContext` is made once per process by `initialize` and passed explicitly. Megatron-Core keeps its own global copy of
the groups (`parallel_state`); models and engines of ours read the context only.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from steerscale.errors import LaunchError
from steerscale.parallel.cpu import cuda_is_available, redirect_cuda, settle_vector_math
from steerscale.parallel.layout import Coordinates, ParallelLayout
from steerscale.parallel.megatron import ProcessGroupCollection, parallel_state, quiet
from steerscale.parallel.worlds import World


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """Where this process stands and whom it can talk to."""

    layout: ParallelLayout
    rank: int
    device: torch.device
    groups: ProcessGroupCollection = field(repr=False)
    """Megatron-Core's ProcessGroupCollection: .tp .pp .dp .mp .embd ... of this rank."""
    world: dist.ProcessGroup | None = field(default=None, repr=False)
    """All ranks of `layout`; None: every process."""

    @property
    def at(self) -> Coordinates:
        """(pipeline, data, tensor) coordinates of this rank."""
        return self.layout.coordinates(self.rank)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank's stage holds the embedding."""
        return self.at.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's stage holds the output head."""
        return self.at.pipeline == self.layout.pipeline - 1

    @property
    def counts_once(self) -> bool:
        """True on exactly one rank of each replica: the last stage's first tensor rank, where the loss is counted."""
        return self.is_last_stage and self.at.tensor == 0


def stage_context(context: ParallelContext) -> ParallelContext:
    """This rank's pipeline stage as a world of its own: the same tensor and data groups, one stage, ranks counted within it.

    What lives on one stage only, an SAE on a layer's activations, trains there without the other stages.
    """
    layout = context.layout
    if layout.pipeline == 1:
        return context
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.pp = groups.embd = groups.pos_embd = groups.cp  # of context parallelism there is none: this rank alone
    groups.mp, groups.intra_dist_opt = groups.tp, groups.tp_dp_cp
    alone = replace(layout, pipeline=1, virtual_pipeline=1)
    return replace(context, layout=alone, rank=context.rank % alone.world_size, groups=groups, world=groups.tp_dp_cp)


@contextlib.contextmanager
def initialize(
    layout: ParallelLayout,
    *,
    backend: str | None = None,
    rank: int | None = None,
    device: str | None = None,
    timeout_minutes: float = 10.0,
    world: World | None = None,
) -> Iterator[ParallelContext]:
    """Join the process group (if not yet joined), build all parallel groups, and tear down on exit what was built here.

    Rank, world size and address come from torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
    unless `rank` is given; a single process needs none of them.

    Args:
        layout: its world size must equal the number of ranks.
        backend: "nccl", "gloo" or "fake"; None: nccl where CUDA is available, else gloo.
        rank: global rank; None takes it from the environment.
        device: "meta" builds shards without memory (dry runs; needs a CPU-only process); None: the rank's own device.
        world: the processes that share the layout, where they are only some of those that were started.
    Raises:
        LaunchError: the number of ranks is not the layout's.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        target = _select_device(device)
        if target.type == "cuda":
            torch.cuda.set_device(target)
        else:
            settle_vector_math()
            stack.enter_context(redirect_cuda(to=target.type))
        if not dist.is_initialized():
            chosen, timeout = backend or _default_backend(target), timedelta(minutes=timeout_minutes)
            if world is not None:
                own = {"store": world.store, "rank": world.rank, "world_size": world.size}
                dist.init_process_group(chosen, timeout=timeout, **own)
            else:
                _join(layout, backend=chosen, rank=rank, timeout=timeout)
            stack.callback(dist.destroy_process_group)
        if dist.get_world_size() != layout.world_size:
            raise LaunchError(
                f"{dist.get_world_size()} ranks were started, but the layout {layout} needs {layout.world_size}"
            )
        yield stack.enter_context(_build_groups(layout, target))


@contextlib.contextmanager
def _build_groups(layout: ParallelLayout, device: torch.device) -> Iterator[ParallelContext]:
    virtual = layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        # Megatron-Core's own checkpoints need these; ours do not, and each costs every rank three threads.
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        yield ParallelContext(layout=layout, rank=dist.get_rank(), device=device, groups=groups)
    finally:
        parallel_state.destroy_model_parallel()


def _select_device(device: str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if not cuda_is_available():
        return torch.device("cpu")
    # The modulo covers both launch styles: every GPU visible to every rank of a node, and one GPU visible per rank.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _default_backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _join(layout: ParallelLayout, *, backend: str, rank: int | None, timeout: timedelta) -> None:
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=rank or 0, world_size=layout.world_size, store=FakeStore())
    elif rank is None and "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # one process talks to nobody: no port is opened
        dist.init_process_group(backend, rank=0, world_size=1, store=store, timeout=timeout)
