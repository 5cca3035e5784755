"""A run that is killed again and again ends bit by bit where one ends that is left alone."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.errors import DataError
from steerscale.metrics import read_records
from steerscale.rundir import read_errors
from steerscale.testing.ranks import RankPool
from steerscale.train.config import TrainConfig
from steerscale.train.loop import Loop
from tests.train.kills import Killer, assert_same_run
from tests.train.runs import MODEL, AtStep, Workers, prepare, run_config


def test_run_killed_ten_times_repeats_itself_bitwise(pool: RankPool, german_data: Path, tmp_path: Path) -> None:
    config = run_config(
        german_data,
        tmp_path / "killed",
        parallel={"tensor": 2, "micro_batch_size": 4},
        model=replace(MODEL, num_layers=2),
        train=TrainConfig(steps=35, eval_interval=10, eval_samples=6),
        checkpoint=CheckpointConfig(interval=3, keep=2),
    )
    killer = Killer(config, seed=7)
    for number in range(10):
        step = 3 * number + killer.random.randint(1, 4)
        (killer.kill_writing if number % 2 else killer.kill_at_step)(step)
    assert killer.cut_short >= 2
    assert Workers(config).join() == [0, 0]
    assert not killer.hidden()
    assert_same_run(config, pool, tmp_path)


def test_run_killed_while_writing_asynchronously_repeats_itself_bitwise(
    pool: RankPool, german_data: Path, tmp_path: Path
) -> None:
    config = run_config(
        german_data,
        tmp_path / "killed",
        parallel={"pipeline": 2, "data": 2},
        checkpoint=CheckpointConfig(interval=2, asynchronous=True),
    )
    killer = Killer(config, seed=8)
    for step in (2, 5, 8):
        killer.kill_writing(step)
    assert killer.cut_short >= 1
    assert Workers(config).join() == [0] * 4
    assert_same_run(config, pool, tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_killed_ends_the_others(rank: int, german_data: Path, tmp_path: Path) -> None:
    """Without a launcher that watches them: by the broken connection."""
    config = run_config(german_data, tmp_path / "run", parallel={"data": 2}, train=TrainConfig(steps=10000))
    run_dir = prepare(config)
    workers = Workers(config)
    while not read_records(run_dir, "train"):
        time.sleep(0.01)
    workers.send(9, rank=rank)
    statuses = workers.join(30.0)
    assert statuses[rank] == -9
    assert statuses[1 - rank] == 1


def fail(loop: Loop) -> None:
    """Something that can happen: data that turn out to be damaged."""
    raise DataError("a shard is damaged")


@dataclass(frozen=True)
class Fail:
    """A `setup`: one rank fails, and must have left word of it when it begins to leave the others."""

    rank: int
    run_dir: Path

    def __call__(self, rank: int) -> None:
        """Called in the process of `rank`."""
        AtStep(4, (self.rank,), fail)(rank)
        leave = dist.destroy_process_group

        def check(*args: Any) -> None:
            if rank == self.rank and not read_errors(self.run_dir):
                os._exit(77)
            leave(*args)

        dist.destroy_process_group = check


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_fails_first_is_first_in_time(rank: int, german_data: Path, tmp_path: Path) -> None:
    """The other one fails of the broken connection, but not before word of the cause is left."""
    config = run_config(german_data, tmp_path / "run", parallel={"data": 2})
    run_dir = prepare(config)
    statuses = Workers(config, Fail(rank, run_dir)).join()
    assert (statuses[rank], statuses[1 - rank]) == (2, 1)
    cause, echo = read_errors(run_dir)
    assert (cause["rank"], cause["type"], cause["message"]) == (rank, "DataError", "a shard is damaged")
    assert (echo["rank"], echo["user_error"]) == (1 - rank, False)
