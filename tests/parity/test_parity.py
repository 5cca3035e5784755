"""The harness notices what it is there to notice."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steerscale.models.layer_spec import Norm
from steerscale.testing.parity import FP32, Curve, assert_parity
from steerscale.train.gpt import GPTTask
from tests.parity.conftest import Run
from tests.parity.runs import layout

CURVE = Curve(
    losses=[5.0, 4.0],
    grad_norms=[1.0, 2.0],
    valid_loss=4.5,
    parameters={"weight": np.zeros(3, np.float32)},
    reach=0.1,
    consumed_hash="07",
    disagreements=[],
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [5.0, 4.0 * (1 + 2 * FP32.loss)]}, "^loss: "),
        ({"losses": [5.0, float("nan")]}, "^loss: "),
        ({"valid_loss": 4.5 * (1 - 2 * FP32.loss)}, "^loss: "),
        ({"grad_norms": [1.0 + 2 * FP32.grad_norm, 2.0]}, "^grad_norm: "),
        ({"parameters": {"weight": np.float32([0, -2 * FP32.parameters * CURVE.reach, 0])}}, "^parameters: "),
        ({"consumed_hash": "08"}, "different samples"),
        ({"disagreements": ["weight"]}, "different values of weight"),
    ],
)
def test_assert_parity_notices(change: dict, message: str) -> None:
    assert_parity(CURVE, CURVE)
    with pytest.raises(AssertionError, match=message):
        assert_parity(replace(CURVE, **change), CURVE)


def forget_sequence_parallel_norms(task: GPTTask) -> None:
    """Norms' gradients stay partial sums, as where `sequence_parallel` is not set on them."""
    for chunk in task.engine.unwrapped:
        for norm in chunk.modules():
            if isinstance(norm, Norm):
                for parameter in norm.parameters():
                    parameter.sequence_parallel = False  # type: ignore[attr-defined]


def bend_one_gradient(task: GPTTask) -> None:
    """One matrix in one of the layers, on one of the ranks, gets a gradient that is 1% too large."""
    (parameter,) = (p for shard, p in task.engine.shards if shard.name == "decoder.layers.2.mlp.linear_fc1.weight")
    finalize: Any = task.engine.config.finalize_model_grads_func

    def bend(*args: Any, **kwargs: Any) -> None:
        parameter.main_grad.mul_(1.01)  # type: ignore[attr-defined]
        finalize(*args, **kwargs)

    if task.context.rank == 1:
        task.engine.config.finalize_model_grads_func = bend


def keep_gradients(task: GPTTask) -> None:
    """Replicas do not reduce their gradients."""
    task.engine.config.finalize_model_grads_func = lambda *args, **kwargs: None


@pytest.mark.parametrize(
    ("prepare", "degrees", "message"),
    [
        (forget_sequence_parallel_norms, {"tensor": 2, "sequence": True}, "different values of .*layernorm.weight"),
        (bend_one_gradient, {"tensor": 2}, "^grad_norm: "),
        (keep_gradients, {"data": 2}, "^loss: "),
    ],
    ids=["norms", "one matrix", "replicas"],
)
def test_parity_notices_wrong_gradients(
    run: Run, alone: Run, prepare: Callable[[GPTTask], None], degrees: dict, message: str
) -> None:
    broken = run("llama", layout(**degrees), prepare=prepare)
    with pytest.raises(AssertionError, match=message):
        assert_parity(broken, alone("llama"))
    # Not only the comparison of ranks sees it.
    with pytest.raises(AssertionError, match=r"^(loss|grad_norm): "):
        assert_parity(replace(broken, disagreements=[]), alone("llama"))
