"""Run directories that the real code wrote: a short real run, and a dozen made from it."""

from pathlib import Path
from typing import Any

import pytest

from launch.train import main as train_main
from steerscale.metrics import read_records
from steerscale.rundir import create_run_dir
from steerscale.testing.example_runs import write_example_runs
from steerscale.testing.ranks import RankPool
from tests.train.runs import run_config, train


@pytest.fixture(scope="session")
def real_run(pool: RankPool, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps of a GPT on two replicas."""
    run_dir = tmp_path_factory.mktemp("real") / "run"
    config = run_config(german_data, run_dir, parallel={"data": 2})
    create_run_dir(run_dir, config, command=["test"])
    pool.run(train, run_dir, ranks=2)
    return run_dir


@pytest.fixture(scope="session")
def seed(real_run: Path) -> list[dict[str, Any]]:
    """The real run's records."""
    return read_records(real_run)


@pytest.fixture(scope="session")
def runs(seed: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of 24 runs in 12 layouts or more."""
    directory = tmp_path_factory.mktemp("runs")
    write_example_runs(directory, seed, count=24, reports=60)
    return directory


TINY = ["model.num_layers=1", "model.d_model=16", "model.d_ff=16", "model.num_heads=2", "model.seq_len=16"]


@pytest.fixture(scope="session")
def engines(german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over both engines, run by the launcher."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    directory = tmp_path_factory.mktemp("sweep") / "engines"
    argv = [
        "-m",
        "engine=megatron,deepspeed",
        *TINY,
        f"data.path={german_data}",
        f"run_dir={directory}",
        "train.steps=4",
    ]
    assert train_main([*argv, "metrics.interval=1", "metrics.warmup_steps=1", "metrics.tensorboard=false"]) == 0
    return directory
