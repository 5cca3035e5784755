"""`-m`: every combination of listed values, planned before the first one starts.

A point that is no possible layout, or cannot fit its devices, is a result like another: it is recorded with the reason and
not run. Whatever else is wrong refuses the whole sweep.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.check import check_config
from launch.compose import compose_config, expand_sweep
from launch.fit import machine_of_run, plan_run
from launch.sweep_record import SHORT, Entry, Verdict
from launch.sweep_settings import SweepConfig, SweepRequest, read_request
from steerscale.errors import ConfigError, LayoutError, SteerscaleError
from steerscale.planning.fit import Fit
from steerscale.planning.machine import read_calibration
from steerscale.planning.memory import estimate_memory
from steerscale.rundir import CONFIG
from steerscale.train.config import RunConfig

POINT = "point"
"""Among a point's values, the name that it has in sweep.points."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination."""

    entry: Entry
    """What is recorded of it."""
    config: RunConfig | None
    """Checked; None: no possible layout."""

    @property
    def title(self) -> str:
        """Its values of the swept keys; of a sweep over nothing, the run's name."""
        return self.entry.label or (self.config.name if self.config is not None else "")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Planned points."""

    directory: Path
    """Where it is recorded; the points' run directories are below it unless their names or run_dir say otherwise."""
    settings: SweepConfig
    points: list[Point]

    @property
    def runnable(self) -> list[Point]:
        """Points that can be run."""
        return [point for point in self.points if point.entry.verdict == "run"]


@dataclass(kw_only=True)
class _Draft:
    """A point on its way: a resolved configuration that is not checked yet."""

    values: dict[str, str]
    mapping: dict[str, Any]
    impossible: str = ""

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())


def plan_sweep(overrides: Sequence[str], *, config_name: str) -> Sweep:
    """All combinations, checked and held against their devices; nothing is written.

    Raises SteerscaleError naming the point, unless it is about one point's layout; LayoutError if no point is possible.
    """
    request = read_request(overrides)
    drafts = _compose(request, config_name=config_name)
    directory = _place(drafts, request)
    points = [_plan(draft, request.settings, directory) for draft in drafts]
    if all(point.config is None for point in points):
        first = points[0].entry
        raise LayoutError(_labelled(first.label, first.reason))
    return Sweep(directory=directory, settings=request.settings, points=points)


def _compose(request: SweepRequest, *, config_name: str) -> list[_Draft]:
    jobs = expand_sweep(request.lines)
    keys = [line.split("=", 1)[0].lstrip("+") for line in jobs[0]]
    swept = [place for place, values in enumerate(zip(*jobs)) if len(set(values)) > 1 or keys[place] in request.listed]
    drafts = []
    for name, together, job in ((name, lines, job) for name, lines in request.points.items() for job in jobs):
        values = {POINT: name} if name else {}
        values |= {keys[place]: job[place].split("=", 1)[1] for place in swept}
        job = [*together, *job]
        draft = _Draft(values=values, mapping={})
        try:
            draft.mapping = compose_config(job, config_name=config_name)
        except SteerscaleError as error:
            raise type(error)(_labelled(draft.label, str(error))) from error
        gpus = request.settings.gpus
        if gpus is not None and (data := _fill(draft, gpus, given=_sets(job, "parallel.data"))) is not None:
            # Once more, for names that refer to it.
            draft.mapping = compose_config([*job, f"parallel.data={data}"], config_name=config_name)
        drafts.append(draft)
    return drafts


def _sets(lines: Sequence[str], key: str) -> bool:
    return any(line.lstrip("+").startswith(f"{key}=") for line in lines)


def _fill(draft: _Draft, gpus: int, *, given: bool) -> int | None:
    """The data-parallel degree that makes up sweep.gpus ranks; None if it is set already or there is none."""
    parallel: Mapping[str, Any] = draft.mapping["parallel"]
    t, p, d = (parallel[key] for key in ("tensor", "pipeline", "data"))
    if given:
        if t * p * d != gpus:
            draft.impossible = f"tensor {t} x pipeline {p} x data {d} = {t * p * d} ranks are not sweep.gpus={gpus}"
        return None
    if gpus % (t * p):
        draft.impossible = f"tensor {t} x pipeline {p} = {t * p} does not divide sweep.gpus={gpus}"
        return None
    return None if gpus == t * p * d else gpus // (t * p)


def _place(drafts: Sequence[_Draft], request: SweepRequest) -> Path:
    """Give each draft a run directory of its own, by its swept values if its name does not; the sweep's directory."""
    settings = request.settings
    run_dirs = [Path(str(draft.mapping["run_dir"])).expanduser().absolute() for draft in drafts]
    names = [str(draft.mapping["name"]) for draft in drafts]
    tags = _tags([draft.values for draft in drafts])
    possible = [run_dir for draft, run_dir in zip(drafts, run_dirs) if not draft.impossible]
    distinct = len(set(possible)) == len(possible)
    if distinct and not (request.listed and len(set(run_dirs)) == 1):
        directory = _common(run_dirs) / (settings.name or _beginning(names, request.lines))
        if directory in run_dirs or (directory / CONFIG).is_file():
            directory = directory.with_name(f"{directory.name}_sweep")
        for draft, tag in zip(drafts, tags):
            if draft.impossible:  # its name may be another point's
                draft.mapping["run_dir"] = str(directory / tag)
        return directory
    for draft, run_dir, name, tag in zip(drafts, run_dirs, names, tags):
        base = run_dir.with_name(settings.name) if settings.name else run_dir
        draft.mapping.update(name=f"{settings.name or name}_{tag}", run_dir=str(base / tag))
    first = run_dirs[0] if len(set(run_dirs)) == 1 else _common(run_dirs) / _beginning(names, request.lines)
    directory = first.with_name(settings.name) if settings.name else first
    if (directory / CONFIG).is_file():
        raise ConfigError(
            f"run_dir={directory} is the directory of a single run, and the points of this sweep would be below it: choose "
            "another name or sweep.name"
        )
    return directory


def _tags(points: Sequence[Mapping[str, str]]) -> list[str]:
    """A short name for each point that can be a directory's, all different."""
    for shorten in (_shortened, str):
        tags = ["_".join(_tag(shorten(key), value) for key, value in values.items()) for values in points]
        # Names of directories have room for 255 bytes.
        if len(set(tags)) == len(tags) and all(0 < len(tag.encode()) <= 200 for tag in tags):
            return tags
    return [f"point{number}" for number in range(len(points))]


def _shortened(key: str) -> str:
    return SHORT.get(key, key.split(".")[-1])


def _tag(key: str, value: str) -> str:
    if key == POINT:
        return value
    text = "".join(char if char.isalnum() or char in ".-+" else "-" for char in value.strip("'\""))
    return f"{key}{text}" if text[:1].isdigit() else f"{key}-{text}"


def _common(run_dirs: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([run_dir.parent for run_dir in run_dirs]))


def _beginning(names: Sequence[str], lines: Sequence[str]) -> str:
    """What the points' names begin with, however many values are listed."""
    given = [line.split("=", 1)[1].strip("'\"") for line in lines if line.startswith("name=")]
    if given and "${" in given[-1]:
        shared = given[-1].split("${")[0]
    else:
        first, last = min(names), max(names)
        shared = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last)))
    return shared.strip("_-. /").replace("/", "-") or "sweep"


def _plan(draft: _Draft, settings: SweepConfig, directory: Path) -> Point:
    config, reason = None, draft.impossible
    if not reason:
        try:
            config = check_config(draft.mapping)
        except LayoutError as error:
            reason = str(error)
        except SteerscaleError as error:
            raise type(error)(_labelled(draft.label, str(error))) from error
    entry = Entry(
        values=draft.values,
        verdict="invalid",
        reason=reason,
        run_dir=os.path.relpath(draft.mapping["run_dir"], directory),
    )
    if config is None:
        return Point(entry=entry, config=None)
    run_dir = os.path.relpath(config.run_dir, directory)
    entry = replace(entry, layout=str(config.layout()), engine=config.engine.title, run_dir=run_dir)
    return Point(entry=_predicted(entry, config, settings), config=config)


def _predicted(entry: Entry, config: RunConfig, settings: SweepConfig) -> Entry:
    """The entry with predicted memory and time, and the verdict that follows."""
    verdict: Verdict = "run"
    if config.sae is not None or config.model.vocab_size is None:  # the planner knows nothing of SAEs
        return replace(entry, verdict=verdict)
    calibrated = read_calibration(Path(settings.calibration)) if settings.calibration else None
    machine = calibrated or machine_of_run(config)
    memory = estimate_memory(config.model, config.layout(), engine=config.engine)
    # Without a calibration fp32 has no peak to predict from.
    timed = machine is not None and (calibrated is not None or config.engine.precision != "fp32")
    plan = plan_run(config, machine) if machine is not None and timed else None
    device_gib = settings.memory_gib or (machine.memory_gib if machine is not None else None)
    reason = ""
    if device_gib is not None and not config.launcher.force:
        fit = Fit(memory=memory, device_gib=device_gib)
        if not fit.fits:
            verdict = "predicted_oom"
            usable = f"the {fit.usable_gib:,.2f} usable of {device_gib:g} GiB"
            reason = f"{fit.over_gib:,.2f} GiB more than {usable}: {fit.spoken_parts()}"
    return replace(
        entry,
        verdict=verdict,
        reason=reason,
        predicted_gib=memory.total_gib,
        device_gib=device_gib,
        predicted_seconds=None if plan is None else plan.time.total,
        predicted_tflops=None if plan is None else plan.throughput.model_tflops_per_gpu,
    )


def _labelled(label: str, text: str) -> str:
    # An error about the swept value itself begins with it already.
    return text if not label or text.startswith(label) else f"{label}: {text}"
