"""sweep.json of a sweep's directory: its points, what was thought of them beforehand, and where they were run. Torch-free.

How the runs went is not in it: that is in their run directories.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from steerscale.config import from_mapping
from steerscale.errors import SteerscaleError
from steerscale.rundir import write_text

RECORD = "sweep.json"
FORMAT = 1

SHORT = {
    "parallel.tensor": "tp",
    "parallel.pipeline": "pp",
    "parallel.virtual_pipeline": "vpp",
    "parallel.data": "dp",
    "parallel.sequence": "sp",
    "parallel.micro_batch_size": "mbs",
    "parallel.gradient_accumulation_steps": "gas",
    "parallel.global_batch_size": "gbs",
}
"""What these keys are called in the names of run directories and in tables; others by their last part."""

Verdict = Literal["run", "invalid", "predicted_oom"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One point as it is recorded."""

    values: dict[str, str]
    """Its values of the swept keys, as they were written."""
    verdict: Verdict
    """run; invalid: no possible layout; predicted_oom: the planner says that it cannot fit."""
    reason: str = ""
    """Why it is not run, or could not be started."""
    layout: str | None = None
    """As `ParallelLayout` writes itself; null if there is none."""
    engine: str | None = None
    """As `EngineConfig` writes itself; null if there is no layout."""
    run_dir: str
    """Relative to the sweep's directory."""
    predicted_gib: float | None = None
    """Of the fullest rank, as `planning.memory` estimates it; null: unknown."""
    device_gib: float | None = None
    """Memory of each rank's device; null: unknown."""
    predicted_seconds: float | None = None
    """Of an iteration; null: unknown."""
    predicted_tflops: float | None = None
    """Model FLOPs in 1e12/s a rank that follow from it."""

    @property
    def label(self) -> str:
        """The values in a line."""
        return " ".join(f"{key}={value}" for key, value in self.values.items())

    @property
    def short(self) -> str:
        """The same with short keys, for tables."""
        return " ".join(f"{SHORT.get(key, key.split('.')[-1])}={value}" for key, value in self.values.items())


@dataclass(frozen=True, kw_only=True)
class Record:
    """A sweep's file."""

    format: int = FORMAT
    updated: float = 0.0
    """Unix time of the last change."""
    command: list[str] = field(default_factory=list)
    """The last command line."""
    points: list[Entry] = field(default_factory=list)
    """Those of all command lines, each once."""


def read_record(directory: Path) -> Record:
    """The record of a sweep. Raises SteerscaleError if there is none or it cannot be read."""
    path = directory / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SteerscaleError(f"{directory} is no directory of a sweep: it has no {RECORD}") from None
    except (OSError, ValueError) as error:
        raise SteerscaleError(f"{path} cannot be read: {error}") from error
    if isinstance(content, dict) and content.get("format") != FORMAT:
        raise SteerscaleError(f"{path} has format {content.get('format')!r}, this version reads {FORMAT}")
    return from_mapping(Record, content, at=RECORD)


def write_points(directory: Path, points: Sequence[Entry], *, command: Sequence[str]) -> Record:
    """Write the points down beside those of earlier commands, which they replace where they are the same."""
    before = read_record(directory).points if (directory / RECORD).is_file() else []
    now = {entry.run_dir for entry in points}
    kept = [entry for entry in before if entry.run_dir not in now]
    record = Record(updated=round(time.time(), 3), command=list(command), points=[*kept, *points])
    _write(directory, record)
    return record


def write_reason(directory: Path, run_dir: str, reason: str) -> None:
    """Note why a point could not be started; empty: it could."""
    record = read_record(directory)
    points = [replace(entry, reason=reason) if entry.run_dir == run_dir else entry for entry in record.points]
    _write(directory, replace(record, points=points, updated=round(time.time(), 3)))


def _write(directory: Path, record: Record) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / RECORD, json.dumps(asdict(record), indent=1) + "\n")
