"""Train a model: `python -m launch.train experiment=german_demo parallel.tensor=2 parallel.pipeline=2`.

Configuration is composed by Hydra from configs/: `group=option` chooses a file of a group (model=6.7b), `key=value` sets a
value (optim.lr=2e-4). See docs/configuration.md for every key.

    launcher=local      run the ranks on this machine (default)
    launcher=dry_run    check everything, build the chosen ranks' shards without memory, print the plan, start nothing
    -m, --multirun      values may be lists (parallel.tensor=1,2): every combination runs, one after the other
    --cfg               print the composed configuration and stop
    --config-name NAME  another file of configs/ than train.yaml
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.check import check_config
from launch.compose import compose_config, expand_sweep, groups, parse_overrides, sweeps
from steerscale.config import dump_yaml
from steerscale.errors import ConfigError, SteerscaleError
from steerscale.rundir import create_run_dir
from steerscale.train.config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a user's error, 1 for a failed run."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.epilog = f"config groups: {', '.join(groups())}"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="group=option or key=value")
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination of listed values")
    parser.add_argument("--cfg", action="store_true", help="print the configuration and stop")
    parser.add_argument("--config-name", default="train", metavar="NAME", help="primary configuration (default: train)")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.multirun:
            return _sweep(args.overrides, config_name=args.config_name)
        listed = [override for override in parse_overrides(args.overrides) if sweeps(override)]
        if listed:
            raise ConfigError(f"{listed[0].input_line} lists several values: add -m to run them all")
        config = check_config(compose_config(args.overrides, config_name=args.config_name))
        if args.cfg:
            print(dump_yaml(config), end="")
            return 0
        return launch(config)
    except SteerscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def launch(config: RunConfig) -> int:
    """Start a checked run, or only show it."""
    if config.launcher.name == "dry_run":
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # shards are built on the meta device, with Megatron-Core redirected to it
        )
        from launch.dry_run import show_plan

        print(show_plan(config))
        return 0
    from launch.local import run_local

    run_dir = Path(config.run_dir)
    existed = create_run_dir(run_dir, config, command=sys.argv)
    print(f"{'resuming' if existed else 'new run'}: {run_dir}", flush=True)
    return run_local(config)


def _sweep(overrides: Sequence[str], *, config_name: str) -> int:
    """Check all combinations first, then run them one after the other; the worst exit status."""
    jobs = expand_sweep(overrides)
    configs = []
    for job in jobs:
        try:
            configs.append(check_config(compose_config(job, config_name=config_name)))
        except SteerscaleError as error:
            raise type(error)(f"{' '.join(job)}: {error}") from error
    directories = [config.run_dir for config in configs]
    if len(set(directories)) < len(directories):
        raise ConfigError(
            "several points of the sweep share a run directory: put the swept keys in its name, e.g. "
            "name='gpt_tp${parallel.tensor}'"
        )
    worst = 0
    for number, (job, config) in enumerate(zip(jobs, configs), start=1):
        print(f"\n[{number}/{len(jobs)}] {' '.join(job)}", flush=True)
        worst = max(worst, launch(config))
    return worst


if __name__ == "__main__":
    sys.exit(main())
