"""Runs that are killed again and again, by whatever they train."""

import random
import time
from collections.abc import Callable
from pathlib import Path

from steerscale.checkpoint.store import HIDDEN, checkpoints, find_damage
from steerscale.metrics import read_records
from steerscale.rundir import read_status
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig
from tests.train.runs import Workers, assert_same_tensors, curve, moved, newest, prepare, train


class Killer:
    """Starts a run and kills all its ranks, once the run has come to a certain step or writes its checkpoint."""

    def __init__(self, config: RunConfig, *, seed: int) -> None:
        self.config, self.random = config, random.Random(seed)
        self.directory = prepare(config) / "checkpoints"
        self.cut_short = 0
        """Checkpoints whose writing was cut short."""

    def kill_at_step(self, step: int) -> None:
        """Kill some milliseconds after `step` was reported."""
        self._kill_when(
            lambda: any(r["step"] >= step for r in read_records(self.directory.parent, "train")),
            look_s=0.01,
            delay_s=0.03,
        )

    def kill_writing(self, step: int) -> None:
        """Kill as soon as a checkpoint of `step` or later begins to be written."""
        self._kill_when(lambda: any(int(path.name[-8:]) >= step for path in self.hidden()), look_s=0.001, delay_s=0.003)

    def hidden(self) -> list[Path]:
        """Checkpoints that are being written, or were when all was killed."""
        return list(self.directory.glob(f"{HIDDEN}*"))

    def _kill_when(self, condition: Callable[[], bool], *, look_s: float, delay_s: float) -> None:
        workers = Workers(self.config)
        while not condition():
            assert all(process.is_alive() for process in workers.processes), "the run ended before it was killed"
            time.sleep(look_s)  # the ranks need the cores
        time.sleep(self.random.uniform(0, delay_s))
        workers.kill()
        self.cut_short += bool(self.hidden())
        # Whatever is visible is whole, at every moment.
        for checkpoint in checkpoints(self.directory):
            assert find_damage(checkpoint) is None


def assert_same_run(config: RunConfig, pool: RankPool, tmp_path: Path) -> None:
    """The finished run of `config` is bit by bit one that was left alone."""
    alone = moved(config, tmp_path / "alone")
    pool.run(train, prepare(alone), ranks=config.layout().world_size)
    run_dir, expected = Path(config.run_dir), Path(alone.run_dir)
    assert curve(run_dir) == curve(expected)
    assert [record["step"] for record in read_records(run_dir, "train")] == list(range(1, config.train.steps + 1))
    assert (newest(run_dir) / "state.json").read_bytes() == (newest(expected) / "state.json").read_bytes()
    assert_same_tensors(newest(run_dir), newest(expected))
    assert read_status(run_dir).state == "finished"
