"""`status`, `cancel` and `resubmit` on a real Slurm, with accounting and without; sbatch's refusals."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerscale.cli import main as steerscale
from steerscale.errors import ConfigError, LaunchError
from steerscale.jobs.journal import read_journal
from steerscale.jobs.slurm import query, signal_script
from steerscale.jobs.submit import submit
from tests.slurm.testbed import PATIENCE_SECONDS, Testbed, call, has_ended, look, on_testbed, wait_for, wait_for_step
from tests.train.runs import prepare, run_config


def test_commands_tell_the_truth_at_each_stage(
    testbed: Testbed, german_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    base = run_config(german_data, run_dir)
    endless = replace(base, train=replace(base.train, steps=100_000, eval_interval=0))
    submit([on_testbed(endless, max_restarts=0, gres="gpu", options={"begin": "now+1hour"})], command=["test"])
    waiting = look(run_dir)
    assert (waiting.state, waiting.reason, waiting.restarts) == ("pending", "BeginTime", 0)
    assert _say(capsys, "cancel", run_dir).endswith(f"job {waiting.job} cancelled at step 0")
    assert wait_for(run_dir, has_ended).state == "cancelled"
    assert _say(capsys, "cancel", run_dir).endswith("nothing to cancel, it is cancelled")

    assert "left alone, it is cancelled" in _say(capsys, "resubmit", run_dir, "--state", "oom")
    assert "from step 0" in _say(
        capsys, "resubmit", run_dir, "--set", "cluster.options={}", "--set", "cluster.gres=null"
    )
    wait_for_step(run_dir, 2)
    assert "left alone, it is running" in _say(capsys, "resubmit", run_dir)
    job = look(run_dir).job
    assert job is not None
    signal_script(job, "USR1")
    failed = wait_for(run_dir, has_ended)
    assert failed.state == "failed"
    assert "cluster.max_restarts=0" in failed.reason
    stopped_at = failed.step

    _say(capsys, "resubmit", run_dir, "--state", "failed")
    wait_for_step(run_dir, stopped_at + 1)
    _say(capsys, "cancel", run_dir, "--checkpoint")
    cancelled = wait_for(run_dir, has_ended)
    assert cancelled.state == "cancelled"
    assert cancelled.reason == f"it was cancelled; a checkpoint of step {cancelled.step} is there"
    assert cancelled.step > stopped_at
    assert [event["step"] for event in read_journal(run_dir).starts] == [stopped_at]
    assert "cancelled" in _say(capsys, "status", run_dir)


def test_a_run_gets_one_job_where_it_is(
    testbed: Testbed, german_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    config = on_testbed(run_config(german_data, run_dir), options={"begin": "now+1hour"})
    prepare(config)
    with ThreadPoolExecutor() as threads:  # somebody submits twice at once
        both = [threads.submit(submit, [config], command=["test"]) for _ in range(2)]
    (error,) = (one.exception() for one in both if one.exception() is not None)
    assert isinstance(error, ConfigError)
    assert [event["event"] for event in read_journal(run_dir).events] == ["submit"]
    assert call("squeue", "--noheader", "--format=%j").split() == [config.name]
    _say(capsys, "cancel", run_dir)
    wait_for(run_dir, has_ended)

    run_dir.rename(moved)
    assert "from step 0" in _say(capsys, "resubmit", moved)
    assert not run_dir.exists()
    assert look(moved).state == "pending"
    _say(capsys, "cancel", moved)


REFUSALS: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "partition": (
        {"partition": "nowhere"},
        2,
        "invalid partition specified: nowhere",
        "cluster.partition (now nowhere)",
    ),
    "time": ({"time": "2:00:00", "max_time": None}, 2, "time limit is invalid", "cluster.time (now 2:00:00)"),
    "nodes": ({"gpus_per_node": 1}, 4, "Node count specification invalid", "cluster.gpus_per_node (now 1)"),
    "memory": ({"memory": "9T"}, 2, "Memory specification can not be satisfied", "cluster.memory (now 9T)"),
    "gres": ({"gres": "fpga"}, 2, "Invalid generic resource (gres) specification", "cluster.gres (now fpga)"),
    "cpus": ({"cpus_per_task": 99}, 2, "More processors requested than permitted", "cluster.cpus_per_task (now 99)"),
    "option": ({"options": {"colour": "red"}}, 2, "unrecognized option '--colour=red'", "cluster.options"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_shown_as_they_are_with_the_key_to_change(
    case: str, testbed: Testbed, german_data: Path, tmp_path: Path
) -> None:
    cluster, ranks, words, key = REFUSALS[case]
    config = on_testbed(run_config(german_data, tmp_path / "run", parallel={"data": ranks}), **cluster)
    with pytest.raises(LaunchError) as refused:
        submit([config], command=["test"])
    assert words in str(refused.value)
    assert key in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_without_accounting_a_forgotten_job_is_lost(testbed: Testbed, german_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    submit([on_testbed(run_config(german_data, run_dir), setup=["exit 3"])], command=["test"])
    assert wait_for(run_dir, has_ended).state == "failed"
    testbed.forget()
    assert look(run_dir).state == "lost"
    assert steerscale(["resubmit", str(run_dir), "--state", "lost"]) == 0
    assert wait_for(run_dir, has_ended).state == "failed"


def test_accounting_knows_what_the_queue_has_forgotten(
    accounted_testbed: Testbed, german_data: Path, tmp_path: Path
) -> None:
    settings: dict[str, dict[str, Any]] = {
        "cancelled": {"options": {"begin": "now+1hour"}},
        "failed": {"setup": ["exit 3"]},
    }
    for name, cluster in settings.items():
        submit([on_testbed(run_config(german_data, tmp_path / name), **cluster)], command=["test"])
    waiting = look(tmp_path / "cancelled").job
    assert waiting is not None
    call("scancel", waiting)
    for name in settings:
        assert wait_for(tmp_path / name, has_ended).state == name
    words = {"cancelled": "CANCELLED", "failed": "FAILED"}
    for name, word in words.items():
        # The controller tells the accounting later; killed before that, it has the job written off as cancelled.
        job, deadline = str(look(tmp_path / name).job), time.monotonic() + PATIENCE_SECONDS
        while word not in call("sacct", "--allocations", "--noheader", "--jobs", job, "--format", "State"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    accounted_testbed.forget()
    for name, word in words.items():
        one = wait_for(tmp_path / name, lambda one, name=name: one.state == name)  # sacct lags some seconds
        assert one.job is not None
        assert query([one.job])[one.job].state == word


def _say(capsys: pytest.CaptureFixture[str], command: str, run_dir: Path, *options: str) -> str:
    """What a command says."""
    assert steerscale([command, str(run_dir), *options]) == 0
    return capsys.readouterr().out.strip()
