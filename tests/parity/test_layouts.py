"""Every layout repeats the run of one process: losses, gradient norms, parameters, samples."""

import pytest

from steerscale.engines.config import EngineConfig
from steerscale.parallel.layout import ParallelConfig
from steerscale.testing.parity import Curve, assert_parity
from tests.parity.conftest import Run
from tests.parity.runs import MODELS, OPTIM, layout

LAYOUTS = {
    "GAS8": layout(micro_batch_size=1),
    "TP2": layout(tensor=2),
    "TP2+SP": layout(tensor=2, sequence=True),
    "PP2": layout(pipeline=2),
    "PP2x2": layout(pipeline=2, virtual_pipeline=2),
    "PP4": layout(pipeline=4),
    "DP2": layout(data=2),
    "TP2xPP2": layout(tensor=2, pipeline=2),
    "TP2+SPxPP2xDP2": layout(tensor=2, sequence=True, pipeline=2, data=2),
}


@pytest.mark.parametrize("model", MODELS)
def test_one_process_learns(alone: Run, model: str) -> None:
    curve: Curve = alone(model)
    # Agreement of runs that do nothing would prove nothing: this one learns, and some of its gradients are clipped.
    assert curve.losses[-1] < curve.losses[0] - 0.5
    assert min(curve.grad_norms) < OPTIM.clip < max(curve.grad_norms)


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_parity_gpt(run: Run, alone: Run, model: str, parallel: ParallelConfig) -> None:
    assert_parity(run(model, parallel), alone(model))


@pytest.mark.parametrize("model", MODELS)
def test_parity_replicated_optimizer_dp2(run: Run, alone: Run, model: str) -> None:
    assert_parity(run(model, layout(data=2), engine=EngineConfig(distributed_optimizer=False)), alone(model))


@pytest.mark.parametrize(
    ("model", "recompute", "parallel"),
    [
        ("llama", "selective", layout()),
        ("gpt2", "pointwise", layout()),
        ("gpt2", "full", layout()),
        ("llama", "full", layout(tensor=2, sequence=True)),
        ("gpt2", "selective", layout(tensor=2, sequence=True)),
        ("llama", "pointwise", layout(tensor=2, sequence=True)),
    ],
    ids=["selective", "pointwise", "full", "full-TP2+SP", "selective-TP2+SP", "pointwise-TP2+SP"],
)
def test_parity_recompute(run: Run, alone: Run, model: str, recompute: str, parallel: ParallelConfig) -> None:
    engine = EngineConfig(recompute=recompute)  # type: ignore[arg-type]
    assert_parity(run(model, parallel, engine=engine), alone(model))


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        # Replicas count different numbers of tokens: a mean of their means would be another loss.
        ("llama", layout(data=2, micro_batch_size=1)),
        ("llama", layout(tensor=2, sequence=True)),
        ("gpt2", layout(pipeline=2, virtual_pipeline=2)),
    ],
    ids=["DP2", "TP2+SP", "PP2x2"],
)
def test_parity_documents(run: Run, alone: Run, model: str, parallel: ParallelConfig) -> None:
    expected = alone(model, documents=True)
    assert_parity(run(model, parallel, documents=True), expected)
    assert abs(expected.losses[0] - alone(model).losses[0]) > 1e-4  # resets and masks do something
