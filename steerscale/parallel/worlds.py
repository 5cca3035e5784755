"""Several worlds in one run: groups of ranks that each have process groups, a layout and a task of their own.

Megatron-Core and much of our own code take "all ranks" for the default process group. So each world has its own default
group; what goes between worlds goes by a `link.Link`. All of them find each other by one store.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from steerscale.errors import LaunchError

POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class World:
    """The world that this process is in."""

    name: str
    rank: int
    """Within it."""
    size: int
    store: dist.Store = field(repr=False)
    """For this world's process groups."""
    everyone: dist.Store = field(repr=False)
    """Shared by all worlds."""
    rank_of_all: int
    """Among all processes: worlds come one after the other, in the order they are named."""
    size_of_all: int


@contextmanager
def join_world(
    sizes: Mapping[str, int], *, timeout_minutes: float = 10.0, started: tuple[dist.Store, int, int] | None = None
) -> Iterator[World]:
    """Find the other processes and the world of this one; at the end all leave together, so that none cuts another off.

    An error does not wait for the others: they notice the broken connection, or whoever started them ends them.

    Args:
        sizes: ranks of each world by its name.
        started: store, rank and size of all processes; None: from torchrun's variables.
    Raises:
        LaunchError: not as many processes as all worlds have ranks, or some did not come to the end in time.
    """
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, size = started or next(dist.rendezvous("env://", timeout=timeout))
    needed = sum(sizes.values())
    if size != needed:
        listed = " + ".join(f"{count} {name}" for name, count in sizes.items())
        raise LaunchError(f"{size} ranks were started, but {listed} are {needed}")
    name, first = _world_of(sizes, rank)
    yield World(
        name=name,
        rank=rank - first,
        size=sizes[name],
        store=dist.PrefixStore(f"world/{name}", store),
        everyone=dist.PrefixStore("worlds", store),
        rank_of_all=rank,
        size_of_all=size,
    )
    _leave_together(store, rank, size, time.monotonic() + timeout.total_seconds())


def _world_of(sizes: Mapping[str, int], rank: int) -> tuple[str, int]:
    """Name of the world of a rank among all, and that world's first rank."""
    first = 0
    for name, size in sizes.items():
        if rank < first + size:
            return name, first
        first += size
    raise AssertionError(f"rank {rank} of {first}")


def _leave_together(store: dist.Store, rank: int, size: int, deadline: float) -> None:
    """Wait until all have come this far. Rank 0, which may be the one that holds the store, goes last."""
    for key in ("done", "gone"):
        store.add(key, 1)
        if key == "gone" and rank != 0:
            return
        while store.add(key, 0) < size:
            if time.monotonic() > deadline:
                raise LaunchError(f"{size - store.add(key, 0)} of {size} ranks did not come to the end of the run")
            time.sleep(POLL_SECONDS)
