"""What became of a run in Slurm, in run_dir/slurm/jobs.jsonl: one JSON object a line, appended by whoever did it.

submit    a job was submitted for the run          start     a job began, or began again
chained   a job submitted its successor            end       the ranks have ended, and what was decided then
cancel    somebody asked to end the run            term      Slurm asked the job to end: cancelled, or out of time
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Event = Literal["submit", "chained", "start", "end", "cancel", "term"]


def slurm_directory(run_dir: Path) -> Path:
    """Where scripts, output and journal of a run's jobs are."""
    return run_dir / "slurm"


def record(run_dir: Path, event: Event, job: str, **details: Any) -> None:
    """Append an event of `job`. Raises OSError if it cannot be written."""
    directory = slurm_directory(run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "job": job, "time": round(time.time(), 3), **details}) + "\n"
    with (directory / "jobs.jsonl").open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if size and file.read(1) != b"\n":  # the last one was cut short: it must not take this one with it
            line = "\n" + line
        file.write(line.encode())  # one short write: lines of a job and of a user do not mix


@dataclass(frozen=True)
class Journal:
    """The events of one run, the oldest first."""

    events: Sequence[dict[str, Any]]

    @property
    def job(self) -> str | None:
        """The newest job of the run: a number, or NUMBER_INDEX in an array; None if it never had one."""
        return next((e["job"] for e in reversed(self.events) if e["event"] in ("submit", "chained", "start")), None)

    def since(self, *names: Event) -> list[dict[str, Any]]:
        """Events after the newest one of these names; all if there is none."""
        positions = [index for index, event in enumerate(self.events) if event["event"] in names]
        return list(self.events[positions[-1] + 1 :]) if positions else list(self.events)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts since the run was last submitted by somebody."""
        return [event for event in self.since("submit") if event["event"] == "start"]

    @property
    def restarts(self) -> int:
        """How often the run was started again since it was last submitted by somebody."""
        return max(len(self.starts) - 1, 0)

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to end the run after it was last submitted."""
        return any(event["event"] == "cancel" for event in self.since("submit"))

    @property
    def ended_by(self) -> str | None:
        """Why Slurm asked the newest start to end, timeout or cancelled; None if it did not."""
        return next((e["cause"] for e in self.since("submit", "chained", "start") if e["event"] == "term"), None)


def read_journal(run_dir: Path) -> Journal:
    """The run's journal, empty if it was never submitted; a line cut short by a full disk is left out."""
    path = slurm_directory(run_dir) / "jobs.jsonl"
    events = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and {"event", "job", "time"} <= event.keys():
                events.append(event)
    return Journal(events)
