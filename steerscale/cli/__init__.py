"""`steerscale`: one command, a module here for each sub-command; the only place in the library that prints.

A sub-command module has `add_parser(subparsers)`, which registers its parser and sets `run=function(args) -> int | None`.
Heavy imports belong inside `run`, so that `--help` and torch-free commands answer at once.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from steerscale.errors import SteerscaleError

COMMANDS = (
    "tokenizer",
    "data",
    "sample",
    "steer",
    "serve",
    "probe",
    "dashboard",
    "export",
    "plan",
    "ds_config",
    "profile",
    "scaling",
    "sae",
    "status",
    "cancel",
    "resubmit",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a user's error)."""
    parser = argparse.ArgumentParser(prog="steerscale", description=importlib.import_module("steerscale").__doc__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        importlib.import_module(f"steerscale.cli.{command}").add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        status = args.run(args) or 0
        sys.stdout.flush()  # not at the end of the process, where nothing can be done about a reader that has gone
        return status
    except SteerscaleError as error:
        print(f"steerscale: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output has seen enough, like `head`; at its end the process would try to write the rest again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("steerscale: interrupted", file=sys.stderr)
        return 130
