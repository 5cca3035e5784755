"""What benchmarks share: the environment that each prints, a figure beside the limit it is compared with. Torch-free."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment(*packages: str) -> dict[str, Any]:
    """Machine, cores, Python, torch and the versions of `packages`; what is not installed is None."""
    return {
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "omp_threads": os.environ.get("OMP_NUM_THREADS"),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", *packages)},
    }


def print_environment(*packages: str) -> dict[str, Any]:
    """Print it as one line; returns it, for the JSON at the end."""
    found = environment(*packages)
    show(found)
    return found


def show(found: Mapping[str, Any]) -> None:
    """Print an environment; `load` is that of the last minute, before the benchmark's own."""
    print(
        "environment: " + ", ".join(f"{key} {value}" for key, value in found.items() if value is not None), flush=True
    )


def against(value: float | None, limit: float, *, at_most: bool = False) -> str:
    """How a figure stands to its limit, for people: "1.234 (at least 1.1: met)"."""
    if value is None:
        return "unknown"
    met = value <= limit if at_most else value >= limit
    return f"{value:.3g} ({'at most' if at_most else 'at least'} {limit:g}: {'met' if met else 'NOT met'})"


def gpu_environment() -> dict[str, Any]:
    """The first CUDA device, its memory and driver; without one, that there is none."""
    import torch

    if not torch.cuda.is_available():
        return {"device": "CPU"}
    properties = torch.cuda.get_device_properties(
        0
    )  # does not take memory on the device, as asking for what is free would
    return {
        "device": properties.name,
        "device_gib": round(properties.total_memory / 2**30, 2),
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str | None:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
