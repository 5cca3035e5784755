"""Train a model: `python -m launch.train experiment=german_demo parallel.tensor=2 parallel.pipeline=2`.

Configuration is composed by Hydra from configs/: `group=option` chooses a file of a group (model=6.7b), `key=value` sets a
value (optim.lr=2e-4). Every key with its meaning is in docs/configuration.md.

    launcher=local      run the ranks on this machine (default)
    launcher=slurm      submit them as a job to cluster=NAME; with launcher.dry_run=true only show the job
    -m sweep=gas_mbs    run every combination of listed values, what does not fit left out (docs/sweeps.md)
    launcher=dry_run    check everything, build the chosen ranks' shards without memory, print the plan, start nothing

Starting the same command again resumes the run in run_dir (runs/<name>). Errors of the configuration exit with status 2 and
leave nothing behind.
"""

import argparse
import difflib
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml

from launch.caution import warnings_about
from launch.check import check_config
from launch.compose import compose_config, groups, options, parse_overrides
from launch.fit import refuse_oversized
from launch.sae_plan import show_sae_plan
from launch.slurm import show_job, submit_run
from launch.sweep import Point, plan_sweep
from launch.sweep_run import run_sweep
from launch.sweep_settings import is_about_sweeps
from steerscale.config import dump_yaml
from steerscale.errors import ConfigError, SteerscaleError
from steerscale.jobs.submit import refuse_live
from steerscale.rundir import create_run_dir
from steerscale.train.config import RunConfig

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells count."""
OPTIONS = ("--help", "--multirun", "--cfg", "--config-name")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a user's error, 1 for a failed run."""
    try:
        args = _parse(argv)
        name, overrides = args.config_name, args.overrides
        if args.multirun:
            sweep = plan_sweep(overrides, config_name=name)
            if not args.cfg:
                # Ranks in processes of their own: one that runs out of memory must not take the sweep with it.
                return run_sweep(sweep, functools.partial(launch, in_process=False))
            _print("---\n".join(map(_document, sweep.points)).rstrip())
            return 0
        parsed = parse_overrides(overrides)
        if about := [override for override in parsed if is_about_sweeps(override.key_or_group)]:
            raise ConfigError(f"{about[0].input_line} is about sweeps: add -m to run one, or leave it out")
        if listed := [override for override in parsed if override.is_sweep_override()]:
            raise ConfigError(f"{listed[0].input_line} lists several values: add -m to run them all, or choose one")
        if args.cfg:
            _show(overrides, config_name=name)
            return 0
        return launch(check_config(compose_config(overrides, config_name=name)))
    except SteerscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # between runs, or before one; ranks are asked to stop (`launch.local`)
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def launch(config: RunConfig, *, in_process: bool = True) -> int:
    """Start a checked run, or only show it; `in_process` as for `run_local`."""
    for warning in warnings_about(config):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if config.launcher.name == "dry_run" and config.sae is not None:
        _print(show_sae_plan(config))
        return 0
    if config.launcher.name == "dry_run":
        # Shards are built on the meta device, with Megatron-Core redirected to it: no GPU may be in sight.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from launch.dry_run import show_plan

        _print(show_plan(config))
        return 0
    refuse_oversized(config)
    if config.launcher.name == "slurm":
        if config.launcher.dry_run:
            _print(show_job(config))
            return 0
        return submit_run(config)
    from launch.local import run_local

    run_dir = Path(config.run_dir)
    existed = create_run_dir(run_dir, config, command=sys.argv, check=functools.partial(refuse_live, [run_dir]))
    print(f"{'resuming' if existed else 'new run'}: {run_dir}", flush=True)
    return run_local(config, in_process=in_process)


def _document(point: Point) -> str:
    if point.config is None:
        return f"# {point.title}: {point.entry.reason}\n"
    return f"# {point.title}\n{dump_yaml(point.config)}"


def _show(overrides: Sequence[str], *, config_name: str) -> None:
    """The configuration as YAML: complete and checked if it can be run, else as far as it goes, with what is missing."""
    mapping = compose_config(overrides, config_name=config_name, partial=True)
    missing = _missing(mapping)
    data = mapping.get("data") or {}
    if not (data.get("path") or data.get("blend")) and (mapping.get("launcher") or {}).get("name") != "dry_run":
        missing.append("data.path")
    if not missing:
        _print(dump_yaml(check_config(mapping)).rstrip())
        return
    _print(yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True).rstrip())
    print(f"note: not checked, since a run needs {', '.join(missing)} as well", file=sys.stderr)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; nothing is left to flush at the end into a closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _missing(mapping: dict, at: str = "") -> list[str]:
    keys = [f"{at}{key}" for key, value in mapping.items() if value == "???"]
    return keys + [
        k for key, value in mapping.items() if isinstance(value, dict) for k in _missing(value, f"{at}{key}.")
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python -m launch.train --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    choices = "\n".join(f"  {group:<12}{', '.join(options(group))}" for group in groups())
    parser = _Parser(
        prog="python -m launch.train",
        description=__doc__,
        epilog=f"config groups and their options:\n{choices}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="group=option or key=value")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="values may be lists (parallel.tensor=1,2): run every combination"
    )
    parser.add_argument("--cfg", action="store_true", help="print the configuration as YAML and stop")
    parser.add_argument(
        "--config-name",
        default="train",
        metavar="NAME",
        help="a file of configs/ (default: train), or the path of a whole configuration: runs/gpt/config.yaml",
    )
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise ConfigError(_unknown_option(unknown[0]))
    return args


def _unknown_option(option: str) -> str:
    bare = option.lstrip("-")
    if "." in bare or "=" in bare or bare in groups():
        example = bare if "=" in bare else f"{bare}=VALUE"
        return f"unknown option {option}: settings are written without dashes and with =, like {example}"
    close = [name for name in OPTIONS if name.startswith(option)] or difflib.get_close_matches(option, OPTIONS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(OPTIONS)}; settings are written key=value"
    return f"unknown option {option}: {hint}"


if __name__ == "__main__":
    sys.exit(main())
