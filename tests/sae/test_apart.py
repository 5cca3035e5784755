"""SAE runs whose language model has ranks of its own: the same run as on shared ranks, through kills and stops."""

import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from launch.local import Failure, summarize_failure
from steerscale.activations.config import ProducersConfig
from steerscale.activations.passes import LocalPasses
from steerscale.activations.producer import Producer
from steerscale.checkpoint.config import CheckpointConfig
from steerscale.checkpoint.store import find_damage
from steerscale.metrics import read_records
from steerscale.rundir import read_status
from steerscale.sae.config import VariantConfig
from steerscale.testing.parity import SAE
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig, TrainConfig
from tests.sae.training import sae_config
from tests.train.runs import AtStep, Send, Workers, assert_same_tensors, curve, newest, prepare, train

STEPS = 14
HOOKS = ["blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"]
SETTINGS: dict[str, Any] = {"variants": [VariantConfig(architecture=name) for name in ("topk", "jumprelu")]}


def _config(
    lm: Path,
    text: Path,
    run_dir: Path,
    *,
    producers: dict[str, int] | None = None,
    interval: int = 6,
    **parallel: int,
) -> RunConfig:
    sections = {
        "train": TrainConfig(steps=STEPS, eval_interval=7, eval_samples=6),
        "checkpoint": CheckpointConfig(interval=interval, keep=0),
    }
    config = sae_config(lm, text, run_dir, parallel=parallel, sections=sections, hooks=HOOKS, **SETTINGS)
    assert config.stream is not None
    apart = None if producers is None else ProducersConfig(**producers)
    return replace(config, stream=replace(config.stream, producers=apart))


@pytest.fixture(scope="module")
def whole(pool: RankPool, lm: Path, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the run in one process."""
    run_dir = prepare(_config(lm, german_data, tmp_path_factory.mktemp("whole") / "run"))
    pool.run(train, run_dir, ranks=1)
    return run_dir


def _assert_whole(config: RunConfig, whole: Path) -> None:
    """The finished run is bit by bit the one in one process."""
    run_dir = Path(config.run_dir)
    assert curve(run_dir) == curve(whole)
    assert_same_tensors(newest(run_dir), newest(whole))
    assert read_status(run_dir).state == "finished"


def _run(config: RunConfig) -> Path:
    run_dir = prepare(config)
    assert set(Workers(config).join()) == {0}
    return run_dir


def test_parity_apart_pipeline(whole: Path, lm: Path, german_data: Path, tmp_path: Path) -> None:
    config = _config(lm, german_data, tmp_path / "run", producers={"pipeline": 2})
    run_dir = _run(config)
    _assert_whole(config, whole)
    (start,) = read_records(run_dir, "start")
    assert (start["ranks"], start["producers"]) == (3, "TP1 PP2 DP1 MBS1 GAS1")
    assert len(list((run_dir / "logs").glob("rank_*.log"))) == 3
    # The same state wherever the model is: either goes on with what the other left.
    assert (newest(run_dir) / "state.json").read_bytes() == (newest(whole) / "state.json").read_bytes()


@pytest.mark.parametrize(
    ("parallel", "producers"), [({"data": 2}, {"tensor": 2}), ({"tensor": 2}, {"data": 2})], ids=str
)
def test_parity_apart(
    parallel: dict[str, int], producers: dict[str, int], whole: Path, lm: Path, german_data: Path, tmp_path: Path
) -> None:
    run_dir = _run(_config(lm, german_data, tmp_path / "run", producers=producers, **parallel))
    for kind in ("train", "eval"):
        got, wanted = read_records(run_dir, kind), read_records(whole, kind)
        assert len(got) == len(wanted) > 0
        for one, other in zip(got, wanted):
            assert one.get("consumed_hash") == other.get("consumed_hash")
            # The share recovered is a quotient of two small differences.
            values = {k: v for k, v in other.items() if k == "loss" or ("/" in k and not k.endswith("recovered"))}
            assert {key: one[key] for key in values} == pytest.approx(values, rel=SAE.loss, abs=1e-6)


@dataclass(frozen=True)
class AtCall:
    """A `setup`: a rank does something to itself when a method is called for the nth time."""

    rank: int
    owner: type
    method: str
    number: int
    action: Callable[[], object]

    def __call__(self, rank: int) -> None:
        """Called in the process of `rank`."""
        if rank != self.rank:
            return
        before, calls = getattr(self.owner, self.method), count(1)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.number:
                self.action()
            return before(*args, **kwargs)

        setattr(self.owner, self.method, call)


KILL, TERM = Send(signal.SIGKILL), Send(signal.SIGTERM)
IN_FILL, IN_EVALUATION, IN_NEXT_BLOCK = 3, 25, 37
"""Of the commands of a producer: 16 fill both halves, 20 evaluate at step 7, the rest comes from step 12 on."""


@pytest.mark.parametrize(
    ("happens", "killed"),
    [
        (AtStep(9, (0,), KILL), 0),
        (AtCall(1, Producer, "_carry_out", IN_EVALUATION, KILL), 1),
        (AtCall(2, Producer, "_carry_out", IN_NEXT_BLOCK, KILL), 2),
    ],
    ids=["trainer", "first stage", "second stage"],
)
def test_killed_rank_ends_all_and_the_run_goes_on(
    happens: Callable[[int], object], killed: int, whole: Path, lm: Path, german_data: Path, tmp_path: Path
) -> None:
    """Nobody hangs, whoever dies; the next start goes on bit by bit, on either placement."""
    config = _config(lm, german_data, tmp_path / "run", producers={"pipeline": 2})
    run_dir = prepare(config)
    statuses = Workers(config, happens).join()
    assert statuses[killed] == -signal.SIGKILL
    assert all(statuses)
    assert newest(run_dir).name == ("step_00000012" if killed == 2 else "step_00000006")
    if killed == 0:
        config = _config(lm, german_data, run_dir)
        prepare(config)
    assert set(Workers(config).join()) == {0}
    _assert_whole(config, whole)


@pytest.mark.parametrize(
    ("producers", "happens", "step"),
    [
        (None, AtCall(0, LocalPasses, "begin", IN_FILL, TERM), 0),
        ({"tensor": 1}, AtCall(1, Producer, "_carry_out", IN_FILL, TERM), 0),
        ({"tensor": 1}, AtStep(9, (0,), TERM), 9),
        ({"pipeline": 2}, AtCall(2, Producer, "_carry_out", IN_EVALUATION, TERM), None),
    ],
    ids=["filling", "producer, filling", "trainer", "producer"],
)
def test_signal_leaves_a_whole_checkpoint(
    producers: dict[str, int] | None,
    happens: Callable[[int], object],
    step: int | None,
    whole: Path,
    lm: Path,
    german_data: Path,
    tmp_path: Path,
) -> None:
    config = _config(lm, german_data, tmp_path / "run", producers=producers)
    run_dir = prepare(config)
    assert set(Workers(config, happens).join()) == {0}
    status = read_status(run_dir)
    assert (status.state, status.reason[:21]) == ("stopped", "stopped by SIGTERM; s")
    assert status.step == step if step is not None else 7 <= status.step < STEPS
    assert newest(run_dir).name == f"step_{status.step:08d}"
    assert find_damage(newest(run_dir)) is None
    _run(config)
    _assert_whole(config, whole)


def test_failure_of_a_producer_is_the_runs(lm: Path, german_data: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(lm, tmp_path / "lm"))
    (weights,) = newest(broken).glob("rank_*.safetensors")
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    config = _config(broken, german_data, tmp_path / "run", producers={"tensor": 2})
    run_dir = prepare(config)
    statuses = Workers(config).join()
    assert all(statuses)
    failures = [Failure(rank=rank, status=status or 0, time=time.time()) for rank, status in enumerate(statuses)]
    summary, _ = summarize_failure(run_dir, failures)
    assert re.match(r"FAILED: rank [12] \w+: .*safetensors", summary)
