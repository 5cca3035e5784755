"""DeepSpeed computes what the Megatron engine computes in one process, whatever ZeRO stage and layout.

A part of the combinations runs by default. All of them, with both models and their largest differences printed (three minutes
on two cores; docs/engines.md has the results):

    STEERSCALE_PARITY=all python -m pytest tests/engines/test_deepspeed_parity.py
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerscale.engines.config import EngineConfig
from steerscale.testing.parity import Curve, assert_parity, deviation, train_curve
from steerscale.testing.ranks import RankPool
from tests.parity.runs import MODELS, STEPS, layout, run_config

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

Run = Callable[..., Curve]
Case = tuple[str, int, dict[str, int], int]
"""Model, ZeRO stage, degrees, steps."""

ALL = os.environ.get("STEERSCALE_PARITY") == "all"
SOME: list[Case] = [
    ("gpt2", 0, {"data": 2}, STEPS),
    ("gpt2", 2, {"data": 2}, STEPS),
    ("llama", 0, {"tensor": 2, "pipeline": 2}, STEPS),
    ("llama", 1, {"tensor": 2, "pipeline": 2, "data": 2}, 8),
    ("llama", 3, {"tensor": 2}, STEPS),
]
EACH: list[Case] = [
    (model, stage, {"tensor": tensor, "pipeline": pipeline, "data": 2}, STEPS)
    for model in MODELS
    for stage in range(4)
    for pipeline in ((1, 2) if stage < 2 else (1,))
    for tensor in (1, 2)
]


@pytest.fixture(scope="module")
def run(pool: RankPool, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run("llama", {"tensor": 2}, name="deepspeed", ...) trains, once for each model, layout, engine and length."""
    done: dict[str, Curve] = {}

    def make(model: str, degrees: dict[str, int], *, steps: int, **engine: Any) -> Curve:
        key = f"{model} {degrees} {steps} {engine}"
        if key not in done:
            config = run_config(
                german_data,
                tmp_path_factory.mktemp("runs") / "run",
                MODELS[model],
                layout(**degrees),
                engine=EngineConfig(**engine),
                documents=model == "llama",
                steps=steps,
            )
            done[key] = pool.run(train_curve, config, ranks=config.layout().world_size)[0]
        return done[key]

    return make


def _id(case: Case) -> str:
    model, stage, degrees, steps = case
    return f"{model}-ZeRO{stage}-{'x'.join(f'{key}{degree}' for key, degree in degrees.items())}-{steps}"


@pytest.mark.parametrize("case", EACH if ALL else SOME, ids=_id)
def test_parity_zero(run: Run, capsys: pytest.CaptureFixture[str], case: Case) -> None:
    model, stage, degrees, steps = case
    got = run(model, degrees, steps=steps, name="deepspeed", zero_stage=stage)
    expected = run(model, {}, steps=steps)
    if ALL:
        found = deviation(got, expected)
        with capsys.disabled():
            sys.stdout.write(f"\nloss {found.loss:.1e}, gradient norm {found.grad_norm:.1e}\n")
    assert_parity(got, expected)
