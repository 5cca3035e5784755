"""Before the first step: are all devices, links and libraries what the run counts on? A few seconds on GPUs.

Each rank multiplies matrices and exchanges a buffer in each of its groups; every rank learns every result. Ranks and groups
far below the median are named by host and device: in a step all wait for the slowest, and nothing there says who it was.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from steerscale.accelerators import find_accelerators
from steerscale.errors import LaunchError
from steerscale.parallel.context import ParallelContext
from steerscale.planning.memory import estimate_memory
from steerscale.rundir import write_text
from steerscale.train.config import RunConfig
from steerscale.train.preflight_report import RankResult, disagreements, find_slow, short_of_memory, summary

logger = logging.getLogger(__name__)

PREFLIGHT = "preflight.json"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured on a kind of device."""

    dtype: torch.dtype
    """Of matrices and buffers."""
    width: int
    """Of the square matrices: 2 width^3 FLOPs a product."""
    buffer_bytes: int
    """What each rank contributes to an exchange."""
    repeats: int
    """Timed; the median counts, and one more comes before."""
    slow: float
    """Share of the median below which a rank or a group is called slow."""


EFFORTS = {
    "cuda": Effort(dtype=torch.bfloat16, width=8192, buffer_bytes=64 * 2**20, repeats=16, slow=0.85),
    # Ranks on a CPU share its cores with others: only what is far off means anything.
    "cpu": Effort(dtype=torch.float32, width=192, buffer_bytes=2**18, repeats=3, slow=0.5),
}


def is_due(config: RunConfig, context: ParallelContext) -> bool:
    """Whether the run begins with a preflight: as launcher.preflight says, else on GPUs and on several nodes."""
    if config.launcher.preflight is not None:
        return config.launcher.preflight
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", context.layout.world_size))
    return context.device.type == "cuda" or on_node < context.layout.world_size


def run_preflight(config: RunConfig, context: ParallelContext, run_dir: Path) -> None:
    """Measure, warn of what is slow or does not agree, and leave preflight.json. All ranks together.

    Raises LaunchError on every rank if something is below launcher.preflight_least of the median.
    """
    begin = time.perf_counter()
    effort = EFFORTS[context.device.type]
    own = measure(context, effort)
    # A few hundred bytes from each rank to each.
    results: list[Any] = [None] * context.layout.world_size
    dist.all_gather_object(results, own)
    slow = find_slow(results, below=effort.slow)
    warnings = [
        *(f"{entry.what} reaches {entry.share:.0%} of the median: every step waits for it" for entry in slow),
        *short_of_memory(results, planned_gib=_planned_gib(config), on_cpu=context.device.type == "cpu"),
        *disagreements(results),
    ]
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(context.device)  # the run's own peak is what metrics are to show
    if context.rank == 0:
        seconds = time.perf_counter() - begin
        _write(run_dir, config, results, effort=effort, warnings=warnings, seconds=seconds)
        for line in summary(results, seconds=seconds):
            logger.info("%s", line)
        for warning in warnings:
            logger.warning("preflight: %s", warning)
    least = config.launcher.preflight_least
    too_slow = [] if least is None else find_slow(results, below=least)
    if too_slow:
        dist.barrier()  # the first rank that ends ends the others: preflight.json is to be there by then
        raise LaunchError(
            f"preflight: {'; '.join(f'{entry.what} reaches {entry.share:.0%} of the median' for entry in too_slow)}, less than "
            f"launcher.preflight_least={least}: leave the node out, lower it, or set it to null for a warning only"
        )


def measure(context: ParallelContext, effort: Effort) -> RankResult:
    """This rank's figures. All ranks together: an exchange in each group, those of a kind at the same time."""
    device = context.device
    free, total = _memory(device)
    name = f"{torch.cuda.get_device_name(device)} {device.index}" if device.type == "cuda" else "CPU"
    kinds = {"tp": context.groups.tp, "dp": context.groups.dp, "pp": context.groups.pp, "world": dist.group.WORLD}
    used = {kind: group for kind, group in kinds.items() if group is not None and dist.get_world_size(group) > 1}
    gemm = _gemm_tflops(device, effort)
    return RankResult(
        rank=context.rank,
        host=socket.gethostname(),
        device=name,
        gemm_tflops=gemm,
        gb_per_second={kind: _bandwidth(kind, group, device, effort) for kind, group in used.items()},
        groups={kind: dist.get_process_group_ranks(group) for kind, group in used.items()},
        memory_free_gib=free / GIB,
        memory_total_gib=total / GIB,
        versions=_versions(device),
    )


def _gemm_tflops(device: torch.device, effort: Effort) -> float:
    # Not ones: they draw less power and flatter a GPU. A generator of its own leaves the run's alone.
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(effort.width, effort.width, dtype=effort.dtype, device=device, generator=generator)
    right, out = left.clone(), torch.empty_like(left)
    seconds = _median_seconds(lambda: torch.mm(left, right, out=out), device, effort)
    return 2 * effort.width**3 / seconds / 1e12


def _bandwidth(kind: str, group: dist.ProcessGroup, device: torch.device, effort: Effort) -> float:
    """Bus bandwidth in 1e9 bytes/s, as NCCL's own tests define it: what a link carries, however large the group.

    Pipeline stages send to the next and receive from the previous one, all at once: `buffer_bytes` each way. Other groups
    all-reduce, which moves `2 (n-1)/n` times the buffer over each link.
    """
    buffer = torch.ones(effort.buffer_bytes // effort.dtype.itemsize, dtype=effort.dtype, device=device)
    size = dist.get_world_size(group)
    if kind == "pp":
        received, own = torch.empty_like(buffer), dist.get_rank(group)
        after, before = (dist.get_global_rank(group, (own + step) % size) for step in (1, -1))

        def exchange() -> None:
            sends = dist.P2POp(dist.isend, buffer, after, group)
            receives = dist.P2POp(dist.irecv, received, before, group)
            for work in dist.batch_isend_irecv([sends, receives]):
                work.wait()

        return effort.buffer_bytes / _median_seconds(exchange, device, effort) / 1e9

    def reduce() -> None:
        dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=group)  # a maximum of ones stays one

    return 2 * (size - 1) / size * effort.buffer_bytes / _median_seconds(reduce, device, effort) / 1e9


def _median_seconds(action: Callable[[], object], device: torch.device, effort: Effort) -> float:
    """Median over the repeats; the first call, which sets up libraries and connections, is not timed."""
    times = []
    for _ in range(effort.repeats + 1):
        begin = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def _memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the device, on a CPU of the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return sizes["MemAvailable"], sizes["MemTotal"]


def _planned_gib(config: RunConfig) -> float | None:
    """Memory of the fullest rank by the plan; None for SAEs, of which the planner knows nothing."""
    if config.sae is not None:
        return None
    return estimate_memory(config.model, config.layout(), engine=config.engine).total_gib


def _versions(device: torch.device) -> dict[str, str]:
    versions = {"torch": torch.__version__, "megatron-core": metadata.version("megatron-core")}
    if device.type == "cuda":
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = ".".join(map(str, nccl.version()))
    return versions


def _write(
    run_dir: Path,
    config: RunConfig,
    results: Sequence[RankResult],
    *,
    effort: Effort,
    warnings: Sequence[str],
    seconds: float,
) -> None:
    content = {
        "time": round(time.time(), 3),
        "seconds": round(seconds, 3),
        "layout": str(config.layout()),
        "gemm": {"width": effort.width, "dtype": str(effort.dtype).removeprefix("torch.")},
        "buffer_bytes": effort.buffer_bytes,
        "planned_gib": _planned_gib(config),
        "fused_kernels": {kernel.name: kernel.note for kernel in find_accelerators()},
        "warnings": list(warnings),
        "ranks": [asdict(result) for result in results],
    }
    try:
        write_text(run_dir / PREFLIGHT, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        logger.warning("%s was not written: %s", run_dir / PREFLIGHT, error)
