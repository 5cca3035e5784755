"""`steerscale cancel`: end the Slurm jobs of runs."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "cancel",
        help="end the jobs of runs",
        description="End the waiting and running jobs of the runs at and below the given directories. Slurm gives the ranks of "
        "a running job some seconds (KillWait, often 30) for a last checkpoint.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, or directories of them")
    parser.add_argument(
        "--checkpoint",
        action="store_true",
        help="let running jobs write a checkpoint first, however long that takes, instead of ending them at once",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Cancel what is live; exit status 2 if something runs here that only its own launcher can end, or Slurm refuses one."""
    from steerscale.errors import LaunchError
    from steerscale.jobs import slurm
    from steerscale.jobs.journal import record
    from steerscale.jobs.observe import LIVE_STATES, find_run_dirs, observe

    left = False
    for one in observe(find_run_dirs(args.runs)):
        if one.state not in LIVE_STATES:
            print(f"{one.path}: nothing to cancel, it is {one.state}")
        elif one.job is None:
            print(f"{one.path}: runs on {one.nodes or 'this machine'} without Slurm: press Ctrl-C in its launcher")
            left = True
        else:
            # First the word, then the deed: the job's script looks it up when its ranks have ended.
            record(one.path, "cancel", one.job)
            try:
                if args.checkpoint and one.state == "running":
                    slurm.signal_script(one.job, "USR1")
                    print(f"{one.path}: job {one.job} will end after this step and a checkpoint")
                else:
                    slurm.cancel([one.job])
                    print(f"{one.path}: job {one.job} cancelled at step {one.step}")
            except LaunchError as error:  # one that has just ended, say: the others are still to be ended
                print(f"{one.path}: {error}", file=sys.stderr)
                left = True
    return 2 if left else 0
