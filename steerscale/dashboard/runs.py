"""What a run directory says about a run, in the figures people compare. Torch-free."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from steerscale.config import from_mapping
from steerscale.engines.config import EngineConfig
from steerscale.errors import ConfigError, SteerscaleError
from steerscale.metrics import read_records
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelConfig, ParallelLayout
from steerscale.planning.memory import estimate_memory
from steerscale.rundir import CONFIG, read_config, read_status

Progress = Callable[[int, int], None]
"""Told (directories read, directories in all)."""


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
    reason: str = ""
    """Why it stopped or failed."""
    history: Sequence[dict[str, Any]] = ()
    """Records of kind "train" of all starts."""
    starts: Sequence[dict[str, Any]] = ()
    """Records of kind "start"."""
    skips: Sequence[dict[str, Any]] = ()
    """Records of kind "skip"."""

    @property
    def name(self) -> str:
        """The run's name in its configuration."""
        return str(self.config.get("name", self.path.name))

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

    def step_seconds(self) -> list[float]:
        """Seconds of each timed step since the last start; of each report, its mean, where steps were not written down."""
        return [seconds for record in self.train for seconds in step_seconds(record)]


@dataclass(frozen=True)
class BrokenRun:
    """A directory that looks like a run and cannot be read."""

    path: Path
    reason: str


def step_seconds(record: dict[str, Any]) -> list[float]:
    """Seconds of each timed step of a report, or their mean alone."""
    mean = record.get("seconds_per_step")
    return record.get("step_seconds") or ([] if mean is None else [mean])


def read_run(path: Path) -> Run:
    """Read a run directory. Raises SteerscaleError if it is none."""
    config = read_config(path)
    status = read_status(path)
    records = _checked(path, read_records(path))
    starts = [index for index, record in enumerate(records) if record["kind"] == "start"]
    start = records[starts[-1]] if starts else {}
    history = [record for record in records if record["kind"] == "train"]
    recent = [record for record in records[starts[-1] :] if record["kind"] == "train"] if starts else []
    return Run(
        path=path,
        config=config,
        state=status.state,
        step=history[-1]["step"] if history else 0,
        layout=str(start.get("layout", "?")),
        device=str(start.get("device", "?")),
        # A start that finds the run finished reports nothing: then what was measured before is what there is to show.
        train=recent or history,
        evaluations=[record for record in records if record["kind"] == "eval"],
        reason=status.reason,
        history=history,
        starts=[records[index] for index in starts],
        skips=[record for record in records if record["kind"] == "skip"],
    )


NUMBERS = (
    *("time", "loss", "perplexity", "bits_per_byte", "seconds_per_step", "tokens_per_second_per_gpu", "mfu", "hfu"),
    *("model_tflops_per_gpu", "hardware_tflops_per_gpu", "legacy_tflops_per_gpu", "peak_tflops", "bubble_fraction"),
    *("memory_peak_gib_max", "data_seconds_max", "first_sample", "end_sample"),
)
"""What figures are computed from: a number or nothing, in any record that has it."""
LARGEST = sys.float_info.max
"""Neither NaN nor infinity nor a whole number that no float holds is below it."""


def _checked(path: Path, records: list[Any]) -> list[dict[str, Any]]:
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or "step" not in record:
            raise SteerscaleError(f"{path / 'metrics.jsonl'} holds something else than records: entry {number}")
        steps = record.get("step_seconds") or []
        if type(record["step"]) is not int:
            raise SteerscaleError(
                f"{path / 'metrics.jsonl'}, entry {number}: step must be a whole number, got {record['step']!r}"
            )
        values = {"step": [record["step"]], "step_seconds": steps if isinstance(steps, list) else [steps]}
        values.update({key: [record[key]] for key in NUMBERS if record.get(key) is not None})
        for key, entries in values.items():
            if not all(type(entry) in (int, float) and abs(entry) <= LARGEST for entry in entries):
                raise SteerscaleError(
                    f"{path / 'metrics.jsonl'}, entry {number}: {key} must be a finite number, got {record[key]!r}"
                )
    return records


def find_directories(paths: Sequence[Path], *, none_is_fine: bool = False) -> list[Path]:
    """The run directories at `paths` and below them, each once. Raises SteerscaleError if a path has none, unless
    `none_is_fine`."""
    found: dict[Path, Path] = {}
    for path in paths:
        directories = [path] if (path / CONFIG).is_file() else sorted(_below(path))
        if not directories and not none_is_fine:
            raise SteerscaleError(f"{path} is no run directory and holds none: expected a {CONFIG} there or below")
        for directory in directories:
            found.setdefault(directory.resolve(), directory)
    return list(found.values())


def _below(path: Path) -> Iterator[Path]:
    """Run directories below `path`; what is inside one belongs to it, and hidden ones are being written."""
    for place, directories, files in os.walk(path):
        directories[:] = [name for name in directories if not name.startswith(".")]
        if CONFIG in files:
            directories.clear()
            yield Path(place)


def scan_runs(paths: Sequence[Path], progress: Progress = lambda done, total: None) -> Iterator[Run | BrokenRun]:
    """Read the runs at and below `paths`, one after the other; what cannot be read comes as a `BrokenRun`.

    Raises SteerscaleError if a path has no run directory at all.
    """
    directories = find_directories(paths)
    for index, directory in enumerate(directories):
        progress(index, len(directories))
        yield read_or_broken(directory)
    progress(len(directories), len(directories))


def read_or_broken(directory: Path) -> Run | BrokenRun:
    """The run in a directory, or why it cannot be read."""
    try:
        return read_run(directory)
    except (SteerscaleError, OSError, UnicodeDecodeError) as error:
        return BrokenRun(directory, str(error))


def find_runs(paths: list[Path]) -> list[Run]:
    """The runs at `paths` and below them, by path. Raises SteerscaleError if a path has none or one cannot be read."""
    return [read_run(directory) for directory in find_directories(paths)]


def run_layout(config: dict[str, Any]) -> ParallelLayout | None:
    """The layout a run's configuration asks for; None if it is not one that this version understands."""
    try:
        return ParallelLayout.resolve(from_mapping(ParallelConfig, config.get("parallel") or {}))
    except ConfigError:
        return None


def run_engine(config: dict[str, Any]) -> EngineConfig | None:
    """The engine a run's configuration asks for; None if it is not one that this version understands."""
    try:
        return from_mapping(EngineConfig, config.get("engine") or {})
    except ConfigError:
        return None


def predicted_memory_gib(config: dict[str, Any]) -> float | None:
    """Memory of the fullest rank as `planning.memory` predicts it; None where the configuration is no GPT's it knows, or the
    model is frozen and SAEs are trained."""
    if config.get("sae") is not None:
        return None
    layout, engine = run_layout(config), run_engine(config)
    try:
        model = from_mapping(ModelConfig, config.get("model") or {})
        if layout is None or engine is None or model.vocab_size is None:
            return None
        return estimate_memory(model, layout, engine=engine).total_gib
    except ConfigError:
        return None


def flatten(config: Any, at: str = "") -> dict[str, Any]:
    """A nested configuration as {dotted key: value}; lists and empty mappings are values."""
    if not isinstance(config, dict) or not config:
        return {at: config} if at else {}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{at}.{key}" if at else str(key)))
    return flat
