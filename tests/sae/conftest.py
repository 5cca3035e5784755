from pathlib import Path

import pytest

from steerscale.testing.ranks import RankPool
from tests.sae.training import language_model
from tests.train.runs import train


@pytest.fixture(scope="session")
def lm(pool: RankPool, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a barely trained language model."""
    run_dir = language_model(german_data, tmp_path_factory.mktemp("lm") / "run")
    pool.run(train, run_dir, ranks=1)
    return run_dir
