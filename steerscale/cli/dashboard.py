"""`steerscale dashboard`: runs side by side."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "dashboard",
        help="throughput and loss of runs",
        description="Table of the runs at and below the given directories.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, or directories of them")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table; for a single run also its evaluations."""
    from steerscale.dashboard.runs import find_runs
    from steerscale.dashboard.table import format_evaluations, format_table

    runs = find_runs(args.runs)
    print(format_table(runs))
    if len(runs) == 1 and runs[0].evaluations:
        print("\n" + format_evaluations(runs[0]))
