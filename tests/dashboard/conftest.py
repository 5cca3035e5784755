"""Run directories that the real code wrote: a short real run, and a dozen made from it."""

from pathlib import Path
from typing import Any

import pytest

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
