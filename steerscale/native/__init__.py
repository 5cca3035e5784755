"""The compiled CPU kernels: built once by the machine's own C++ compiler, loaded over ctypes.

Without a compiler everything works by torch operations, several times slower; a warning says so once.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread")
BUILD_TIMEOUT_S = 120

_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "top_rows": [_POINTER, _INT64, _INT64, _INT64, _POINTER, _INT],
    "count_rows": [_POINTER, _INT64, _INT64, _POINTER, _INT],
    "find_rows": [_POINTER, _INT64, _INT64, _POINTER, _POINTER, _INT],
    "sum_tokens": [_POINTER] * 5 + [_INT64, _INT64, _POINTER, _INT, _INT],
    "decode_gradients": [_POINTER] * 6 + [_INT64, _INT64, _POINTER, _POINTER, _INT, _INT, _INT],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels of `kernels.cpp`, compiled into the user's cache directory at first use; None if that cannot be done."""
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no compiled CPU kernels, torch operations are used instead (several times slower): %s", error)
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def usable(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """The kernels if they can work on these tensors: float32 on the CPU."""
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        return library()
    return None


def _compiled() -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (c++, g++, clang++)")
    # -march=native binds the result to this processor; a home directory may be shared by different ones.
    identity = [SOURCE.read_text(), compiler, *FLAGS, platform.machine(), _processor_flags()]
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steerscale"
    target = cache / f"kernels-{name}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        built = Path(directory) / "kernels.so"
        command = [compiler, *FLAGS, "-o", str(built), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
        if done.returncode:
            raise OSError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        built.rename(target)  # several ranks may build at once: each leaves a whole file
    return target


def _processor_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
