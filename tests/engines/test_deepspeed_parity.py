"""DeepSpeed computes what the Megatron engine computes in one process, whatever ZeRO stage and layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerscale.engines.config import EngineConfig
from steerscale.testing.parity import Curve, assert_parity, train_curve
from steerscale.testing.ranks import RankPool
from tests.parity.runs import MODELS, layout, run_config

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

Run = Callable[..., Curve]


@pytest.fixture(scope="module")
def run(pool: RankPool, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run("llama", {"tensor": 2}, name="deepspeed", ...) trains, once for each model, layout and engine."""
    done: dict[str, Curve] = {}

    def make(model: str, degrees: dict[str, int], *, documents: bool = False, **engine: Any) -> Curve:
        key = f"{model} {degrees} {documents} {engine}"
        if key not in done:
            config = run_config(
                german_data,
                tmp_path_factory.mktemp("runs") / "run",
                MODELS[model],
                layout(**degrees),
                engine=EngineConfig(**engine),
                documents=documents,
            )
            done[key] = pool.run(train_curve, config, ranks=config.layout().world_size)[0]
        return done[key]

    return make


@pytest.mark.parametrize(
    ("model", "stage", "degrees"),
    [
        ("gpt2", 0, {"data": 2}),
        ("gpt2", 1, {"pipeline": 2}),
        ("gpt2", 2, {"data": 2}),
        ("llama", 0, {"tensor": 2, "pipeline": 2}),
        ("llama", 3, {"tensor": 2}),
    ],
    ids=lambda value: "x".join(f"{key}{degree}" for key, degree in value.items()) if isinstance(value, dict) else None,
)
def test_parity_zero(run: Run, model: str, stage: int, degrees: dict[str, int]) -> None:
    documents = model == "llama"
    got = run(model, degrees, documents=documents, name="deepspeed", zero_stage=stage)
    assert_parity(got, run(model, {}, documents=documents))
