"""Hook points on several pipeline stages: each SAE is the one that is trained alone in one process."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.metrics import read_records
from steerscale.sae.config import VariantConfig
from steerscale.testing.parity import SAE
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig, TrainConfig
from steerscale.train.sae import MEASURES
from tests.sae.training import ARCHITECTURES, Trained, sae_config, trained
from tests.train.kills import Killer, assert_same_run
from tests.train.runs import Workers, prepare

EARLY, LATE = "blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"
"""On the two stages of four layers."""
STEPS, SAVED = 20, 10
PP2: dict[str, Any] = {"pipeline": 2}
TP2_PP2: dict[str, Any] = {"tensor": 2, "pipeline": 2}
DP2_PP2: dict[str, Any] = {"data": 2, "pipeline": 2}
PP4: dict[str, Any] = {"pipeline": 4}
"""Here two of the stages have no SAE."""
ONE: dict[str, Any] = {}
KINDS = ["topk", "batch_topk", "jumprelu"]
SETTINGS: dict[str, Any] = {
    "variants": [VariantConfig(architecture=kind) for kind in KINDS],
    **ARCHITECTURES["topk"],
    **ARCHITECTURES["jumprelu"],
}
"""Three SAEs for each hook point."""


def _config(
    lm: Path, data: Path, run_dir: Path, parallel: dict[str, Any], hooks: list[str], *, interval: int = SAVED
) -> RunConfig:
    sections = {
        "train": TrainConfig(steps=STEPS, eval_interval=SAVED, eval_samples=6),
        "checkpoint": CheckpointConfig(interval=interval, keep=0),
    }
    config = sae_config(lm, data, run_dir, parallel=parallel, sections=sections, hooks=hooks, **SETTINGS)
    assert config.stream is not None
    # Blocks, and with them the order, are as long as the buffer has room for all hooks.
    return replace(config, stream=replace(config.stream, buffer_gib=4e-4 * len(hooks)))


Run = Callable[..., tuple[Path, Trained]]


@pytest.fixture(scope="module")
def run(pool: RankPool, lm: Path, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(PP2, [EARLY, LATE]) trains, once for each, or goes on from a checkpoint."""
    done: dict[str, tuple[Path, Trained]] = {}

    def make(parallel: dict[str, Any], hooks: list[str], *, after: Path | None = None) -> tuple[Path, Trained]:
        key = f"{parallel} {hooks} {after}"
        if key not in done:
            config = _config(lm, german_data, tmp_path_factory.mktemp("runs") / "run", parallel, hooks)
            run_dir = prepare(config)
            if after is not None:
                shutil.copytree(after, run_dir / "checkpoints" / after.name)
            done[key] = run_dir, trained(pool, config)
        return done[key]

    return make


def _series(run: Trained, key: str) -> list[float]:
    return [step[key] for step in run.metrics]


@pytest.mark.parametrize("parallel", [PP2, TP2_PP2, DP2_PP2, PP4, ONE], ids=str)
def test_each_sae_is_the_one_trained_alone(parallel: dict[str, Any], run: Run) -> None:
    _, both = run(parallel, [EARLY, LATE])
    assert len(both.active) == 2 * len(KINDS)
    for hook in (EARLY, LATE):
        _assert_same(both, run(ONE, [hook])[1])


def _assert_same(got: Trained, alone: Trained) -> None:
    """All SAEs of `alone` are in `got`."""
    assert got.consumed_hash == alone.consumed_hash
    for name, active in alone.active.items():
        assert got.active[name] == active
        for measure in ("loss", "fvu", "l0", "dead", "penalty"):
            key = f"{name}/{measure}"
            np.testing.assert_allclose(_series(got, key), _series(alone, key), rtol=SAE.loss, err_msg=key)
    for key, tensor in alone.tensors.items():
        if key[0] == "weight":
            assert np.abs(got.tensors[key] - tensor).max() <= SAE.parameters * 3e-3 * STEPS, key


@pytest.mark.parametrize("parallel", [PP2, TP2_PP2], ids=str)
def test_measurements_of_all_stages_are_recorded(parallel: dict[str, Any], run: Run) -> None:
    run_dir, both = run(parallel, [EARLY, LATE])
    names = [f"{hook}@architecture={kind}" for hook in (EARLY, LATE) for kind in KINDS]
    for step, loss in zip(both.metrics, both.losses, strict=True):
        assert step.keys() == {f"{name}/{measure}" for name in names for measure in MEASURES}
        assert loss == pytest.approx(np.mean([step[f"{name}/loss"] for name in names]))
    evaluations = read_records(run_dir, "eval")
    assert [record["step"] for record in evaluations] == [SAVED, STEPS]
    for hook in (EARLY, LATE):
        alone = read_records(run(ONE, [hook])[0], "eval")
        for got, expected in zip(evaluations, alone, strict=True):
            measured = [key for key in expected if "/" in key and not key.endswith("ce_recovered")]
            assert len(measured) == len(KINDS) * 11
            for key in measured:
                assert got[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [(PP2, ONE), (ONE, TP2_PP2), (PP2, PP4), (TP2_PP2, {"tensor": 2, "data": 2})],
    ids=str,
)
def test_run_goes_on_on_another_layout(saved_on: dict[str, Any], resumed_on: dict[str, Any], run: Run) -> None:
    hooks = [EARLY, LATE]
    run_dir, _ = run(saved_on, hooks)
    _, whole = run(ONE, hooks)
    checkpoint = run_dir / "checkpoints" / f"step_{SAVED:08d}"
    _, resumed = run(resumed_on, hooks, after=checkpoint)
    assert resumed.consumed_hash == whole.consumed_hash
    assert resumed.active == {name: passes[SAVED:] for name, passes in whole.active.items()}
    np.testing.assert_allclose(resumed.losses, whole.losses[SAVED:], rtol=SAE.loss)


@pytest.mark.parametrize("hook", [EARLY, LATE])
def test_stage_without_a_hook_point(hook: str, run: Run) -> None:
    _assert_same(run(PP2, [hook])[1], run(ONE, [hook])[1])


def test_run_killed_on_two_stages_repeats_itself_bitwise(
    pool: RankPool, lm: Path, german_data: Path, tmp_path: Path
) -> None:
    config = _config(lm, german_data, tmp_path / "killed", PP2, [EARLY, LATE], interval=2)
    killer = Killer(config, seed=3)
    killer.kill_at_step(3)
    killer.kill_writing(8)
    assert Workers(config).join() == [0, 0]
    assert_same_run(config, pool, tmp_path)
