"""What a run's own word and Slurm's come to together."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from steerscale.cli import main
from steerscale.jobs.journal import Journal, read_journal, record
from steerscale.jobs.observe import combine, find_run_dirs, observe
from steerscale.jobs.slurm import Job
from steerscale.rundir import Status, lock, write_status

STARTED = [
    {"event": "submit", "job": "7", "time": 1.0},
    {"event": "start", "job": "7", "time": 2.0, "step": 0, "nodes": "n1"},
]


def _end(decision: str) -> dict[str, Any]:
    return {"event": "end", "job": "7", "time": 3.0, "decision": decision}


def test_a_job_that_waits_for_the_first_time_is_not_queued_again() -> None:
    waiting = Job(id="7", state="PENDING")
    assert combine(Status(state="created"), Journal(STARTED[:1]), waiting) == ("pending", "")
    assert "queued again" in combine(Status(state="stopped"), Journal(STARTED), waiting)[1]


@pytest.mark.parametrize(
    ("state", "cause", "events", "job", "expected"),
    [
        ("created", "", STARTED[:1], "PENDING", "pending"),
        ("created", "", STARTED[:1], "CONFIGURING", "running"),
        ("running", "", STARTED, "RUNNING", "running"),
        ("stopped", "", [*STARTED, _end("go_on")], "COMPLETING", "pending"),
        ("stopped", "", [*STARTED, _end("go_on")], "REQUEUED", "pending"),
        ("finished", "", [*STARTED, _end("finished")], "COMPLETING", "finished"),
        ("finished", "", [*STARTED, _end("finished")], None, "finished"),
        ("failed", "oom", [*STARTED, _end("failed")], "FAILED", "oom"),
        ("failed", "", [*STARTED, _end("failed")], "OUT_OF_MEMORY", "oom"),
        ("running", "", STARTED, "OUT_OF_MEMORY", "oom"),
        ("failed", "restarts", [*STARTED, _end("failed")], None, "failed"),
        ("running", "", STARTED, "TIMEOUT", "timeout"),
        ("running", "", [*STARTED, {**_end(""), "event": "term", "cause": "timeout"}], None, "timeout"),
        ("stopped", "cancelled", [*STARTED, _end("ended")], None, "cancelled"),
        ("created", "", [*STARTED[:1], {**_end(""), "event": "cancel"}], None, "cancelled"),
        ("running", "", STARTED, "CANCELLED", "cancelled"),
        ("running", "", STARTED, "NODE_FAIL", "node_failure"),
        ("running", "", STARTED, "PREEMPTED", "failed"),
        ("stopped", "", [*STARTED, _end("go_on")], "COMPLETED", "stopped"),
        ("stopped", "", [*STARTED, _end("go_on")], None, "stopped"),
        ("running", "", STARTED, None, "lost"),
        ("created", "", STARTED[:1], None, "lost"),
        ("running", "", STARTED, "COMPLETED", "lost"),
    ],
)
def test_state_of_a_run_with_a_job(state: Any, cause: str, events: list[Any], job: str | None, expected: str) -> None:
    status = Status(state=state, cause=cause, step=3, steps=10)
    known = Job(id="7", state=job) if job is not None else None
    assert combine(status, Journal(events), known)[0] == expected


def test_where_slurm_cannot_be_asked_the_last_word_is_shown_as_such() -> None:
    state, reason = combine(Status(state="running"), Journal(STARTED), None, asked=False)
    assert state == "running"
    assert "Slurm cannot be asked" in reason


def _local_run(tmp_path: Path, **status: Any) -> Path:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("name: mine\ntrain: {steps: 10}\n", encoding="utf-8")
    write_status(run_dir, Status(**status))
    return run_dir


def test_local_run_is_lost_once_its_launcher_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = _local_run(tmp_path, state="running", step=4, steps=10)
    record_of_speed = {"kind": "train", "step": 4, "time": 4e9, "eta_seconds": 60.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(record_of_speed) + "\n", encoding="utf-8")
    with lock(run_dir):
        assert main(["status", str(tmp_path), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["step"], shown["steps"], shown["job"]) == ("running", 4, 10, None)
    assert (shown["name"], shown["nodes"]) == ("mine", socket.gethostname())
    assert shown["eta_seconds"] >= 60
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["mine", "lost", "4/10"]


def test_local_run_out_of_memory(tmp_path: Path) -> None:
    run_dir = _local_run(tmp_path, state="failed", cause="oom", reason="rank 0: CUDA out of memory")
    (one,) = observe([run_dir])
    assert (one.state, one.reason) == ("oom", "rank 0: CUDA out of memory")


def test_cancel_points_to_the_launcher_of_a_local_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = _local_run(tmp_path, state="running")
    with lock(run_dir):
        assert main(["cancel", str(run_dir)]) == 2
    assert "press Ctrl-C in its launcher" in capsys.readouterr().out


def test_status_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "is no run directory and holds none" in capsys.readouterr().err


def test_journal_survives_a_line_cut_short(tmp_path: Path) -> None:
    record(tmp_path, "submit", "7")
    record(tmp_path, "start", "7", step=0)
    with (tmp_path / "slurm" / "jobs.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "sta')
    journal = read_journal(tmp_path)
    assert (journal.job, journal.restarts, len(journal.events)) == ("7", 0, 2)
    record(tmp_path, "submit", "8")  # nor does it take the next one with it
    assert read_journal(tmp_path).job == "8"


def test_a_run_that_cannot_be_read_hides_none_of_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _local_run(tmp_path, state="finished", step=10, steps=10)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("name: broken\n", encoding="utf-8")
    (broken / "status.json").write_text("{", encoding="utf-8")
    for command in ("status", "cancel", "resubmit"):
        assert main([command, str(tmp_path)]) == 0
        said = capsys.readouterr().out.splitlines()
        assert any("broken" in line and "unreadable" in line for line in said)
        assert any("finished" in line for line in said)


def test_runs_are_found_behind_links_and_not_inside_each_other(tmp_path: Path) -> None:
    run_dir = _local_run(tmp_path, state="finished")
    for inside in (run_dir / "wandb" / "files", tmp_path / ".run.17"):  # W&B's own, and one that is just being written
        inside.mkdir(parents=True)
        (inside / "config.yaml").write_text("{}", encoding="utf-8")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(run_dir)
    assert find_run_dirs([tmp_path]) == [run_dir, tmp_path / "runs" / "link"]


def test_a_job_that_cannot_be_cancelled_keeps_none_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        record(_local_run(tmp_path / name, state="running"), "submit", "7" if name == "one" else "8")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "squeue": "echo '7|RUNNING|n1|None'; echo '8|RUNNING|n1|None'",
        "scancel": '[ "$*" = 8 ] || { echo "scancel: error: Invalid job id specified" >&2; exit 1; }',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    assert main(["cancel", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "job 8 cancelled" in printed.out
    assert "scancel refused: scancel: error: Invalid job id specified" in printed.err
