"""`steerscale status`: how runs stand, from their directories and from Slurm."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "status",
        help="how runs stand: waiting, running, how far, how they ended",
        description="State of the runs at and below the given directories, local ones and Slurm jobs.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, or directories of them")
    parser.add_argument("--json", action="store_true", help="a list of objects, times in seconds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print a table, or JSON."""
    from steerscale.jobs.observe import find_run_dirs, observe

    runs = observe(find_run_dirs(args.runs))
    if args.json:
        print(json.dumps([{**dataclasses.asdict(one), "path": str(one.path)} for one in runs], indent=1))
    else:
        print(format_status(runs))


def format_status(runs: Any) -> str:
    """`Observation`s as rows."""
    from steerscale.metrics import format_duration

    def spoken(seconds: float | None) -> str:
        return "-" if seconds is None else format_duration(seconds)

    rows = [("run", "state", "step", "ETA", "updated", "job", "restarts", "reason")]
    rows += [
        (
            one.name,
            one.state,
            f"{one.step:,}/{one.steps:,}",
            spoken(one.eta_seconds),
            "-" if one.age_seconds is None else f"{spoken(one.age_seconds)} ago",
            one.job or "local",
            str(one.restarts) if one.job else "-",
            one.reason,
        )
        for one in runs
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    right = (2, 3, 4, 6)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
