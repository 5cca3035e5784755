"""Runs on a real Slurm of virtual nodes: through the time limit, through the loss of a node, as an array."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm import submit_array
from launch.train import main
from steerscale.checkpoint.config import CheckpointConfig
from steerscale.cli import main as steerscale
from steerscale.config import from_mapping
from steerscale.errors import ConfigError
from steerscale.jobs.journal import read_journal
from steerscale.jobs.slurm import signal_script
from steerscale.jobs.submit import submit
from steerscale.rundir import read_config
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig, TrainConfig
from tests.slurm.testbed import Testbed, call, has_ended, look, on_testbed, output, wait_for, wait_for_step
from tests.train.runs import curve, moved, prepare, run_config, train

STEPS = 24
TWO_BY_TWO = [
    *("launcher=slurm", "cluster=testbed", "launcher.timeout_minutes=2", "parallel.tensor=2", "parallel.data=2"),
    *("parallel.global_batch_size=8", "parallel.micro_batch_size=2", "model.num_layers=2", "model.d_model=32"),
    *("model.num_heads=4", "model.seq_len=32", "model.dropout=0.1", f"train.steps={STEPS}", "train.eval_interval=10"),
    *("train.eval_samples=6", "optim.lr=3e-3", "checkpoint.interval=5", "checkpoint.keep=0", "metrics.interval=1"),
    "metrics.tensorboard=false",
]


def decisions(run_dir: Path) -> list[str]:
    """What was decided each time that the ranks had ended."""
    return [event["decision"] for event in read_journal(run_dir).events if event["event"] == "end"]


@pytest.fixture(scope="module")
def whole(testbed: Testbed, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two nodes with two tasks each, submitted from the command line."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert main([*TWO_BY_TWO, f"data.path={german_data}", f"run_dir={run_dir}"]) == 0
    with pytest.raises(ConfigError, match="has a job already"):
        submit([from_mapping(RunConfig, read_config(run_dir))], command=["test"])
    running = wait_for(run_dir, lambda one: (one.state == "running" and one.step > 0) or has_ended(one))
    assert (running.state, running.steps, running.nodes, running.restarts) == ("running", STEPS, "n[1-2]", 0)
    wait_for(run_dir, has_ended)
    return run_dir


def again(whole: Path, run_dir: Path, **cluster: object) -> RunConfig:
    """The same run in another directory."""
    config = from_mapping(RunConfig, read_config(whole))
    return on_testbed(replace(config, run_dir=str(run_dir), name=run_dir.name), **cluster)


def test_two_nodes_with_two_tasks_train(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decisions(whole) == ["finished"]
    assert [record["step"] for record in curve(whole) if record["kind"] == "train"] == list(range(1, STEPS + 1))
    assert {path.name for path in (whole / "logs").iterdir()} == {f"rank_{rank}.log" for rank in range(4)}
    assert "TP2 PP1 DP2" in output(whole)
    assert steerscale(["status", str(whole), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["step"], shown["restarts"]) == ("finished", STEPS, 0)


def test_run_goes_on_exactly_after_the_signal_before_the_time_limit(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "stopped"
    job = submit([again(whole, run_dir)], command=["test"])
    wait_for_step(run_dir, 7)
    signal_script(job, "USR1")
    ended = wait_for(run_dir, has_ended)
    assert (ended.state, ended.job, ended.restarts) == ("finished", job, 1)
    assert decisions(run_dir) == ["go_on", "finished"]
    first, second = (event["step"] for event in read_journal(run_dir).starts)
    assert first == 0
    assert 7 <= second < STEPS
    assert curve(run_dir) == curve(whole)


def test_run_survives_the_loss_of_a_node(testbed: Testbed, pool: RankPool, german_data: Path, tmp_path: Path) -> None:
    """One task a node. While it waits for its next start, one that is left alone runs here in the same layout."""
    config = run_config(
        german_data,
        tmp_path / "crashed",
        parallel={"tensor": 2},
        checkpoint=CheckpointConfig(interval=5, keep=0),
        train=TrainConfig(steps=STEPS, eval_interval=10, eval_samples=6),
    )
    run_dir, alone = Path(config.run_dir), prepare(moved(config, tmp_path / "alone"))
    job = submit([on_testbed(config, gpus_per_node=1)], command=["test"])
    wait_for_step(run_dir, 7)
    testbed("fail", "n2")
    try:
        wait_for(run_dir, lambda one: one.state == "pending")
        pool.run(train, alone, ranks=2)
        ended = wait_for(run_dir, has_ended)
    finally:
        testbed("recover", "n2")
    assert (ended.state, ended.job, ended.restarts) == ("finished", job, 1)
    assert [event["nodes"] for event in read_journal(run_dir).starts] == ["n[1-2]", "n[1,3]"]
    assert 5 <= read_journal(run_dir).starts[1]["step"] < STEPS
    assert curve(run_dir) == curve(alone)


def test_array_records_the_point_that_runs_out_of_memory(
    testbed: Testbed, german_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = run_config(german_data, tmp_path / "0")
    points = [
        on_testbed(
            replace(small, name=f"point {index}", run_dir=str(tmp_path / str(index)), seed=index % 2), gpus_per_node=2
        )
        for index in range(4)
    ]
    # More than any machine has: asking for it fails at once.
    points[2] = replace(points[2], model=replace(points[2].model, vocab_size=10**13))
    job = submit_array(points)
    ended = [wait_for(Path(point.run_dir), has_ended) for point in points]
    assert [one.state for one in ended] == ["finished", "finished", "oom", "finished"]
    assert [one.job for one in ended] == [f"{job}_{index}" for index in range(4)]
    assert curve(tmp_path / "1") == curve(tmp_path / "3") != curve(tmp_path / "0")
    assert steerscale(["resubmit", str(tmp_path), "--state", "failed"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in said] == [f"left alone, it is {one.state}" for one in ended]


def test_next_job_is_submitted_where_requeue_is_refused(testbed: Testbed, german_data: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    run_dir = tmp_path / f"a 'run' of 100%d $(touch {marker.name}) \"x\""
    config = replace(run_config(german_data, run_dir), name=run_dir.name)
    longer = on_testbed(replace(config, train=replace(config.train, steps=100)), setup=[f"cd '{tmp_path}'"])
    job = submit([longer], command=["test"])
    wait_for_step(run_dir, 1)
    call("scontrol", "update", f"jobid={job}", "requeue=0")
    signal_script(job, "USR1")
    ended = wait_for(run_dir, has_ended)
    assert ended.state == "finished"
    assert [event["job"] for event in read_journal(run_dir).starts] == [job, ended.job]
    assert ended.job != job
    assert decisions(run_dir) == ["go_on", "finished"]
    assert not marker.exists()
    assert "Slurm did not requeue" in output(run_dir)
    assert look(run_dir).name == config.name
