"""A run goes on under the other engine, and bit by bit under its own."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.engines.config import EngineConfig
from steerscale.metrics import read_records
from steerscale.optim import OptimConfig
from steerscale.testing.parity import BF16, FP32
from steerscale.testing.ranks import RankPool
from steerscale.train.config import TrainConfig
from tests.checkpoint.test_reshard import MODELS, copy_checkpoint
from tests.train.kills import Killer, assert_same_run
from tests.train.runs import Workers, assert_same_tensors, newest, prepare, run_config, train

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

STEPS, SAVED = 10, 5
Run = Callable[..., Path]
MEGATRON: dict[str, Any] = {"name": "megatron"}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    """DeepSpeed at a ZeRO stage."""
    return {"name": "deepspeed", "zero_stage": stage, **settings}


@pytest.fixture(scope="module")
def run(pool: RankPool, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(engine, {"tensor": 2}) trains, once for each engine and layout, or goes on from a checkpoint."""
    done: dict[str, Path] = {}

    def make(engine: dict[str, Any], parallel: dict[str, Any], *, after: Path | None = None) -> Path:
        key = f"{engine} {parallel} {after}"
        if key not in done:
            config = run_config(
                german_data,
                tmp_path_factory.mktemp("runs") / "run",
                parallel=parallel,
                model=MODELS["llama"],
                engine=EngineConfig(**engine),
                train=TrainConfig(steps=STEPS, eval_interval=0, eval_samples=2),
                optim=OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=8, eps=1e-6),
                checkpoint=CheckpointConfig(interval=SAVED, keep=0),
            )
            run_dir = prepare(config)
            ranks = config.layout().world_size
            if after is not None:
                shutil.copytree(after, run_dir / "checkpoints" / after.name)
                pool.run(copy_checkpoint, run_dir, after, ranks=ranks)
            pool.run(train, run_dir, ranks=ranks)
            done[key] = run_dir
        return done[key]

    return make


def middle(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / f"step_{SAVED:08d}"


def assert_goes_on(resumed: Path, alone: Path, *, loss: float) -> None:
    got, expected = read_records(resumed, "train"), read_records(alone, "train")[SAVED:]
    assert [record["step"] for record in got] == list(range(SAVED + 1, STEPS + 1))
    for one, other in zip(got, expected):
        assert one["consumed_hash"] == other["consumed_hash"]
        assert one["loss"] == pytest.approx(other["loss"], rel=loss, abs=0)


@pytest.mark.parametrize(
    ("saved_by", "saved_on", "resumed_by", "resumed_on"),
    [
        (zero(1), {"pipeline": 2}, MEGATRON, {"data": 2}),
        (MEGATRON, {"tensor": 2}, zero(3), {"data": 2}),
        (zero(3), {"data": 2}, MEGATRON, {}),
        (zero(2), {"data": 2}, zero(0), {"tensor": 2, "pipeline": 2}),
    ],
    ids=lambda value: "-".join(f"{key}{v}" for key, v in value.items()),
)
def test_run_goes_on_under_another_engine(
    run: Run, saved_by: dict[str, Any], saved_on: dict[str, Any], resumed_by: dict[str, Any], resumed_on: dict[str, Any]
) -> None:
    checkpoint = middle(run(saved_by, saved_on))
    resumed = run(resumed_by, resumed_on, after=checkpoint)
    assert_same_tensors(resumed / "copy" / checkpoint.name, checkpoint)  # loaded and written again
    assert_goes_on(resumed, run(MEGATRON, {}), loss=FP32.loss)


@pytest.mark.parametrize(
    ("engine", "parallel"),
    [
        (zero(1, precision="bf16"), {"pipeline": 2}),
        (zero(2, precision="bf16", offload_optimizer=True), {"data": 2}),
        (zero(1, precision="fp16"), {"data": 2}),
    ],
    ids=["bf16 ZeRO-1 PP2", "bf16 ZeRO-2 offload", "fp16 ZeRO-1"],
)
def test_low_precision_is_close_to_float32_and_resumes_bitwise(
    run: Run, engine: dict[str, Any], parallel: dict[str, Any]
) -> None:
    whole = run(engine, parallel)
    for one, other in zip(read_records(whole, "train"), read_records(run(MEGATRON, {}), "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=BF16.loss)
    resumed = run(engine, parallel, after=middle(whole))
    assert_goes_on(resumed, whole, loss=0.0)
    assert_same_tensors(newest(resumed), newest(whole))


def test_run_killed_again_and_again_repeats_itself_bitwise(pool: RankPool, german_data: Path, tmp_path: Path) -> None:
    config = run_config(
        german_data,
        tmp_path / "killed",
        parallel={"pipeline": 2},
        engine=EngineConfig(**zero(1)),
        train=TrainConfig(steps=16, eval_interval=8, eval_samples=6),
        checkpoint=CheckpointConfig(interval=3, keep=2),
    )
    killer = Killer(config, seed=7)
    killer.kill_at_step(5)
    killer.kill_writing(9)
    assert Workers(config).join() == [0, 0]
    assert_same_run(config, pool, tmp_path)
    assert (tmp_path / "killed" / "ds_config.json").is_file()
