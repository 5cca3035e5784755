"""Memory that is freed is used again: counted in page faults, in processes of their own."""

import json
import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import json, resource
import torch
from steerscale.train.host_memory import keep_freed_memory

kept = keep_freed_memory()
for _ in range(40):  # malloc keeps a few pieces between blocks at first
    torch.empty(1 << 22).fill_(1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.empty(1 << 22).fill_(1.0)  # 16 MiB
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""
PAGES = 10 * (16 << 20) // os.sysconf("SC_PAGE_SIZE")


def counted(**environment: str) -> tuple[bool, int]:
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, check=True, env={**others, **environment}
    )
    kept, faults = json.loads(done.stdout)
    return kept, faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone")
def test_large_tensors_reuse_pages_unless_malloc_was_set_otherwise() -> None:
    kept, faults = counted()
    assert kept
    assert faults < PAGES / 100
    kept, faults = counted(MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept
    assert faults > 0.9 * PAGES
