"""One rank in the process of whoever asked for it."""

import gc
from pathlib import Path

import pytest

from steerscale.train.worker import run_alone


def test_run_in_this_process_leaves_nothing_out_of_garbage_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "1")  # the run sets them: put back afterwards
    assert run_alone(tmp_path, threads=1) == 2  # there is no config.yaml, which shows after the imports
    assert gc.get_freeze_count() == 0
