from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerscale.parallel.layout import ParallelConfig
from steerscale.testing.parity import Curve, train_curve
from steerscale.testing.ranks import RankPool
from steerscale.train.gpt import GPTTask
from tests.parity.runs import MODELS, layout, run_config

Run = Callable[..., Curve]


@pytest.fixture
def run(pool: RankPool, german_data: Path, tmp_path: Path) -> Run:
    """run("llama", layout(tensor=2), ...) trains on as many ranks as the layout needs."""
    count = 0

    def train(
        model: Any, parallel: ParallelConfig, *, prepare: Callable[[GPTTask], None] | None = None, **settings: Any
    ) -> Curve:
        nonlocal count
        count += 1
        model = MODELS[model] if isinstance(model, str) else model
        config = run_config(german_data, tmp_path / f"run-{count}", model, parallel, **settings)
        return pool.run(train_curve, config, prepare, ranks=config.layout().world_size)[0]

    return train


_ALONE: dict[tuple, Curve] = {}


@pytest.fixture
def alone(run: Run) -> Run:
    """The run on one process, once a session for each model and setting: what every layout is compared with."""

    def train(model: Any, **settings: Any) -> Curve:
        key = (model, *sorted(settings.items()))
        if key not in _ALONE:
            _ALONE[key] = run(model, layout(), **settings)
        return _ALONE[key]

    return train
