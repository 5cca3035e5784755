"""A checkpoint of one layout goes on on any other: same samples, same state, same losses."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.checkpoint.store import CheckpointStore, load_state
from steerscale.config import from_mapping
from steerscale.engines.config import EngineConfig
from steerscale.metrics import read_records
from steerscale.models.config import ModelConfig
from steerscale.optim import OptimConfig
from steerscale.parallel.context import initialize
from steerscale.rundir import read_config
from steerscale.testing.parity import BF16, FP32
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig, TrainConfig
from steerscale.train.gpt import build_gpt_task
from tests.train.runs import assert_same_tensors, newest, prepare, run_config, train

STEPS, SAVED = 10, 5
LLAMA = ModelConfig(
    num_layers=4,
    d_model=32,
    num_heads=4,
    d_ff=96,
    seq_len=32,
    vocab_size=1000,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=True,
    init_std=0.08,  # as for parity: a smooth path, on which rounding errors stay small
)
GPT2 = ModelConfig(
    num_layers=4, d_model=32, num_heads=4, seq_len=32, vocab_size=1000, tie_embeddings=False, init_std=0.08
)
MODELS = {"llama": LLAMA, "gpt2": GPT2}

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(pool: RankPool, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run("llama", {"tensor": 2}) trains, once for each model, layout and engine, or goes on from a checkpoint."""
    done: dict[str, Path] = {}

    def make(model: str, parallel: dict[str, Any], *, after: Path | None = None, **engine: Any) -> Path:
        key = f"{model} {parallel} {engine} {after}"
        if key not in done:
            config = run_config(
                german_data,
                tmp_path_factory.mktemp("runs") / "run",
                parallel=parallel,
                model=MODELS[model],
                engine=EngineConfig(**engine),
                train=TrainConfig(steps=STEPS, eval_interval=0, eval_samples=2),
                optim=OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=8, eps=1e-6),
                checkpoint=CheckpointConfig(interval=SAVED, keep=0),
            )
            run_dir = prepare(config)
            if after is not None:
                shutil.copytree(after, run_dir / "checkpoints" / after.name)
                pool.run(copy_checkpoint, run_dir, after, ranks=config.layout().world_size)
            pool.run(train, run_dir, ranks=config.layout().world_size)
            done[key] = run_dir
        return done[key]

    return make


def copy_checkpoint(run_dir: Path, checkpoint: Path) -> None:
    """Load a checkpoint into the run's engine and write it again at once, to run_dir/copy."""
    config = from_mapping(RunConfig, read_config(run_dir))
    with initialize(config.layout()) as context:
        task = build_gpt_task(config, context)
        state, reader = load_state(checkpoint)
        task.engine.load(reader, optimizer_steps=state["progress"]["applied_steps"])
        store = CheckpointStore(run_dir / "copy", CheckpointConfig())
        assert store.save(SAVED, task.engine.fragments, state)
        task.close()
        dist.barrier()


def _middle(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / f"step_{SAVED:08d}"


def _assert_goes_on(resumed: Path, alone: Path, *, loss: float) -> None:
    """Steps after the checkpoint repeat those of the run that was never interrupted."""
    got, expected = read_records(resumed, "train"), read_records(alone, "train")[SAVED:]
    assert [record["step"] for record in got] == list(range(SAVED + 1, STEPS + 1))
    for one, other in zip(got, expected):
        for key in ("step", "consumed_samples", "consumed_hash", "lr", "global_batch_size"):
            assert one[key] == other[key]
        assert one["loss"] == pytest.approx(other["loss"], rel=loss, abs=0)


ONE: dict[str, Any] = {}
FULL = {"tensor": 2, "pipeline": 2}


@pytest.mark.parametrize(
    ("model", "saved_on", "resumed_on"),
    [
        ("llama", FULL, ONE),
        ("llama", FULL, {"data": 4}),
        ("llama", FULL, {"tensor": 4}),
        ("llama", FULL, {"pipeline": 2, "data": 2}),
        ("llama", FULL, {"tensor": 2, "sequence": True, "data": 2}),
        ("llama", FULL, {"pipeline": 2, "virtual_pipeline": 2}),
        ("llama", {"pipeline": 2, "virtual_pipeline": 2}, FULL),
        ("llama", {"data": 4}, {"tensor": 2}),
        ("llama", ONE, FULL),
        ("gpt2", FULL, {"data": 4}),
        ("gpt2", {"data": 2}, {"tensor": 4}),
    ],
    ids=str,
)
def test_run_goes_on_on_another_layout(
    run: Run, model: str, saved_on: dict[str, Any], resumed_on: dict[str, Any]
) -> None:
    checkpoint = _middle(run(model, saved_on))
    resumed = run(model, resumed_on, after=checkpoint)
    assert_same_tensors(newest_copy(resumed), checkpoint)
    _assert_goes_on(resumed, run(model, ONE), loss=FP32.loss)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sharded", [True, False], ids=["on_to_off", "off_to_on"])
def test_distributed_optimizer_is_switched(run: Run, precision: str, sharded: bool) -> None:
    before = {"precision": precision, "distributed_optimizer": sharded}
    after = {"precision": precision, "distributed_optimizer": not sharded}
    checkpoint = _middle(run("llama", {"data": 2}, **before))
    resumed = run("llama", {"tensor": 2, "data": 2}, after=checkpoint, **after)
    assert_same_tensors(newest_copy(resumed), checkpoint)
    tolerance = FP32 if precision == "fp32" else BF16
    _assert_goes_on(resumed, run("llama", ONE, precision=precision), loss=tolerance.loss)


def test_float32_run_goes_on_in_bfloat16(run: Run) -> None:
    checkpoint = _middle(run("llama", FULL))
    resumed = run("llama", {"data": 2}, after=checkpoint, precision="bf16")
    assert_same_tensors(newest_copy(resumed), checkpoint)  # main weights: nothing is rounded
    _assert_goes_on(resumed, run("llama", ONE), loss=BF16.loss)


def newest_copy(run_dir: Path) -> Path:
    """What `copy_checkpoint` wrote."""
    return run_dir / "copy" / f"step_{SAVED:08d}"


def test_resume_on_the_same_layout_is_bitwise(run: Run) -> None:
    whole = run("llama", FULL)
    resumed = run("llama", FULL, after=_middle(whole))
    _assert_goes_on(resumed, whole, loss=0.0)
    assert_same_tensors(newest(resumed), newest(whole))


def test_checkpoint_of_another_model_is_refused(run: Run, pool: RankPool, german_data: Path, tmp_path: Path) -> None:
    config = run_config(german_data, tmp_path / "run", model=replace(LLAMA, d_ff=64))
    run_dir = prepare(config)
    checkpoint = _middle(run("llama", ONE))
    shutil.copytree(checkpoint, run_dir / "checkpoints" / checkpoint.name)
    with pytest.raises(RuntimeError, match=r"CheckpointError: .*is of another model \(model.d_ff: 96 there, 64 here"):
        pool.run(train, run_dir, ranks=1)
    with pytest.raises(RuntimeError, match=r"linear_fc1.weight' with shape \[192, 32\], the model has \[128, 32\]"):
        pool.run(copy_checkpoint, run_dir, checkpoint, ranks=1)
