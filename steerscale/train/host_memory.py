"""What the C library does with memory that a step on the CPU gives back."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's names of `mallopt`'s settings."""


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for the next request; returns whether it will.

    By itself glibc gives every large tensor back to the kernel, which hands it out again page by page, cleared: the first
    matrix product to write there takes up to twice its time. A training step asks for the same sizes over and over. Not where
    glibc is not the C library, nor where somebody has given malloc settings of their own (MALLOC_*, GLIBC_TUNABLES).
    """
    theirs = [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]
    if platform.libc_ver()[0] != "glibc" or theirs:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
