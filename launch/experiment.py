"""Run a whole experiment, from its data to its plots: `python -m launch.experiment othello/small`.

NAME/SIZE is a file of configs/experiment/; `key=value` changes one of its settings. The stages leave their results in run_dir
(runs/<name>); starting the same command again goes on where it ended, and skips what is there. A stage that was made with
other settings is an error: nothing is thrown away unasked.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import launch.compose
from launch.check import check_config
from launch.compose import compose_config
from launch.train import launch as launch_run
from steerscale.config import dump_yaml, from_mapping, to_mapping
from steerscale.errors import ConfigError, SteerscaleError
from steerscale.experiments.stages import EXPERIMENTS, Experiment, ExperimentConfig, run_experiment
from steerscale.rundir import CONFIG, lock, read_config, read_status
from steerscale.train.config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a user's error, 1 for a failed or stopped one."""
    try:
        args = _parse(argv)
        experiment, config = load_experiment(args.experiment, args.overrides)
        if args.cfg:
            print(dump_yaml(config).rstrip())
            return 0
        run_dir = Path(config.run_dir)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run_dir={run_dir} cannot be made: {error.strerror}; choose another") from error
        with lock(run_dir):
            run_experiment(experiment, config, train=train, say=_say, command=sys.argv)
        return 0
    except SteerscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: start the same command again to go on", file=sys.stderr)
        return 130


def load_experiment(name: str, overrides: Sequence[str] = ()) -> tuple[Experiment, ExperimentConfig]:
    """The experiment and its configuration. Raises ConfigError for anything unknown.

    Args:
        name: NAME/SIZE.
        overrides: key=value, in Hydra's grammar.
    """
    known = sizes()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise ConfigError(f"there is no experiment {name!r}: {hint}")
    experiment: Experiment = importlib.import_module(EXPERIMENTS[name.split("/")[0]]).EXPERIMENT
    file = launch.compose.CONFIGS / "experiment" / f"{name}.yaml"
    mapping = compose_config(overrides, config_name=str(file), schema=experiment.config)
    return experiment, from_mapping(experiment.config, mapping)


def sizes() -> dict[str, str]:
    """NAME/SIZE -> the first line of its file's comment."""
    directory = launch.compose.CONFIGS / "experiment"
    files = [path for name in EXPERIMENTS for path in sorted((directory / name).glob("*.yaml"))]
    return {
        f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for path in files
    }


def train(config: RunConfig) -> None:
    """Carry a run to its end as launch.train does, in processes of its own. Raises SystemExit if it stops before."""
    checked = check_config(to_mapping(config))
    run_dir = Path(checked.run_dir)
    there = (run_dir / CONFIG).is_file() and read_config(run_dir) == to_mapping(checked)
    if there and read_status(run_dir).state == "finished":
        return
    status = launch_run(checked, in_process=False)
    state = read_status(run_dir).state
    if status or state != "finished":
        print(f"the run {checked.run_dir} is {state}: start the same command again to go on", file=sys.stderr)
        raise SystemExit(status or 1)


def _say(line: str) -> None:
    print(line, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python -m launch.experiment --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    known = sizes()
    width = max(map(len, known)) + 2
    listed = "\n".join(f"  {name:<{width}}{text}" for name, text in known.items())
    parser = _Parser(
        prog="python -m launch.experiment",
        description=__doc__,
        epilog=f"experiments:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", metavar="NAME/SIZE", help="one of the experiments below")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change, e.g. seed=1")
    parser.add_argument("--cfg", action="store_true", help="print the configuration as YAML and stop")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
