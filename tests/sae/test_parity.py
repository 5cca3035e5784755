"""Every layout trains the same SAE as one process, architecture by architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steerscale.testing.parity import SAE
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig
from tests.sae.training import ARCHITECTURES, Trained, sae_config, trained

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP4": {"tensor": 4},
    "DP2": {"data": 2},
    "TP2 DP2": {"tensor": 2, "data": 2},
}


@pytest.fixture(scope="module")
def alone(
    pool: RankPool, lm: Path, german_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trained]:
    """The run of one process, once for each architecture."""
    done: dict[str, Trained] = {}

    def get(architecture: str, **more: Any) -> Trained:
        key = f"{architecture} {more}"
        if key not in done:
            settings = {"architecture": architecture, **ARCHITECTURES[architecture], **more}
            done[key] = trained(pool, sae_config(lm, german_data, tmp_path_factory.mktemp("alone") / "run", **settings))
        return done[key]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layouts(
    architecture: str,
    layout: str,
    pool: RankPool,
    lm: Path,
    german_data: Path,
    tmp_path: Path,
    alone: Callable[..., Trained],
) -> None:
    settings = {"architecture": architecture, **ARCHITECTURES[architecture]}
    config = sae_config(lm, german_data, tmp_path / "run", parallel=LAYOUTS[layout], **settings)
    _assert_equal(trained(pool, config), alone(architecture), config)


def _assert_equal(got: Trained, expected: Trained, config: RunConfig) -> None:
    assert got.consumed_hash == expected.consumed_hash
    assert [len(passes) for passes in got.active.values()] == [config.train.steps]
    assert got.active == expected.active
    np.testing.assert_allclose(got.losses, expected.losses, rtol=SAE.loss)
    np.testing.assert_allclose(got.grad_norms, expected.grad_norms, rtol=SAE.grad_norm)
    assert got.tensors.keys() == expected.tensors.keys()
    reach = config.optim.lr * config.train.steps
    for (kind, name), tensor in expected.tensors.items():
        if kind == "weight":
            np.testing.assert_allclose(
                got.tensors[kind, name], tensor, atol=SAE.parameters * reach, rtol=0, err_msg=name
            )
        elif kind == "state" and name.endswith("unused_steps"):
            np.testing.assert_array_equal(got.tensors[kind, name], tensor, err_msg=name)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_the_settings_come_by_auxk(architecture: str, alone: Callable[..., Trained]) -> None:
    metrics = alone(architecture).metrics
    assert max(value for step in metrics for key, value in step.items() if key.endswith("/aux_loss")) > 0
    assert max(value for step in metrics for key, value in step.items() if key.endswith("/dead")) > 0.05


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_learns(architecture: str, alone: Callable[..., Trained]) -> None:
    run = alone(architecture)
    (fvu,) = [key for key in run.metrics[0] if key.endswith("/fvu")]
    assert run.metrics[-1][fvu] < 0.8 * run.metrics[0][fvu]


def test_exactly_k(alone: Callable[..., Trained]) -> None:
    (topk,), (batch_topk,) = (alone(name).active.values() for name in ("topk", "batch_topk"))
    for step in topk:
        rows = [row for row, _ in step]
        assert max(np.bincount(rows, minlength=64)) <= 4
    # Over the whole batch, whatever single vectors get.
    assert all(len(step) <= 4 * 64 for step in batch_topk)
    assert max(len(step) for step in batch_topk) == 4 * 64
