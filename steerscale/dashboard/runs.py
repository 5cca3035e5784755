"""What a run directory says about a run, in the figures people compare. Torch-free."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from steerscale.errors import SteerscaleError
from steerscale.metrics import read_records
from steerscale.rundir import CONFIG, read_config, read_status


@dataclass(frozen=True)
class Run:
    """One run."""

    path: Path
    config: dict[str, Any]
    state: str
    step: int
    layout: str
    device: str
    train: list[dict[str, Any]]
    """Records of kind "train" since the last start: a run may go on with another layout."""
    evaluations: list[dict[str, Any]]
    """Records of kind "eval"."""

    @property
    def name(self) -> str:
        """The run's name in its configuration."""
        return self.config["name"]

    def median(self, key: str) -> float | None:
        """Median of a figure over all reports that have it."""
        values = [record[key] for record in self.train if record.get(key) is not None]
        return median(values) if values else None

    def last(self, key: str) -> float | None:
        """The newest value of a figure of training."""
        return next((record[key] for record in reversed(self.train) if record.get(key) is not None), None)

    def last_evaluation(self, key: str) -> float | None:
        """The newest value of a figure of evaluation."""
        return self.evaluations[-1].get(key) if self.evaluations else None


def read_run(path: Path) -> Run:
    """Read a run directory. Raises SteerscaleError if it is none."""
    config = read_config(path)
    records = read_records(path)
    starts = [index for index, record in enumerate(records) if record["kind"] == "start"]
    start = records[starts[-1]] if starts else {}
    train = [record for record in records if record["kind"] == "train"]
    recent = [record for record in records[starts[-1] :] if record["kind"] == "train"] if starts else []
    return Run(
        path=path,
        config=config,
        state=read_status(path).state,
        step=train[-1]["step"] if train else 0,
        layout=start.get("layout", "?"),
        device=start.get("device", "?"),
        # A start that finds the run finished reports nothing: then what was measured before is what there is to show.
        train=recent or train,
        evaluations=[record for record in records if record["kind"] == "eval"],
    )


def find_runs(paths: list[Path]) -> list[Run]:
    """The runs at `paths` and below them, by path. Raises SteerscaleError if a path has none."""
    runs = []
    for path in paths:
        found = [path] if (path / CONFIG).is_file() else sorted(file.parent for file in path.glob(f"**/{CONFIG}"))
        if not found:
            raise SteerscaleError(f"{path} is no run directory and holds none: expected a {CONFIG} there or below")
        runs.extend(read_run(directory) for directory in found)
    return runs
