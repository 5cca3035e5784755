"""`steerscale ds-config`: a DeepSpeed configuration from elsewhere as overrides of ours."""

import argparse
from pathlib import Path
from typing import Any

from steerscale.engines.deepspeed_import import read_ds_config


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "ds-config",
        help="translate a DeepSpeed ds_config.json",
        description="Print a DeepSpeed ds_config.json as overrides for `python -m launch.train`; name what has no counterpart.",
    )
    parser.add_argument("file", type=Path, help="the ds_config.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the overrides; then what happens anyway; then what was left out."""
    found = read_ds_config(args.file)
    print(" \\\n  ".join(f"{key}={_written(value)}" for key, value in found.overrides.items()))
    for title, keys in (("as it is anyway", found.already), ("not translated", found.unmapped)):
        if keys:
            print(f"\n{title}:")
            width = max(map(len, keys))
            for key, reason in keys.items():
                print(f"  {key:<{width}}  {reason}")
    return 0


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
