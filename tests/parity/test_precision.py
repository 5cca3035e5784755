"""bfloat16 and dropout, where runs of different layouts are not equal by nature."""

from dataclasses import replace

import pytest

from steerscale.engines.config import EngineConfig
from steerscale.parallel.layout import ParallelConfig
from steerscale.testing.parity import BF16, FP32, Curve, assert_parity, deviation
from tests.parity.conftest import Run
from tests.parity.runs import MODELS, layout

BF16_ENGINE = EngineConfig(precision="bf16")
DROPPING = replace(MODELS["llama"], dropout=0.1, attention_dropout=0.1)
STEPS = 3


def test_parity_bf16_with_fp32(alone: Run) -> None:
    assert_parity(alone("llama", engine=BF16_ENGINE), alone("llama"), BF16)
    # It really ran in lower precision.
    assert deviation(alone("llama", engine=BF16_ENGINE), alone("llama")).loss > FP32.loss


def test_parity_bf16_tp2_pp2(run: Run, alone: Run) -> None:
    assert_parity(
        run("llama", layout(tensor=2, pipeline=2), engine=BF16_ENGINE), alone("llama", engine=BF16_ENGINE), BF16
    )


@pytest.mark.parametrize(
    "parallel",
    [layout(tensor=2), layout(tensor=2, sequence=True, pipeline=2)],
    ids=["TP2", "TP2+SPxPP2"],
)
def test_dropout_is_reproducible(run: Run, alone: Run, parallel: ParallelConfig) -> None:
    first, second = (run(DROPPING, parallel, steps=STEPS) for _ in range(2))
    assert (first.losses, first.grad_norms) == (second.losses, second.grad_norms)
    assert not first.disagreements
    dropless: Curve = alone("llama", steps=STEPS)
    assert abs(first.losses[0] - dropless.losses[0]) > 1e-4
    assert first.valid_loss == pytest.approx(dropless.valid_loss, rel=0.01)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_parity_dropout_recompute(run: Run, alone: Run, recompute: str) -> None:
    # Recomputed activations have to drop what the first pass dropped.
    engine = EngineConfig(recompute=recompute)  # type: ignore[arg-type]
    assert_parity(run(DROPPING, layout(), engine=engine, steps=STEPS), alone(DROPPING, steps=STEPS))
