"""Sweeps on a real Slurm of virtual nodes: as job arrays, and one after the other in an allocation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.sweep_record import read_record
from launch.sweep_table import read_table
from launch.train import main
from steerscale.jobs.journal import read_journal
from tests.slurm.testbed import Testbed, has_ended, wait_for

ROOT = Path(__file__).resolve().parents[2]
TINY = ["model.num_layers=2", "model.d_model=16", "model.d_ff=16", "model.num_heads=2", "model.seq_len=16"]


def arguments(data: Path, tmp_path: Path) -> list[str]:
    """A sweep of tiny models; a node has two ranks."""
    return [
        *("-m", "sweep=gas_mbs", "launcher=slurm", "cluster=testbed", "parallel.gradient_accumulation_steps=2"),
        *(f"data.path={data}", f"run_dir={tmp_path}/sweep", *TINY, "train.steps=3", "metrics.tensorboard=false"),
        *("metrics.warmup_steps=1", "cluster.time='00:05:00'", "cluster.memory=1G"),
    ]


def test_points_are_submitted_by_their_shape_and_failures_are_results(
    testbed: Testbed, german_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four points on one node and on two, two of them larger than any machine; then some that are not even submitted."""
    argv, sweep = arguments(german_data, tmp_path), tmp_path / "sweep"
    swept = [*argv, "parallel.micro_batch_size=1", "parallel.data=1,4", "model.d_ff=16,10000000000000"]
    assert main([*swept, "launcher.dry_run=true"]) == 0
    assert capsys.readouterr().out.count("#SBATCH --array=0-1") == 2
    assert not sweep.exists()
    assert main(swept) == 0
    said = capsys.readouterr().out
    assert said.count("submitted: job ") == 2
    assert "2 runs on 1 node x 1 rank each" in said
    assert "2 runs on 2 nodes x 2 ranks each" in said
    # While they wait or run: one that is there, one that cannot fit, and two that no layout can do.
    more = ["sweep.memory_gib=1.5", "parallel.data=1,3", "model.d_ff=16,1000000000"]
    assert main([*argv, "parallel.micro_batch_size=1", *more]) == 0
    again = capsys.readouterr().out
    assert "submitted: job" not in again
    assert "0 to run, 1 there already, 1 predicted not to fit, 2 impossible" in again
    entries = [entry for entry in read_record(sweep).points if entry.verdict == "run"]
    jobs = {str(read_journal(sweep / entry.run_dir).job) for entry in entries}
    assert (len(jobs), len({job.split("_")[0] for job in jobs})) == (4, 2)
    for entry in entries:
        wait_for(sweep / entry.run_dir, has_ended)
    rows = read_table(sweep)
    assert [row.state for row in rows] == ["finished"] * 2 + ["oom"] * 2 + ["predicted OOM"] + ["impossible"] * 2
    assert all(row.seconds for row in rows[:2])
    for row in rows[:2]:  # on several nodes a run begins with the preflight
        assert (row.run_dir / "preflight.json").is_file() == (" DP4 " in str(row.entry.layout))
    assert main(swept) == 0
    assert "4 points in" in (said := capsys.readouterr().out)
    assert "0 to run, 4 there already" in said


def test_points_run_one_after_the_other_in_an_allocation(testbed: Testbed, german_data: Path, tmp_path: Path) -> None:
    argv = [*arguments(german_data, tmp_path), "sweep.allocation=true", "parallel.data=2"]
    argv += ["parallel.micro_batch_size=1,2", "parallel.pipeline=1,2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.train", *argv]
    outside = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert outside.returncode == 2
    assert "get one with `salloc" in outside.stderr
    assert not (tmp_path / "sweep").exists()
    salloc = ["salloc", "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem=1G", "--time=10"]
    inside = subprocess.run(
        [*salloc, *command], capture_output=True, text=True, env=environment, check=False, timeout=400
    )
    assert inside.returncode == 2, inside.stdout + inside.stderr
    # Two nodes for four ranks are more than the allocation has: that is a result of these points, and the others have run.
    states = {row.entry.short: (row.state, row.reason) for row in read_table(tmp_path / "sweep")}
    finished = [short for short, (state, _) in states.items() if state == "finished"]
    assert sorted(finished) == ["gas=2 mbs=1 pp=1", "gas=2 mbs=2 pp=1"], inside.stdout + inside.stderr
    for short in ("gas=2 mbs=1 pp=2", "gas=2 mbs=2 pp=2"):
        assert states[short][0] == "not started"
        assert "needs 2 nodes of 2 ranks, this allocation has 1" in states[short][1]
