"""A run that is killed again and again ends bit by bit where one ends that is left alone."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.checkpoint.store import HIDDEN, checkpoints, find_damage
from steerscale.errors import DataError
from steerscale.metrics import read_records
from steerscale.rundir import read_errors, read_status
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig, TrainConfig
from steerscale.train.loop import Loop
from tests.train.runs import AtStep, Workers, assert_same_tensors, curve, moved, newest, prepare, run_config, train


class Killer:
    """Starts a run and kills all its ranks, once the run has come to a certain step or writes its checkpoint."""

    def __init__(self, config: RunConfig, *, seed: int) -> None:
        self.config, self.random = config, random.Random(seed)
        self.directory = prepare(config) / "checkpoints"
        self.cut_short = 0
        """Checkpoints whose writing was cut short."""

    def kill_at_step(self, step: int) -> None:
        """Kill some milliseconds after `step` was reported."""
        self._kill_when(lambda: any(r["step"] >= step for r in read_records(self.directory.parent, "train")), 0.03)

    def kill_writing(self, step: int) -> None:
        """Kill as soon as a checkpoint of `step` or later begins to be written."""
        self._kill_when(lambda: any(int(path.name[-8:]) >= step for path in self._hidden()), 0.003)

    def _hidden(self) -> list[Path]:
        return list(self.directory.glob(f"{HIDDEN}*"))

    def _kill_when(self, condition: Callable[[], bool], delay_s: float) -> None:
        workers = Workers(self.config)
        while not condition():
            assert all(process.is_alive() for process in workers.processes), "the run ended before it was killed"
            time.sleep(0.0005)
        time.sleep(self.random.uniform(0, delay_s))
        workers.kill()
        self.cut_short += bool(self._hidden())
        # Whatever is visible is whole, at every moment.
        for checkpoint in checkpoints(self.directory):
            assert find_damage(checkpoint) is None


def _assert_same_run(config: RunConfig, pool: RankPool, tmp_path: Path) -> None:
    alone = moved(config, tmp_path / "alone")
    pool.run(train, prepare(alone), ranks=config.layout().world_size)
    run_dir, expected = Path(config.run_dir), Path(alone.run_dir)
    assert curve(run_dir) == curve(expected)
    assert [record["step"] for record in read_records(run_dir, "train")] == list(range(1, config.train.steps + 1))
    assert (newest(run_dir) / "state.json").read_bytes() == (newest(expected) / "state.json").read_bytes()
    assert_same_tensors(newest(run_dir), newest(expected))
    assert read_status(run_dir).state == "finished"


def test_run_killed_ten_times_repeats_itself_bitwise(pool: RankPool, german_data: Path, tmp_path: Path) -> None:
    config = run_config(
        german_data,
        tmp_path / "killed",
        parallel={"tensor": 2},
        train=TrainConfig(steps=40, eval_interval=10, eval_samples=6),
        checkpoint=CheckpointConfig(interval=3, keep=2),
    )
    killer = Killer(config, seed=7)
    for number in range(10):
        step = 3 * number + killer.random.randint(1, 4)
        (killer.kill_writing if number % 2 else killer.kill_at_step)(step)
    assert killer.cut_short >= 2
    assert Workers(config).join() == [0, 0]
    assert not killer._hidden()
    _assert_same_run(config, pool, tmp_path)


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
    _assert_same_run(config, pool, tmp_path)


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
