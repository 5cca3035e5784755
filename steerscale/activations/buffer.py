"""The shuffle buffer: two halves a lane, one consumed while the other is filled, cut over the tensor group along the width.

Shapes: B vectors, d width of a hook's activation, P tensor ranks. Each rank stores columns [r w, (r+1) w) with
w = ceil(d / P); a read gathers whole rows.
"""

import socket
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from steerscale.activations.order import GIB, HALVES
from steerscale.errors import ConfigError
from steerscale.parallel.context import ParallelContext


class ShuffleBuffer:
    """Vectors by (half, lane, slot) for each hook of this rank's stage."""

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        lanes: int,
        slots: int,
        dtype: torch.dtype,
        on_host: bool,
        context: ParallelContext,
    ) -> None:
        """Allocate for `lanes` lanes of this replica with `slots` vectors in each half. A collective: memory is checked first.

        Raises ConfigError, on all ranks alike, if it does not fit into what is free.
        """
        self._widths, self._lanes, self._slots = dict(widths), lanes, slots
        self._context = context
        self._on_host = on_host and context.device.type == "cuda"
        device = torch.device("cpu") if self._on_host else context.device
        rows = HALVES * lanes * slots
        needed = sum(rows * self._local_width(d) for d in widths.values()) * dtype.itemsize
        check_memory(needed, device)
        self._storage = {
            hook: torch.empty(rows, self._local_width(d), dtype=dtype, device=device, pin_memory=self._on_host)
            for hook, d in widths.items()
        }

    def first_row(self, block: int, lane: int) -> int:
        """Storage row of slot 0 of a block of a lane of this replica; blocks take turns in the halves."""
        return (block % HALVES * self._lanes + lane) * self._slots

    def wait(self, written: torch.cuda.Event) -> None:
        """Let reads from now on come behind `written`, an event after writes on another CUDA stream."""
        if self._on_host:
            written.synchronize()
        else:
            torch.cuda.current_stream().wait_event(written)

    def write(self, hook: str, row: int, x_Bd: torch.Tensor, chosen: torch.Tensor) -> None:
        """Store x_Bd[chosen] (int64 indices, on its device) from storage row `row` on."""
        first = self._context.at.tensor * self._local_width(x_Bd.shape[1])
        part = x_Bd[:, first : first + self._local_width(x_Bd.shape[1])]
        target = self._storage[hook][row : row + len(chosen), : part.shape[1]]
        target.copy_(part.index_select(0, chosen), non_blocking=self._on_host)

    def rows(self, hook: str, row: int, count: int) -> torch.Tensor:
        """`count` storage rows from `row` on, for others to write: [count, w]; of the last rank's columns not all may count."""
        return self._storage[hook][row : row + count]

    def read(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Whole vectors [B, d] of these storage rows for each hook, on the rank's device, the same on every tensor rank.

        With P > 1 an all-gather of B x d elements a hook over the tensor group.
        """
        index = torch.from_numpy(rows)
        if not self._on_host:
            index = index.to(self._context.device, non_blocking=True)
        return {hook: self._gather(self._select(hook, index), d) for hook, d in self._widths.items()}

    def _select(self, hook: str, index: torch.Tensor) -> torch.Tensor:
        storage = self._storage[hook]
        if not self._on_host:
            return storage.index_select(0, index)
        # Page-locked, so that the copy to the device can run beside computation.
        chosen = torch.empty(len(index), storage.shape[1], dtype=storage.dtype, pin_memory=True)
        torch.index_select(storage, 0, index, out=chosen)
        return chosen.to(self._context.device, non_blocking=True)

    def _gather(self, local: torch.Tensor, d: int) -> torch.Tensor:
        size = self._context.layout.tensor
        if size == 1:
            return local
        parts = [torch.empty_like(local) for _ in range(size)]
        dist.all_gather(parts, local, group=self._context.groups.tp)
        return torch.cat(parts, dim=1)[:, :d]

    def _local_width(self, d: int) -> int:
        return columns_of_rank(d, self._context.layout.tensor)


def columns_of_rank(d: int, ranks: int) -> int:
    """Columns of vectors of width d that each of some tensor ranks stores; the last one may fill fewer."""
    return -(-d // ranks)


def check_memory(needed: int, device: torch.device) -> None:
    """Raise ConfigError on all ranks if what any of them needs is not free. Ranks of one host share its memory.

    A collective: one small object a rank.
    """
    where, free = f"{socket.gethostname()}, {device}", free_host_memory()
    if device.type == "cuda":
        # By its own number: where each rank sees one GPU only, all of them are called cuda:0.
        where, free = f"{where} {torch.cuda.get_device_properties(device).uuid}", torch.cuda.mem_get_info(device)[0]
    reports: list = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (where, needed, free))
    wanted: dict[str, int] = {}
    for place, bytes_, _ in reports:
        wanted[place] = wanted.get(place, 0) + bytes_
    for place, _, available in reports:
        if available is not None and wanted[place] > available:
            raise ConfigError(
                f"the shuffle buffer needs {wanted[place] / GIB:.2f} GiB on {place}, where {available / GIB:.2f} GiB are free: "
                "lower stream.buffer_gib, or change stream.buffer_device or stream.buffer_dtype"
            )


def free_host_memory() -> int | None:
    """Bytes that processes can still get on this host, within the limits of their control group; None: unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    if limit == "max" or free is None:
        return free
    # Cached files that nobody uses count as used, but are given up when memory is asked for.
    return min(free, max(int(limit) - used + int(stat.get("inactive_file", 0)), 0))
