"""Running a planned sweep: point by point on this machine, or as few job arrays on a cluster. A failure is a result."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from launch.allocation import hosts_of_allocation, run_in_allocation
from launch.caution import warnings_about
from launch.slurm import submit_array
from launch.sweep import Point, Sweep
from launch.sweep_record import write_points, write_reason
from launch.sweep_table import format_table, observe_runs, read_table
from steerscale.config import dump_yaml, to_mapping
from steerscale.errors import ConfigError, SteerscaleError
from steerscale.jobs.observe import LIVE_STATES, Observation
from steerscale.jobs.script import nodes_and_tasks, render_script
from steerscale.rundir import CONFIG, is_held, read_config
from steerscale.train.config import RunConfig

FREE_SECTIONS = ("name", "run_dir", "train.steps", "launcher", "cluster", "checkpoint", "metrics")
"""What may differ between a point and the run that is there already: its result stays one of the same thing."""

Launch = Callable[[RunConfig], int]


def run_sweep(sweep: Sweep, launch: Launch) -> int:
    """Record the points and run those whose results are missing; a table at the end.

    Returns the worst exit status; a point that ran out of memory counts as a result. A point that fails does not keep the
    others from running, a stop does. Raises SteerscaleError if a finished point was run with other settings.
    """
    possible = [point for point in sweep.points if point.config is not None]
    (config, *others) = [point.config for point in possible if point.config is not None]
    if other := next((other for other in others if other.launcher.name != config.launcher.name), None):
        raise ConfigError(f"launcher={config.launcher.name},{other.launcher.name}: points of a sweep have one launcher")
    if config.launcher.name == "dry_run":
        worst = _one_by_one(sweep, possible, launch, recorded=False)
        for point in sweep.points:
            if point.config is None:
                print(f"\nimpossible: {point.title}: {point.entry.reason}", flush=True)
        return worst
    missing = _missing(sweep)
    if config.launcher.dry_run:
        return _show_arrays(sweep, missing)
    if sweep.settings.allocation and config.launcher.name == "slurm":
        hosts_of_allocation()  # before anything is written
    write_points(sweep.directory, [point.entry for point in sweep.points], command=sys.argv)
    _say_counts(sweep, missing)
    if config.launcher.name == "slurm" and sweep.settings.allocation:
        worst = _one_by_one(sweep, missing, run_in_allocation, recorded=True)
    elif config.launcher.name == "slurm":
        worst = _submit(sweep, missing)
    else:
        worst = _one_by_one(sweep, missing, launch, recorded=True)
    print(f"\n{format_table(read_table(sweep.directory))}", flush=True)
    return worst


def _one_by_one(sweep: Sweep, points: Sequence[Point], launch: Launch, *, recorded: bool) -> int:
    worst = 0
    for number, point in enumerate(points, start=1):
        print(f"\n[{number}/{len(points)}] {point.title}", flush=True)
        assert point.config is not None
        try:
            if recorded and not _missing(replace(sweep, points=[point])):
                print("another launcher has it, or had it meanwhile", flush=True)
                continue
            status, state = launch(point.config), "finished"
        except SteerscaleError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            status, state = 2, "not started"
            if recorded:
                write_reason(sweep.directory, point.entry.run_dir, str(error))
        else:
            if recorded:
                run_dir = Path(point.config.run_dir)
                state = observe_runs([run_dir])[run_dir].state
        worst = max(worst, 0 if state == "oom" else status)
        if state == "stopped":
            left = len(points) - number
            print(f"stopped with {left} more to come; start the same command again to go on", flush=True)
            break
    return worst


def _submit(sweep: Sweep, missing: Sequence[Point]) -> int:
    worst = 0
    for points in _groups(missing):
        configs = [point.config for point in points if point.config is not None]
        for warning in dict.fromkeys(text for config in configs for text in warnings_about(config)):
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        try:
            job = submit_array(configs, at_once=sweep.settings.at_once)
        except SteerscaleError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            for point in points:
                write_reason(sweep.directory, point.entry.run_dir, str(error))
            worst = 2
            continue
        print(f"submitted: job {job}, {_shape(configs)}", flush=True)
    return worst


def _show_arrays(sweep: Sweep, missing: Sequence[Point]) -> int:
    """What would be submitted, and nothing else."""
    for points in _groups(missing):
        configs = [point.config for point in points if point.config is not None]
        print(f"# {_shape(configs)}: {'; '.join(point.title for point in points)}")
        print(render_script(configs, at_once=sweep.settings.at_once))
    for point in sweep.points:
        if point.entry.verdict != "run":
            print(f"# not run: {point.title}: {point.entry.reason}")
    return 0


def _groups(points: Sequence[Point]) -> list[list[Point]]:
    """Points that one job array can hold: as many nodes, ranks on each, and the same cluster."""
    groups: dict[object, list[Point]] = {}
    for point in points:
        config = point.config
        assert config is not None
        key = (*nodes_and_tasks(config), dump_yaml(config.launcher), dump_yaml(config.cluster))
        groups.setdefault(key, []).append(point)
    return list(groups.values())


def _shape(configs: Sequence[RunConfig]) -> str:
    nodes, tasks = nodes_and_tasks(configs[0])
    runs = f"{len(configs)} run{'s' if len(configs) > 1 else ''}"
    return f"{runs} on {nodes} node{'s' if nodes > 1 else ''} x {tasks} rank{'s' if tasks > 1 else ''} each"


def _missing(sweep: Sweep) -> list[Point]:
    """Points to run now. Raises SteerscaleError if a run directory has the result of something else."""
    places = {Path(point.config.run_dir): point for point in sweep.runnable if point.config is not None}
    seen = observe_runs([run_dir for run_dir in places if (run_dir / CONFIG).is_file()])
    return [
        point
        for run_dir, point in places.items()
        if run_dir not in seen or _is_missing(point, run_dir, seen[run_dir], retry=sweep.settings.retry)
    ]


def _is_missing(point: Point, run_dir: Path, seen: Observation, *, retry: bool) -> bool:
    assert point.config is not None
    if seen.state in LIVE_STATES or is_held(run_dir):
        return False
    ended = seen.state == "finished" and seen.step >= point.config.train.steps
    failed = seen.state in ("failed", "oom", "timeout") and not retry
    if ended or failed:
        _refuse_other(point.config, run_dir, seen.state)
    return not (ended or failed)


def _refuse_other(config: RunConfig, run_dir: Path, state: str) -> None:
    before, now = _flat(read_config(run_dir)), _flat(to_mapping(config))
    differing = [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_SECTIONS)
    ]
    if differing:
        raise SteerscaleError(
            f"run_dir={run_dir} is {state} with other settings ({'; '.join(differing[:4])}): choose another name, or "
            "sweep.name, or remove it"
        )


def _flat(mapping: object, at: str = "") -> dict[str, object]:
    if not isinstance(mapping, dict):
        return {at: mapping}
    flat: dict[str, object] = {}
    for key, value in mapping.items():
        flat.update(_flat(value, f"{at}.{key}" if at else str(key)))
    return flat


def _say_counts(sweep: Sweep, missing: Sequence[Point]) -> None:
    verdicts = [point.entry.verdict for point in sweep.points]
    parts = [
        f"{len(missing)} to run",
        *([f"{there} there already"] if (there := verdicts.count("run") - len(missing)) else []),
        *([f"{verdicts.count('predicted_oom')} predicted not to fit"] if "predicted_oom" in verdicts else []),
        *([f"{verdicts.count('invalid')} impossible"] if "invalid" in verdicts else []),
    ]
    print(f"sweep of {len(verdicts)} points in {sweep.directory}: {', '.join(parts)}", flush=True)
