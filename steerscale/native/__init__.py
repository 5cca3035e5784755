"""The compiled CPU code: built once by the machine's own C++ compiler, loaded over ctypes.

Without a compiler everything works without it, the kernels by torch operations several times slower, byte-pair encoding in
Python; a warning says so once. Torch-free: tokenizers are trained, and kernels chosen, without the seconds its import takes.
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
from typing import Any

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread")
BUILD_TIMEOUT_S = 120

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "top_rows": [_POINTER, _INT64, _INT64, _INT64, _POINTER, _INT],
    "count_rows": [_POINTER, _INT64, _INT64, _POINTER, _INT],
    "find_rows": [_POINTER, _INT64, _INT64, _POINTER, _POINTER, _INT],
    "sum_tokens": [_POINTER] * 5 + [_INT64, _INT64, _POINTER, _INT, _INT],
    "decode_gradients": [_POINTER] * 6 + [_INT64, _INT64, _POINTER, _POINTER, _INT, _INT, _INT],
}
_ATTENTION_SIGNATURES = {
    "attention_forward": [_POINTER] * 5 + [_FLOAT] + [_POINTER] * 2 + [_INT],
    "attention_backward": [_POINTER] * 6 + [_FLOAT] + [_POINTER] * 5 + [_INT],
}
_POINTWISE_SIGNATURES = {
    "swiglu_forward": [_POINTER] + [_INT64] * 2 + [_POINTER, _INT],
    "swiglu_backward": [_POINTER] * 2 + [_INT64] * 2 + [_POINTER, _INT],
    "rms_norm_forward": [_POINTER] * 2 + [_INT64] * 2 + [_FLOAT] + [_POINTER] * 2 + [_INT],
    "rms_norm_backward": [_POINTER] * 4 + [_INT64] * 2 + [_POINTER] * 2 + [_INT],
    "rotate_heads": [_POINTER] * 9 + [_INT] * 2,
}
_BPE_SIGNATURES = {
    "bpe_train": ([_POINTER] * 4 + [_INT64] + [_POINTER] * 2 + [_INT64, _POINTER, _INT64, _INT64], _POINTER),
    "bpe_num_merges": ([_POINTER], _INT64),
    "bpe_result": ([_POINTER] * 3, None),
    "bpe_free": ([_POINTER], None),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels of `kernels.cpp`, compiled into the user's cache directory at first use; None if that cannot be done."""
    signatures = {name: (arguments, None) for name, arguments in _SIGNATURES.items()}
    return _load(SOURCE, signatures, without="CPU kernels, torch operations are used instead (several times slower)")


@functools.cache
def bpe_library() -> ctypes.CDLL | None:
    """The trainer of `bpe.cpp`, compiled and kept likewise; None if that cannot be done."""
    return _load(
        SOURCE.with_name("bpe.cpp"),
        _BPE_SIGNATURES,
        without="trainer of merges, Python is used instead (some 20 times slower)",
    )


@functools.cache
def attention_library() -> ctypes.CDLL | None:
    """The kernels of `attention.cpp`, likewise; to be loaded after torch, whose OpenMP threads they then run on."""
    return _load(
        SOURCE.with_name("attention.cpp"),
        {name: (arguments, None) for name, arguments in _ATTENTION_SIGNATURES.items()},
        flags=("-fopenmp",),
        without="attention for the CPU, torch's is used instead (a fifth to a third slower)",
    )


@functools.cache
def pointwise_library() -> ctypes.CDLL | None:
    """The kernels of `pointwise.cpp`, likewise, and as `attention_library` after torch."""
    return _load(
        SOURCE.with_name("pointwise.cpp"),
        {name: (arguments, None) for name, arguments in _POINTWISE_SIGNATURES.items()},
        flags=("-fopenmp",),
        without="norms and activation functions for the CPU, torch's operations are used instead (three times slower)",
    )


def _load(
    source: Path, signatures: dict[str, tuple[list[Any], Any]], *, without: str, flags: tuple[str, ...] = ()
) -> ctypes.CDLL | None:
    try:
        loaded = ctypes.CDLL(str(_compiled(source, (*FLAGS, *flags))))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no compiled %s: %s", without, error)
        return None
    for name, (arguments, result) in signatures.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return loaded


def _compiled(source: Path, flags: tuple[str, ...]) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (c++, g++, clang++)")
    # -march=native binds the result to this processor; a home directory may be shared by different ones.
    texts = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
    identity = [*texts, compiler, *flags, platform.machine(), _processor_flags()]
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steerscale"
    target = cache / f"{source.stem}-{name}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        built = Path(directory) / target.name
        command = [compiler, *flags, "-o", str(built), str(source)]
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
