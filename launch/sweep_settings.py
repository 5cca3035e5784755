"""What concerns a sweep as a whole: keys `sweep.*`, and files of configs/sweep/ that list what to vary."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override

from launch.compose import CONFIGS, options, parse_overrides
from steerscale.config import from_mapping, load_yaml, require
from steerscale.errors import ConfigError

PREFIX = "sweep."
POINTS = "sweep.points"
_PLAIN = re.compile(r"[A-Za-z0-9_.+-]+")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Keys of a sweep, not of its points."""

    name: str | None = None
    """Name of the sweep and its directory; null: the points' common name."""
    gpus: int | None = None
    """Ranks of every point: parallel.data is what tensor and pipeline leave, unless it is given; null: as the points say."""
    retry: bool = False
    """Run points again that failed, ran out of memory or out of time."""
    at_once: int | None = None
    """launcher=slurm: points of a job array that may run at the same time; null: as many as there is room for."""
    allocation: bool = False
    """launcher=slurm: run the points one after the other in the allocation that this command is in, all on the same nodes."""
    memory_gib: float | None = None
    """Memory of each rank's device, beyond which a point is not run; null: that of the GPUs, where they are known."""
    calibration: str | None = None
    """File that `steerscale plan --calibrate` wrote, to predict iteration times with; null: the planner's own constants."""

    def __post_init__(self) -> None:
        require(self.name is None or bool(self.name.strip()), "sweep.name must not be empty: leave it out")
        require(
            self.name is None or "/" not in self.name,
            f"sweep.name={self.name} must be one name: where runs go is run_dir's to say",
        )
        for key in ("gpus", "at_once", "memory_gib"):
            value = getattr(self, key)
            require(value is None or value > 0, f"sweep.{key} must be positive or null, got {value}")


class SweepRequest(NamedTuple):
    """A command line with -m, taken apart."""

    settings: SweepConfig
    lines: list[str]
    """Overrides of the points, those of a file first."""
    listed: set[str]
    """Keys that the file lists, swept even where the command line leaves one value of them, and so sweep.points."""
    points: Mapping[str, list[str]]
    """Overrides that belong together, by name (sweep.points of the file); one without a name where there are none."""


def is_about_sweeps(key: str) -> bool:
    """Whether an override's key is none of a run's."""
    return key == "sweep" or key.startswith(PREFIX)


def read_request(overrides: Sequence[str]) -> SweepRequest:
    """Settings, points and file of a sweep. Raises ConfigError for what cannot be read or is unknown."""
    parsed = parse_overrides(overrides)
    own = {override.key_or_group: override for override in parsed if is_about_sweeps(override.key_or_group)}
    lines = [str(o.input_line) for o in parsed if not is_about_sweeps(o.key_or_group)]
    for override in own.values():
        if override.key_or_group == POINTS:
            raise ConfigError(f"{override.input_line}: named points stand in a file, sweep=FILE.yaml")
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: what concerns the whole sweep cannot be swept, give one value")
    content = _read_file(own.pop("sweep")) if "sweep" in own else {}
    given = {override.key_or_group for override in parsed}
    named = _named(content.pop(POINTS, None), given=given)
    settings = {key.removeprefix(PREFIX): value for key, value in content.items() if key.startswith(PREFIX)}
    settings |= {key.removeprefix(PREFIX): override.value() for key, override in own.items()}
    points = {key: value for key, value in content.items() if not key.startswith(PREFIX)}
    from_file = [_line(key, value) for key, value in points.items() if key not in given]
    listed = {key for key, value in points.items() if isinstance(value, list)} | {POINTS for name in named if name}
    return SweepRequest(from_mapping(SweepConfig, settings, at="sweep"), [*from_file, *lines], listed, named)


def _named(content: Any, *, given: set[str]) -> dict[str, list[str]]:
    """Overrides of each named point, but for keys that the command line gives."""
    if content is None:
        return {"": []}
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{POINTS} must have names with keys below them, like small: {{model.d_model: 64}}")
    points = {}
    for name, values in content.items():
        if not (_PLAIN.fullmatch(str(name)) and str(name)[0].isalnum()):
            raise ConfigError(f"{POINTS}: {name!r} becomes a directory's name: use letters, digits and any of _ . + -")
        if not isinstance(values, dict) or any(isinstance(value, (dict, list)) for value in values.values()):
            raise ConfigError(
                f"{POINTS}: {name} must have keys with their dots and one value each, like model.d_model: 64"
            )
        points[str(name)] = [_line(key, value) for key, value in values.items() if key not in given]
    return points


def _read_file(override: Override) -> dict[str, Any]:
    value = str(override.value())
    path = Path(value) if value.endswith((".yaml", ".yml")) else CONFIGS / "sweep" / f"{value}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{override.input_line}: there is no {path}; choose one of {', '.join(options('sweep'))}, or the path of a file "
            "ending in .yaml"
        )
    content = load_yaml(path)
    for key, value in content.items():
        if isinstance(value, dict) and key != POINTS:
            raise ConfigError(f"{path}: {key} must be written with its dots, like parallel.tensor: [1, 2]")
        if key == "sweep":
            raise ConfigError(f"{path}: a file of a sweep cannot name another one")
    return dict(content)


def _line(key: str, value: Any) -> str:
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"{key} is swept over no value at all: list some")
        return f"{key}={','.join(map(_text, value))}"
    return f"{key}={_text(value)}"


def _text(value: Any) -> str:
    """A value of YAML in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    text = str(value)
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return text if not isinstance(value, str) or _PLAIN.fullmatch(text) else f"'{quoted}'"
