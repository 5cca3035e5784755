"""`-m`: every combination of listed values, one run after the other, and a table at the end."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.check import check_config
from launch.compose import compose_config, expand_sweep
from steerscale.errors import ConfigError, SteerscaleError
from steerscale.metrics import read_records
from steerscale.rundir import STATUS, read_status
from steerscale.train.config import RunConfig


class Point(NamedTuple):
    """One combination."""

    label: str
    """Its values of the keys that differ between points."""
    config: RunConfig


def plan_sweep(overrides: Sequence[str], *, config_name: str) -> list[Point]:
    """All combinations, checked before the first one starts. Raises SteerscaleError naming the one that cannot run."""
    jobs = expand_sweep(overrides)
    swept = [position for position, values in enumerate(zip(*jobs)) if len(set(values)) > 1]
    points = []
    for job in jobs:
        label = " ".join(job[position] for position in swept)
        try:
            points.append(Point(label, check_config(compose_config(job, config_name=config_name))))
        except SteerscaleError as error:
            # An error about the swept value itself begins with it already.
            raise type(error)(str(error) if str(error).startswith(label) else f"{label}: {error}") from error
    _check_directories(points, keys=[jobs[0][position].split("=")[0] for position in swept])
    return points


def run_sweep(points: Sequence[Point], launch: Callable[[RunConfig], int]) -> int:
    """Run the points one after the other; the worst exit status. A point that fails does not keep the others from running,
    one that is stopped by a signal does."""
    worst, stopped = 0, False
    for number, (label, config) in enumerate(points, start=1):
        print(f"\n[{number}/{len(points)}] {label or config.name}", flush=True)
        try:
            status = launch(config)
        except SteerscaleError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            status = 2
        worst = max(worst, status)
        stopped = config.launcher.name != "dry_run" and _state(config) == "stopped"
        if stopped:
            print(f"stopped at point {number} of {len(points)}; start the same command again to go on", flush=True)
            break
    if any(config.launcher.name != "dry_run" for _, config in points):
        print(f"\n{sweep_table(points)}", flush=True)
    return worst


def sweep_table(points: Sequence[Point]) -> str:
    """Status, last loss and throughput of each point, from its run directory."""
    rows = [("point", "status", "step", "loss", "held-out", "tokens/s/rank", "run directory")]
    for label, config in points:
        run_dir = Path(config.run_dir)
        train = read_records(run_dir, "train")
        held_out = [record["loss"] for record in read_records(run_dir, "eval") if record.get("loss") is not None]
        losses = [record["loss"] for record in train if record.get("loss") is not None]
        speeds = [speed for record in train if (speed := record.get("tokens_per_second_per_gpu")) is not None]
        rows.append(
            (
                label or config.name,
                _state(config),
                str(train[-1]["step"]) if train else "-",
                f"{losses[-1]:.4f}" if losses else "-",
                f"{held_out[-1]:.4f}" if held_out else "-",
                f"{speeds[-1]:,.0f}" if speeds else "-",
                config.run_dir,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    numbers = range(2, 6)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in numbers else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


def _state(config: RunConfig) -> str:
    run_dir = Path(config.run_dir)
    if not (run_dir / STATUS).is_file():
        return "not started"
    try:
        return read_status(run_dir).state
    except SteerscaleError:
        return "unknown"


def _check_directories(points: Sequence[Point], *, keys: Sequence[str]) -> None:
    directories = [str(Path(config.run_dir).resolve()) for _, config in points if config.launcher.name != "dry_run"]
    if len(set(directories)) < len(directories):
        again = next(directory for directory in directories if directories.count(directory) > 1)
        # A group has no value of its own that a name could refer to.
        names = [f"{key.split('.')[-1]}${{{key}}}" if "." in key else f"${{{key}.d_model}}" for key in keys]
        raise ConfigError(
            f"several points of the sweep share run_dir={again}: put what differs into the name, e.g. "
            f"name='gpt_{'_'.join(names)}'"
        )
