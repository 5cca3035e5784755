"""Steps that are skipped, batches that grow, samples that are left out, disks that are full."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.checkpoint.store import CheckpointStore, checkpoints, find_damage
from steerscale.data.config import DataConfig
from steerscale.data.consumed import ConsumedHash
from steerscale.data.dataset import SampleStream
from steerscale.metrics import read_records
from steerscale.optim import OptimConfig
from steerscale.parallel.layout import ParallelLayout
from steerscale.rundir import read_errors, read_status
from steerscale.testing.parity import FP32
from steerscale.testing.ranks import RankPool
from steerscale.train.config import MetricsConfig, RampUpConfig, RunConfig, TrainConfig, batch_size_at
from steerscale.train.loop import Loop
from tests.disks import fill, small_disk
from tests.train.runs import MODEL, AtStep, Send, Workers, moved, prepare, run_config, train


def poison(loop: Loop) -> None:
    """Something that can happen: weights that are not finite."""
    with torch.no_grad():
        for _, parameter in loop.task.engine.shards:
            parameter.fill_(torch.nan)


def poison_once(loop: Loop) -> None:
    """The same, but the next step finds the weights as they were."""
    kept = [parameter.detach().clone() for _, parameter in loop.task.engine.shards]
    poison(loop)
    end = loop._window.end

    def heal(*args: Any, **settings: Any) -> None:
        end(*args, **settings)
        with torch.no_grad():
            for (_, parameter), before in zip(loop.task.engine.shards, kept):
                parameter.copy_(before)
        loop._window.end = end  # type: ignore[method-assign]

    loop._window.end = heal  # type: ignore[method-assign]


def hash_of(config: RunConfig, places: Sequence[int]) -> str:
    """What `consumed_hash` is after samples at these places were consumed, computed without loader or loop."""
    assert config.data is not None
    stream = SampleStream(config.data, seq_len=config.model.seq_len, seed=config.seed)
    positions = np.array(places, dtype=np.int64)
    total = ConsumedHash()
    total.add(positions, *stream.locate(positions))
    return f"{total.value:016x}"


def steps_there(run_dir: Path) -> list[int]:
    """Steps of the checkpoints of a run."""
    return [int(path.name[-8:]) for path in checkpoints(run_dir / "checkpoints")]


@pytest.mark.parametrize("left_out", [[], [[8, 16]]], ids=["all samples", "some left out before"])
def test_non_finite_steps_in_a_row_end_the_run_and_it_goes_on_without_their_samples(
    german_data: Path, tmp_path: Path, left_out: list[list[int]]
) -> None:
    base = run_config(german_data, tmp_path / "run", parallel={"data": 2}, checkpoint=CheckpointConfig(interval=2))
    data = DataConfig(path=str(german_data), skip=left_out)
    config = replace(base, data=data, train=replace(base.train, max_skipped_in_row=3))
    run_dir = prepare(config)
    assert Workers(config, AtStep(6, (0, 1), poison)).join() == [2, 2]

    shift = 8 * len(left_out)
    begin, end = 40 + shift, 64 + shift  # steps 6, 7 and 8 of 8 samples
    (message, _) = [error["message"] for error in read_errors(run_dir)]
    assert message.startswith(
        f"3 steps in a row had a loss or gradient that was not finite, on samples {begin} to {end - 1}: lower optim.lr"
    )
    advice = re.search(r"data\.skip=(\S+);", message)
    assert advice is not None
    skip = [*left_out, [begin, end]]
    assert advice[1] == str(skip).replace(" ", "")
    skips = read_records(run_dir, "skip")
    assert [record["step"] for record in skips] == [6, 7, 8]
    assert [(record["first_sample"], record["end_sample"]) for record in skips] == [
        (begin, begin + 8),
        (begin + 8, begin + 16),
        (begin + 16, end),
    ]
    assert skips[0]["loss"] is None
    assert steps_there(run_dir) == [2, 4]  # none in the middle of the trouble

    again = replace(config, data=replace(data, skip=skip))
    prepare(again)
    assert Workers(again).join() == [0, 0]
    assert read_status(run_dir).state == "finished"
    last = read_records(run_dir, "train")[-1]
    assert (last["step"], last["skipped_total"], last["consumed_samples"]) == (12, 0, 96)
    # The places are counted without what is left out: [0, 96) of the new configuration are what was trained on.
    assert last["consumed_hash"] == hash_of(again, range(96))
    assert last["consumed_hash"] != hash_of(config, range(96))


def test_single_non_finite_step_is_skipped_and_counted(pool: RankPool, german_data: Path, tmp_path: Path) -> None:
    config = run_config(german_data, tmp_path / "run", parallel={"data": 2})
    run_dir = prepare(config)
    assert Workers(config, AtStep(6, (0, 1), poison_once)).join() == [0, 0]
    losses = {record["step"]: record["loss"] for record in read_records(run_dir, "train")}
    assert [step for step, loss in losses.items() if loss is None] == [6]
    assert read_records(run_dir, "train")[-1]["skipped_total"] == 1
    assert steps_there(run_dir) == [3, 7, 9, 12]  # the one of step 6 came when it was over
    alone = prepare(moved(config, tmp_path / "alone"))
    pool.run(train, alone, ranks=2)
    before = {record["step"]: record["loss"] for record in read_records(alone, "train")}
    assert {step: loss for step, loss in losses.items() if step < 6} == {s: x for s, x in before.items() if s < 6}
    assert losses[7] != before[7]


def test_huge_learning_rate_ends_as_a_users_error(german_data: Path, tmp_path: Path) -> None:
    config = run_config(
        german_data,
        tmp_path / "run",
        optim=OptimConfig(lr=1e30, clip=0.0, schedule="constant"),
        train=TrainConfig(steps=12, max_skipped_in_row=2, eval_interval=0),
        checkpoint=CheckpointConfig(interval=3, asynchronous=True),
    )
    run_dir = prepare(config)
    assert Workers(config).join() == [2]
    (error,) = read_errors(run_dir)
    assert (error["type"], error["user_error"]) == ("TrainingError", True)
    assert "2 steps in a row had a loss or gradient that was not finite, on samples 8 to 23" in error["message"]


@pytest.mark.parametrize(
    ("consumed", "size"), [(0, 4), (4, 4), (15, 4), (16, 8), (24, 8), (31, 8), (32, 12), (100, 12)]
)
def test_batch_size_grows_in_equal_stages(consumed: int, size: int) -> None:
    layout = ParallelLayout(micro_batch_size=2, gradient_accumulation_steps=6)
    ramp_up = RampUpConfig(start=4, increment=4, samples=32)
    assert batch_size_at(ramp_up, layout, consumed) == size
    assert batch_size_at(None, layout, consumed) == 12


def test_batch_size_never_exceeds_the_full_one() -> None:
    layout = ParallelLayout(gradient_accumulation_steps=9)
    ramp_up = RampUpConfig(start=2, increment=4, samples=20)  # stages of 2 and 6, then 9
    assert [batch_size_at(ramp_up, layout, consumed) for consumed in (0, 9, 10, 19, 20)] == [2, 2, 6, 6, 9]


SIZES = [4, 4, 4, 4, 8, 8, 12, 12]


def test_run_goes_on_inside_a_ramp_on_another_layout(pool: RankPool, german_data: Path, tmp_path: Path) -> None:
    config = run_config(
        german_data,
        tmp_path / "alone",
        parallel={"global_batch_size": 12},
        model=replace(MODEL, dropout=0.0, init_std=0.08),
        optim=OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=4, eps=1e-6),
        train=TrainConfig(steps=8, eval_interval=0, ramp_up=RampUpConfig(start=4, increment=4, samples=32)),
    )
    alone = prepare(config)
    pool.run(train, alone, ranks=1)
    stopped = moved(config, tmp_path / "run")
    prepare(stopped)
    assert Workers(stopped, AtStep(5, (0,), Send(15))).join() == [0]
    resumed = replace(stopped, parallel=replace(config.parallel, data=2))
    run_dir = prepare(resumed)
    pool.run(train, run_dir, ranks=2)
    got, expected = read_records(run_dir, "train"), read_records(alone, "train")
    assert [record["global_batch_size"] for record in expected] == SIZES
    assert [record["consumed_samples"] for record in expected] == np.cumsum(SIZES).tolist()
    assert expected[-1]["consumed_hash"] == hash_of(config, range(sum(SIZES)))
    timed = [record for record in expected if "eta_seconds" in record]
    assert timed
    for record in timed:
        left = sum(SIZES[record["step"] :]) / record["global_batch_size"]
        assert record["eta_seconds"] == pytest.approx(left * record["seconds_per_step"])
    for one, other in zip(got, expected, strict=True):
        for key in ("step", "global_batch_size", "consumed_samples", "consumed_hash", "lr"):
            assert one[key] == other[key]
        assert one["loss"] == pytest.approx(other["loss"], rel=FP32.loss, abs=0)


def fill_up(loop: Loop) -> None:
    """Something that can happen: another program takes the rest of the disk."""
    fill(Path(loop.config.run_dir))


def test_full_disk_ends_the_run_only_when_its_last_checkpoint_cannot_be_written(
    german_data: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", kib=3000) as disk:
        config = run_config(german_data, disk / "run", parallel={"data": 2})
        run_dir = prepare(config)
        assert Workers(config, AtStep(5, (0,), fill_up)).join() == [2, 2]
        log = (run_dir / "logs" / "rank_0.log").read_text()
        assert steps_there(run_dir) == [3]
        assert find_damage(run_dir / "checkpoints" / "step_00000003") is None
        assert log.count("was not written: rank") >= 1
        assert "No space left on device" in log


def full_while_one_is_written(rank: int) -> None:
    """A `setup`: the disk is full from step 8 on, and what is begun at step 9 takes until the end."""
    AtStep(8, (0,), fill_up)(rank)
    CheckpointStore.poll = lambda self: None  # type: ignore[method-assign]


def test_finished_run_needs_no_last_checkpoint_where_none_is_wanted(german_data: Path, tmp_path: Path) -> None:
    checkpoint = CheckpointConfig(interval=3, at_end=False, asynchronous=True)
    with small_disk(tmp_path / "disk", kib=3000) as disk:
        config = run_config(german_data, disk / "run", checkpoint=checkpoint)
        run_dir = prepare(config)
        assert Workers(config, full_while_one_is_written).join() == [0]
        assert "the checkpoint of step 9 was not written" in (run_dir / "logs" / "rank_0.log").read_text()
        assert read_status(run_dir).state == "finished"


def make_room(loop: Loop) -> None:
    """Something that can happen: the disk has space again."""
    (Path(loop.config.run_dir) / "filler").unlink()


def full_for_a_while(rank: int) -> None:
    """A `setup`: the disk is full in steps 5 to 7."""
    AtStep(5, (0,), fill_up)(rank)
    AtStep(8, (0,), make_room)(rank)


def test_run_survives_a_disk_that_is_full_for_a_while(german_data: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=8000) as disk:
        config = run_config(german_data, disk / "run", parallel={"data": 2})
        run_dir = prepare(config)
        assert Workers(config, full_for_a_while).join() == [0, 0]
        assert steps_there(run_dir) == [3, 9, 12]
        assert [record["step"] for record in read_records(run_dir, "train")] == list(range(1, 13))
        assert read_status(run_dir).state == "finished"


def read_slowly(loop: Loop) -> None:
    """From here on, this rank waits for every step's data."""
    read = loop.task.micro_batches

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return read(*args)

    loop.task.micro_batches = slow  # type: ignore[method-assign]


def test_records_name_the_rank_that_waits_longest_for_its_data(german_data: Path, tmp_path: Path) -> None:
    metrics = MetricsConfig(interval=2, warmup_steps=1, tensorboard=False)
    config = run_config(german_data, tmp_path / "run", parallel={"data": 2}, metrics=metrics)
    config = replace(config, train=TrainConfig(steps=6, eval_interval=0), optim=replace(config.optim, warmup_steps=1))
    prepare(config)
    assert Workers(config, AtStep(2, (1,), read_slowly)).join() == [0, 0]
    _, *records = read_records(tmp_path / "run", "train")
    assert [record["data_slowest_rank"] for record in records] == [1, 1]
    for record in records:
        assert record["data_seconds_max"] >= 0.2 > record["seconds"]["data"]
        assert min(record["step_seconds"]) >= 0.2
        assert record["memory_peak_gib_max"] >= record["memory_peak_gib_min"] > 0
