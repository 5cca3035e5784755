"""How runs stand: what the run directory says, and what Slurm says of its job, put together. Torch-free."""

import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steerscale.errors import LaunchError, SteerscaleError
from steerscale.jobs.journal import Journal, read_journal
from steerscale.jobs.slurm import WAITING, Job, query
from steerscale.metrics import read_records
from steerscale.rundir import CONFIG, Status, is_held, read_config, read_status

logger = logging.getLogger(__name__)

RunState = Literal[
    "created",
    "pending",
    "running",
    "stopped",
    "finished",
    "failed",
    "oom",
    "timeout",
    "cancelled",
    "node_failure",
    "lost",
    "unreadable",
]
LIVE_STATES: tuple[RunState, ...] = ("pending", "running")
ENDED_STATES: tuple[RunState, ...] = ("stopped", "failed", "oom", "timeout", "cancelled", "node_failure", "lost")
"""Those in which a run is neither done nor going on by itself."""

# Slurm's last word on a job that ended without one of the run's own.
ENDED: dict[str, RunState] = {
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "OUT_OF_MEMORY": "oom",
    "CANCELLED": "cancelled",
    "NODE_FAIL": "node_failure",
    "FAILED": "failed",
    "BOOT_FAIL": "failed",
    "PREEMPTED": "failed",
}


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One run as it stands now."""

    path: Path
    name: str
    state: RunState
    reason: str
    """Why it waits, stopped or failed; empty if there is nothing to say."""
    step: int
    steps: int
    eta_seconds: float | None
    """Until its last step, if it runs and has measured its speed."""
    age_seconds: float | None
    """Since the run last wrote its status; None: never."""
    job: str | None
    """Its newest job; None: it runs without Slurm."""
    restarts: int
    """How often it was started again since it was submitted."""
    nodes: str
    """Where it runs or ran last, if that is known."""


def find_run_dirs(paths: Sequence[Path]) -> list[Path]:
    """The run directories at `paths` and below. Raises SteerscaleError if a path has none."""
    found: dict[Path, None] = {}
    for path in paths:
        here = [path] if (path / CONFIG).is_file() else sorted(_below(path))
        if not here:
            raise SteerscaleError(f"{path} is no run directory and holds none: expected a {CONFIG} there or below")
        found.update(dict.fromkeys(here))
    return list(found)


def _below(path: Path) -> Iterator[Path]:
    """Run directories below `path`, links to some as well. What is inside one belongs to it (W&B has a config.yaml of its own
    there), and hidden ones are being written."""
    for place, directories, _ in os.walk(path):
        here = [Path(place) / name for name in directories if not name.startswith(".")]
        runs = [directory for directory in here if (directory / CONFIG).is_file()]
        yield from runs
        directories[:] = [directory.name for directory in here if directory not in runs]


def observe(run_dirs: Sequence[Path]) -> list[Observation]:
    """How these runs stand. Slurm is asked once for all; if it cannot be asked there is a warning, and what the runs say
    themselves. A run that cannot be read keeps none of the others from being told."""
    journals = {run_dir: read_journal(run_dir) for run_dir in run_dirs}
    ids = {journal.job for journal in journals.values() if journal.job is not None}
    jobs: dict[str, Job] = {}
    asked = shutil.which("squeue") is not None
    try:
        jobs = query(ids)
    except LaunchError as error:  # the run directories have something to say as well
        asked = False
        logger.warning("Slurm cannot be asked: %s", error)
    seen = []
    for run_dir, journal in journals.items():
        try:
            seen.append(_observe(run_dir, journal, jobs.get(journal.job or ""), asked=asked))
        except SteerscaleError as error:
            seen.append(_unreadable(run_dir, journal, str(error)))
    return seen


def _unreadable(run_dir: Path, journal: Journal, reason: str) -> Observation:
    return Observation(
        path=run_dir,
        name=run_dir.name,
        state="unreadable",
        reason=reason,
        step=0,
        steps=0,
        eta_seconds=None,
        age_seconds=None,
        job=journal.job,
        restarts=journal.restarts,
        nodes="",
    )


def _observe(run_dir: Path, journal: Journal, job: Job | None, *, asked: bool) -> Observation:
    status, config = read_status(run_dir), read_config(run_dir)
    # A run that had a job may have been taken up by a launcher here.
    if journal.job is None or (status.state == "running" and status.host == socket.gethostname() and is_held(run_dir)):
        state, reason = _local_state(run_dir, status)
    else:
        state, reason = combine(status, journal, job, asked=asked)
    starts = journal.starts
    return Observation(
        path=run_dir,
        name=str(config.get("name", run_dir.name)),
        state=state,
        reason=reason,
        step=status.step,
        steps=status.steps or int((config.get("train") or {}).get("steps", 0)),
        eta_seconds=_eta(run_dir, status.step) if state == "running" else None,
        age_seconds=max(time.time() - status.updated, 0.0) if status.updated else None,
        job=journal.job,
        restarts=journal.restarts,
        nodes=(
            job.nodes if job is not None and job.nodes else str(starts[-1].get("nodes", "")) if starts else status.host
        ),
    )


def combine(status: Status, journal: Journal, job: Job | None, *, asked: bool = True) -> tuple[RunState, str]:
    """State and reason of a run that has or had a job.

    Args:
        status: the run's own word.
        journal: with at least one job.
        job: what Slurm knows of the newest one; None: nothing.
        asked: whether Slurm could be asked at all.
    """
    if job is not None and job.live:
        return _live(status, journal, job)
    if status.state == "finished":
        return "finished", ""
    told = ENDED.get(job.state) if job is not None else None
    if told == "oom":
        return (
            "oom",
            status.reason if status.state == "failed" else "Slurm ended the job for want of memory: cluster.memory",
        )
    by_cause: dict[str, RunState] = {"oom": "oom", "cancelled": "cancelled", "timeout": "timeout"}
    if status.cause in by_cause:
        return by_cause[status.cause], status.reason
    if status.state == "failed":
        return "failed", status.reason
    if journal.cancelled or journal.ended_by == "cancelled":
        return "cancelled", f"at step {status.step}"
    if journal.ended_by == "timeout":
        return "timeout", "the job's time limit ended it before it could stop"
    if told is not None and job is not None:
        return told, f"job {job.id} ended as {job.state}" + (f" ({job.reason})" if job.reason else "")
    if status.state == "stopped":
        return "stopped", status.reason
    if not asked:
        return ("running" if status.state == "running" else "created"), "as last written: Slurm cannot be asked here"
    what = f"ended as {job.state}" if job is not None else "is unknown to Slurm"
    return "lost", f"job {journal.job} {what}, and the run left no word of its end: see its logs"


def _live(status: Status, journal: Journal, job: Job) -> tuple[RunState, str]:
    last = journal.events[-1]
    if job.state in WAITING or (job.state == "COMPLETING" and last.get("decision") == "go_on"):
        if not journal.starts:
            return "pending", job.reason
        return "pending", f"{job.reason or 'is being queued again'}, to go on from its newest checkpoint"
    if status.state in ("finished", "failed", "stopped") and last["event"] == "end":  # the job is tidying up
        return combine(status, journal, None, asked=True)
    return "running", status.reason if status.state == "running" else ""


def _local_state(run_dir: Path, status: Status) -> tuple[RunState, str]:
    if status.state == "running":
        # Its launcher holds the directory as long as it lives; of another machine that cannot be told.
        if status.host == socket.gethostname() and not is_held(run_dir):
            return "lost", "no launcher runs any more: start the same command again to go on from the last checkpoint"
        return "running", status.reason
    if status.cause == "oom":
        return "oom", status.reason
    return status.state, status.reason


def _eta(run_dir: Path, step: int) -> float | None:
    """What the newest report said, less the time since."""
    reports: list[dict[str, Any]] = read_records(run_dir, "train")
    eta = reports[-1].get("eta_seconds") if reports and reports[-1]["step"] == step else None
    return max(eta - (time.time() - reports[-1]["time"]), 0.0) if eta is not None else None
