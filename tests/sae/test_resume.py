"""SAE runs that are killed, stopped or moved to another layout go on where they were."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.checkpoint.store import checkpoints, find_damage
from steerscale.engines.config import EngineConfig
from steerscale.metrics import read_records
from steerscale.rundir import read_status
from steerscale.sae.config import VariantConfig
from steerscale.sae.trained import read_trained
from steerscale.testing.parity import SAE
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig, TrainConfig
from steerscale.train.run import run as train_run
from steerscale.train.signals import StopRequest
from tests.sae.training import HOOK, Trained, sae_config, trained
from tests.train.kills import Killer, assert_same_run
from tests.train.runs import AtStep, Send, Workers, newest, prepare, whole_tensors

STEPS, SAVED = 24, 12
SETTINGS: dict[str, Any] = {
    "variants": [VariantConfig(architecture=name) for name in ("topk", "batch_topk", "jumprelu")],
    "dead_after": 64,
    "aux_k": 8,
    "sparsity": 0.005,
    "sparsity_warmup_steps": 8,
    "bandwidth": 0.05,
    "initial_threshold": 0.05,
    "ema": 0.9,
}
"""Three architectures on one stream; latents die and are used by AuxK, thresholds move, averages trail behind."""
TOPK, BATCH_TOPK, JUMPRELU = (f"{HOOK}@architecture={name}" for name in ("topk", "batch_topk", "jumprelu"))


def _config(
    lm: Path,
    data: Path,
    run_dir: Path,
    parallel: dict[str, Any],
    *,
    interval: int = SAVED,
    asynchronous: bool = False,
    **sections: Any,
) -> RunConfig:
    default = {
        "train": TrainConfig(steps=STEPS, eval_interval=10, eval_samples=4),
        "checkpoint": CheckpointConfig(interval=interval, keep=0, asynchronous=asynchronous),
    }
    return sae_config(lm, data, run_dir, parallel=parallel, sections={**default, **sections}, **SETTINGS)


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"data": 2}], ids=str)
def test_run_killed_again_and_again_repeats_itself_bitwise(
    parallel: dict[str, Any], pool: RankPool, lm: Path, german_data: Path, tmp_path: Path
) -> None:
    config = _config(lm, german_data, tmp_path / "killed", parallel, interval=2, asynchronous="data" in parallel)
    killer = Killer(config, seed=len(str(parallel)))
    for number in range(5):
        step = 3 * number + killer.random.randint(1, 4)
        (killer.kill_writing if number % 2 else killer.kill_at_step)(step)
    assert killer.cut_short >= 1
    assert Workers(config).join() == [0, 0]
    assert_same_run(config, pool, tmp_path)
    kinds = {(kind, name.rpartition(".")[2]) for kind, name in whole_tensors(newest(Path(config.run_dir)))}
    state = {"unused_steps", "batch_threshold", "input_scale", "output_scale", "mean"}
    assert {name for kind, name in kinds if kind == "state"} == state
    for kind in ("weight", "exp_avg", "exp_avg_sq", "average"):
        assert {name for found, name in kinds if found == kind} == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}


@pytest.mark.parametrize("ranks", [(0,), (1,)], ids=str)
def test_signal_leaves_a_whole_checkpoint(
    ranks: tuple[int, ...], pool: RankPool, lm: Path, german_data: Path, tmp_path: Path
) -> None:
    config = _config(lm, german_data, tmp_path / "stopped", {"tensor": 2}, interval=1000)
    run_dir = prepare(config)
    assert Workers(config, AtStep(7, ranks, Send(signal.SIGTERM))).join() == [0, 0]
    assert (read_status(run_dir).state, read_status(run_dir).step) == ("stopped", 7)
    (left,) = checkpoints(run_dir / "checkpoints")
    assert left.name == "step_00000007"
    assert find_damage(left) is None
    prepare(config)
    assert Workers(config).join() == [0, 0]
    assert_same_run(config, pool, tmp_path)


Run = Callable[..., tuple[Path, Trained]]


@pytest.fixture(scope="module")
def run(pool: RankPool, lm: Path, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run({"tensor": 2}) trains, once for each layout and engine, or goes on from a checkpoint."""
    done: dict[str, tuple[Path, Trained]] = {}

    def make(parallel: dict[str, Any], *, after: Path | None = None, **engine: Any) -> tuple[Path, Trained]:
        key = f"{parallel} {engine} {after}"
        if key not in done:
            directory = tmp_path_factory.mktemp("runs") / "run"
            config = _config(lm, german_data, directory, parallel, engine=EngineConfig(**engine))
            run_dir = prepare(config)
            if after is not None:
                shutil.copytree(after, run_dir / "checkpoints" / after.name)
            done[key] = run_dir, trained(pool, config)
        return done[key]

    return make


ONE: dict[str, Any] = {}


def test_settings_come_by_everything(run: Run) -> None:
    """Before the checkpoint latents have died, and thresholds moved; averages are not the weights."""
    run_dir, whole = run({"tensor": 2})
    assert max(step[f"{name}/aux_loss"] for step in whole.metrics[SAVED:] for name in (TOPK, BATCH_TOPK)) > 0
    saved = whole_tensors(run_dir / "checkpoints" / f"step_{SAVED:08d}")
    assert (saved["state", f"{TOPK}.unused_steps"] > 0).any()
    assert saved["state", f"{BATCH_TOPK}.batch_threshold"].item() > 0
    assert saved["weight", f"{JUMPRELU}.threshold"].unique().numel() > 10
    for name in (TOPK, BATCH_TOPK, JUMPRELU):
        assert not saved["average", f"{name}.W_dec"].equal(saved["weight", f"{name}.W_dec"])


@pytest.mark.parametrize(
    ("saved_on", "resumed_on", "engine"),
    [
        ({"tensor": 2}, {"data": 2}, {}),
        ({"tensor": 2}, {"tensor": 4}, {}),
        ({"tensor": 2}, ONE, {}),
        ({"tensor": 2}, {"data": 2}, {"distributed_optimizer": False}),
        ({"data": 2}, {"tensor": 2, "data": 2}, {"distributed_optimizer": False}),
        (ONE, {"tensor": 2, "data": 2}, {}),
    ],
    ids=str,
)
def test_run_goes_on_on_another_layout(
    saved_on: dict[str, Any], resumed_on: dict[str, Any], engine: dict[str, Any], run: Run
) -> None:
    run_dir, _ = run(saved_on)
    _, whole = run(ONE)
    resumed_dir, resumed = run(resumed_on, after=run_dir / "checkpoints" / f"step_{SAVED:08d}", **engine)
    records = read_records(resumed_dir, "train")
    assert [record["step"] for record in records] == list(range(SAVED + 1, STEPS + 1))
    assert resumed.consumed_hash == whole.consumed_hash
    assert resumed.active == {name: passes[SAVED:] for name, passes in whole.active.items()}
    assert resumed.losses == pytest.approx(whole.losses[SAVED:], rel=SAE.loss, abs=0)
    for name in (TOPK, BATCH_TOPK, JUMPRELU):
        key = ("state", f"{name}.unused_steps")
        assert (resumed.tensors[key] == whole.tensors[key]).all()
        for kind in ("weight", "average"):
            difference = abs(resumed.tensors[kind, f"{name}.W_dec"] - whole.tensors[kind, f"{name}.W_dec"]).max()
            assert difference <= SAE.parameters * 3e-3 * STEPS


class Stopped(StopRequest):
    """A stop that was asked for before the run began."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "SIGTERM"


def stop_filling(run_dir: Path) -> None:
    """A run that ends before its first step. For `RankPool.run`."""
    train_run(run_dir, rank=0, stop=Stopped(), threads=1)


def test_run_stopped_before_its_first_step_goes_on(
    run: Run, pool: RankPool, lm: Path, german_data: Path, tmp_path: Path
) -> None:
    """A checkpoint without averages, which begin with the first update; the SAE in it can be read as well."""
    _, whole = run(ONE)
    config = _config(lm, german_data, tmp_path / "run", ONE)
    pool.run(stop_filling, prepare(config), ranks=1)
    (checkpoint,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint.name == "step_00000000"
    assert read_trained(checkpoint, TOPK).W_dec.norm(dim=1).allclose(torch.ones(128))
    resumed = trained(pool, config)
    assert resumed.losses == whole.losses
    assert all((resumed.tensors[key] == tensor).all() for key, tensor in whole.tensors.items())


def test_distributed_optimizer_switched_off_is_bitwise_on_one_process(run: Run) -> None:
    run_dir, whole = run(ONE)
    _, resumed = run(ONE, after=run_dir / "checkpoints" / f"step_{SAVED:08d}", distributed_optimizer=False)
    assert resumed.losses == whole.losses[SAVED:]
    assert all((resumed.tensors[key] == tensor).all() for key, tensor in whole.tensors.items())
