"""`steerscale resubmit`: submit runs again that ended before their last step."""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "resubmit",
        help="submit runs again that failed or were stopped",
        description="Submit the runs at and below the given directories again, each as a job of its own: they go on from their "
        "newest checkpoints. Runs that are finished, wait or run are left alone.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, or directories of them")
    parser.add_argument(
        "--state",
        action="append",
        metavar="STATE",
        help="only runs in this state as `steerscale status` shows it, e.g. oom, failed, timeout; may be repeated",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="cluster.KEY=VALUE",
        help="another setting of the cluster, e.g. cluster.time=24:00:00; may be repeated",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Submit what may be submitted; exit status 2 if Slurm refused one."""
    from steerscale.config import from_mapping
    from steerscale.errors import ConfigError, SteerscaleError
    from steerscale.jobs.observe import ENDED_STATES, find_run_dirs, observe
    from steerscale.jobs.submit import resubmit
    from steerscale.planning.cluster import ClusterConfig
    from steerscale.rundir import read_config
    from steerscale.train.config import RunConfig

    states = args.state or list(ENDED_STATES)
    if unknown := [state for state in states if state not in ENDED_STATES]:
        raise ConfigError(f"--state {unknown[0]}: choose from {', '.join(ENDED_STATES)}")
    settings = _parse_settings(args.settings)
    failed = False
    for one in observe(find_run_dirs(args.runs)):
        if one.state not in states:
            print(f"{one.path}: left alone, it is {one.state}")
            continue
        try:
            config = from_mapping(RunConfig, read_config(one.path))
            config = replace(config, run_dir=str(one.path.absolute()))  # it may have been moved
            if config.cluster is None:
                raise ConfigError(
                    f"it has no cluster: python -m launch.train --config-name {one.path}/config.yaml starts it here"
                )
            cluster = from_mapping(ClusterConfig, {**asdict(config.cluster), **settings}, at="cluster")
            job = resubmit(config, cluster=cluster, command=sys.argv)
        except SteerscaleError as error:
            print(f"{one.path}: not submitted: {error}", file=sys.stderr)
            failed = True
        else:
            print(f"{one.path}: job {job}, from step {one.step}")
    return 2 if failed else 0


def _parse_settings(texts: list[str]) -> dict[str, Any]:
    """Settings of the section cluster; the values are YAML, but text where the section holds text."""
    import typing

    import yaml

    from steerscale.config import unknown_key
    from steerscale.errors import ConfigError
    from steerscale.planning.cluster import ClusterConfig

    hints = typing.get_type_hints(ClusterConfig)
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name = key.removeprefix("cluster.")
        if not equals or name == key:
            raise ConfigError(
                f"--set {text}: write cluster.KEY=VALUE; what is not the cluster's is changed with launch.train"
            )
        if name not in hints:
            raise ConfigError(unknown_key(key, name, hints))
        holds_text = hints[name] is str or hints[name] == (str | None)
        # 24:00:00 is a number in YAML.
        try:
            settings[name] = value if holds_text and value != "null" else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: {value!r} cannot be read as YAML") from error
    return settings
