"""A signal to any one rank stops all of them after the same step, and the run goes on later as if nothing had been."""

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.checkpoint.store import checkpoints
from steerscale.engines.megatron import MegatronEngine
from steerscale.metrics import read_records
from steerscale.rundir import read_status
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig
from tests.train.runs import (
    AtStep,
    Send,
    Workers,
    assert_same_tensors,
    curve,
    moved,
    newest,
    prepare,
    run_config,
    train,
)

STOP_ONLY = CheckpointConfig(interval=1000)
"""No checkpoint but those of the stop and the end."""
Alone = Callable[[RunConfig], Path]


@pytest.fixture(scope="module")
def alone(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The same run, never stopped; trained once for each layout."""
    done: dict[str, Path] = {}

    def make(config: RunConfig) -> Path:
        key = str(moved(config, Path("alone"), checkpoint=STOP_ONLY))
        if key not in done:
            done[key] = prepare(moved(config, tmp_path_factory.mktemp("alone") / "run"))
            pool.run(train, done[key], ranks=config.layout().world_size)
        return done[key]

    return make


def _stop(config: RunConfig, setup: Callable[[int], object]) -> Path:
    run_dir = prepare(config)
    assert set(Workers(config, setup).join()) == {0}
    return run_dir


def _assert_goes_on(config: RunConfig, alone: Alone) -> None:
    run_dir = prepare(config)
    assert set(Workers(config).join()) == {0}
    expected = alone(config)
    assert curve(run_dir) == curve(expected)
    assert_same_tensors(newest(run_dir), newest(expected))
    assert read_status(run_dir).state == "finished"


@pytest.mark.parametrize(
    ("parallel", "ranks", "number"),
    [
        ({"data": 2}, (0,), signal.SIGTERM),
        ({"data": 2}, (1,), signal.SIGUSR1),
        ({"pipeline": 2, "data": 2}, (2,), signal.SIGTERM),
        ({"pipeline": 2, "data": 2}, (0, 1, 2, 3), signal.SIGUSR1),
        ({}, (0,), signal.SIGINT),
    ],
    ids=str,
)
def test_signal_to_some_ranks_stops_all_after_the_step(
    parallel: dict[str, Any], ranks: tuple[int, ...], number: int, german_data: Path, tmp_path: Path, alone: Alone
) -> None:
    config = run_config(german_data, tmp_path / "run", parallel=parallel, checkpoint=STOP_ONLY)
    run_dir = _stop(config, AtStep(4, ranks, Send(number)))
    status = read_status(run_dir)
    assert (status.state, status.step, status.steps) == ("stopped", 4, 12)
    cause = signal.Signals(number).name if 0 in ranks else "a signal to another rank"
    assert status.reason == f"stopped by {cause}; start again to go on"
    assert [path.name for path in checkpoints(run_dir / "checkpoints")] == ["step_00000004"]
    assert [record["step"] for record in read_records(run_dir, "train")] == [1, 2, 3, 4]
    _assert_goes_on(config, alone)


def test_signal_at_an_asynchronous_checkpoint_finishes_it(german_data: Path, tmp_path: Path, alone: Alone) -> None:
    settings = CheckpointConfig(interval=3, asynchronous=True)
    config = run_config(german_data, tmp_path / "run", parallel={"data": 2}, checkpoint=settings)
    run_dir = _stop(config, AtStep(4, (1,), Send(signal.SIGTERM)))
    assert [path.name for path in checkpoints(run_dir / "checkpoints")] == ["step_00000003", "step_00000004"]
    assert read_status(run_dir).step == 4
    _assert_goes_on(config, alone)


def test_signal_before_the_first_step_is_remembered(german_data: Path, tmp_path: Path, alone: Alone) -> None:
    """It comes while torch is imported, or before the handlers are there at all: the launcher holds it back till then."""
    config = run_config(german_data, tmp_path / "run", parallel={"data": 2}, checkpoint=STOP_ONLY)
    assert read_status(_stop(config, signal_at_start)).step == 1
    _assert_goes_on(config, alone)


def signal_at_start(rank: int) -> None:
    """As the launcher starts ranks: with the stop signals held back."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    if rank == 1:
        Send(signal.SIGTERM)()


class InEvaluation:
    """A `setup`: rank 1 gets a signal in the second call of the evaluation after step 5."""

    def __call__(self, rank: int) -> None:
        """Called in the process of `rank`."""
        evaluate, calls = MegatronEngine.evaluate, []

        def act(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 1 and rank == 1:
                Send(signal.SIGTERM)()
            assert len(calls) == 1, "the evaluation went on"
            return evaluate(*args)

        MegatronEngine.evaluate = act


def test_signal_in_an_evaluation_ends_it_and_it_is_made_up_for(german_data: Path, tmp_path: Path, alone: Alone) -> None:
    base = run_config(german_data, tmp_path / "run", parallel={"data": 2}, checkpoint=STOP_ONLY)
    config = replace(base, train=replace(base.train, eval_samples=40))  # two calls of 32 samples
    run_dir = _stop(config, InEvaluation())
    assert read_status(run_dir).step == 5
    assert read_records(run_dir, "eval") == []
    _assert_goes_on(config, alone)
    assert [record["step"] for record in read_records(run_dir, "eval")] == [5, 10, 12]


def test_signal_in_a_step_with_an_evaluation_puts_it_off(german_data: Path, tmp_path: Path, alone: Alone) -> None:
    config = run_config(german_data, tmp_path / "run", parallel={"data": 2}, checkpoint=STOP_ONLY)
    run_dir = _stop(config, AtStep(5, (1,), Send(signal.SIGUSR1)))
    assert read_records(run_dir, "eval") == []
    _assert_goes_on(config, alone)


def test_signal_in_the_last_step_leaves_the_evaluation_to_the_next_start(
    german_data: Path, tmp_path: Path, alone: Alone
) -> None:
    config = run_config(german_data, tmp_path / "run", parallel={"data": 2}, checkpoint=STOP_ONLY)
    run_dir = _stop(config, AtStep(12, (0,), Send(signal.SIGTERM)))
    assert (read_status(run_dir).state, read_status(run_dir).step) == ("stopped", 12)
    _assert_goes_on(config, alone)


def test_finished_run_that_is_started_again_changes_nothing(german_data: Path, tmp_path: Path, alone: Alone) -> None:
    config = run_config(german_data, tmp_path / "run", parallel={"data": 2}, checkpoint=STOP_ONLY)
    _assert_goes_on(config, alone)
    before = newest(Path(config.run_dir)).stat().st_mtime_ns
    _assert_goes_on(config, alone)
    assert newest(Path(config.run_dir)).stat().st_mtime_ns == before


def test_steps_before_a_stop_are_reported(german_data: Path, tmp_path: Path) -> None:
    base = run_config(german_data, tmp_path / "run", checkpoint=STOP_ONLY)
    config = replace(base, metrics=replace(base.metrics, interval=10))
    run_dir = _stop(config, AtStep(4, (0,), Send(signal.SIGTERM)))
    prepare(config)
    assert Workers(config).join() == [0]
    records = read_records(run_dir, "train")
    assert [(record["step"], record["timed_steps"]) for record in records] == [(4, 4), (10, 6), (12, 2)]


def test_status_tells_the_step_while_the_run_goes_on(german_data: Path, tmp_path: Path) -> None:
    config = run_config(german_data, tmp_path / "run", checkpoint=STOP_ONLY)
    run_dir = prepare(config)
    workers = Workers(config, AtStep(7, (0,), wait_for_ever))
    deadline = time.monotonic() + 60
    while read_status(run_dir).step < 6:
        assert workers.processes[0].is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (read_status(run_dir).state, read_status(run_dir).steps) == ("running", 12)
    workers.kill()


def wait_for_ever(about: object) -> None:
    """Something that can happen to a rank."""
    time.sleep(1000)
