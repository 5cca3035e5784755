"""What an experiment is: a configuration, named stages in a directory, and a report of what they found. Torch-free.

runs/NAME/STAGE/            what a stage made; in parts/ what it had found out when it was interrupted
runs/NAME/STAGE/stage.json  written last: its settings, seconds and results; a stage that has one is not run again
runs/NAME/results.json      settings, results and seconds of all stages, and the environment
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerscale.config import require, to_mapping
from steerscale.errors import ConfigError
from steerscale.rundir import describe_environment, write_text
from steerscale.train.config import RunConfig

MARK, RESULTS = "stage.json", "results.json"
EXPERIMENTS = {
    "morph_bpe": "steerscale.experiments.morph_bpe",
    "othello": "steerscale.experiments.othello",
    "superposition": "steerscale.experiments.superposition",
}
"""Name -> module, imported when it is chosen, whose EXPERIMENT is the `Experiment`; sizes: configs/experiment/NAME/*.yaml."""

Results = dict[str, Any]
"""What a stage or an experiment found; goes through JSON."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """What every experiment can be told."""

    name: str
    """Name of the experiment's run."""
    run_dir: str
    """Its directory; starting again with the same one goes on with it."""
    seed: int = 0
    """Data, initial weights and everything drawn follow from it."""

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "name must not be empty: the directory is called after it")
        require(0 <= self.seed < 2**31, f"seed must be in [0, 2^31), got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a stage works with."""

    root: Path
    """Directory of the experiment, with those of all stages in it."""
    directory: Path
    """The stage's own; what an interrupted start left there is still in it."""
    train: Callable[[RunConfig], None]
    """Carry a training run to its end, in processes of its own; returns only if it is finished. A finished one returns at
    once, an interrupted one goes on from its last checkpoint."""
    progress: Callable[[int, int], None]
    """(done, total): tell how far the stage is."""
    settings: Results = field(default_factory=dict)
    """What the stage depends on, see `Stage.settings`."""

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns (JSON values), from an earlier start of the stage with the same settings if it got that far."""
        path = self.directory / "parts" / f"{name}.json"
        settings = json.loads(json.dumps(self.settings))
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == settings:
                return found["value"]
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps({"settings": settings, "value": make()}) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))["value"]

    def track(self, items: Sequence[Any]) -> Iterator[Any]:
        """The items, with progress after each."""
        for done, item in enumerate(items, 1):
            yield item
            self.progress(done, len(items))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of an experiment."""

    name: str
    """Also of its directory."""
    run: Callable[[Any, Bench], Results]
    """(the experiment's configuration, bench) -> results."""
    settings: tuple[str, ...]
    """Keys of the configuration, dotted where they lie deeper, that this stage depends on, beside those of the stages before
    it. What only concerns speed does not belong here."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A named list of stages."""

    config: type[ExperimentConfig]
    """Its configuration, a frozen dataclass."""
    stages: Sequence[Stage]
    """In order; each may read what those before it made."""
    report: Callable[[Any, dict[str, Results], Path], str]
    """(configuration, results by stage, the experiment's directory) -> the table to print; writes the plots."""


@dataclass(kw_only=True)
class Progress:
    """Lines with the time left, at most one every few seconds."""

    say: Callable[[str], None]
    """Takes a line."""
    interval: float = 5.0
    """Seconds between lines."""
    start: float = field(default_factory=time.monotonic)
    """When the work began."""
    _last: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        """So much is done."""
        now = time.monotonic()
        if now - max(self._last, self.start) < self.interval or done >= total:
            return
        self._last = now
        left = (now - self.start) * (total - done) / max(done, 1)
        self.say(f"  {done}/{total}, {left // 60:.0f}:{left % 60:02.0f} left")


def run_experiment(
    experiment: Experiment,
    config: ExperimentConfig,
    *,
    train: Callable[[RunConfig], None],
    say: Callable[[str], None],
    command: Sequence[str] = (),
) -> Results:
    """Run the stages that are still to be run, write results.json and the plots; returns what results.json holds.

    Args:
        train: see `Bench.train`.
        say: takes lines for the user.
        command: what started this, for the record.
    Raises ConfigError if a stage was made with other settings: nothing is thrown away unasked.
    """
    root, values = Path(config.run_dir), to_mapping(config)
    done = {stage.name: _finished(root, stage, _settings(experiment, stage, values)) for stage in experiment.stages}
    for number, stage in enumerate(experiment.stages, 1):
        title = f"[{number}/{len(experiment.stages)}] {stage.name}"
        if (found := done[stage.name]) is not None:
            say(f"{title}: done before, in {found['seconds']:.0f} s")
            continue
        say(title)
        directory = root / stage.name
        directory.mkdir(parents=True, exist_ok=True)
        start, settings = time.monotonic(), _settings(experiment, stage, values)
        progress = Progress(say=say)
        bench = Bench(root=root, directory=directory, train=train, progress=progress, settings=settings)
        results = stage.run(config, bench)
        made = {
            "settings": settings,
            "seconds": round(time.monotonic() - start, 2),
            "results": results,
        }
        write_text(directory / MARK, json.dumps(made, indent=1) + "\n")
        done[stage.name] = json.loads((directory / MARK).read_text(encoding="utf-8"))  # as a later start will find it
        say(f"{title}: {made['seconds']:.0f} s")
    finished = {name: made for name, made in done.items() if made is not None}
    whole = {
        "settings": values,
        "seconds": {name: made["seconds"] for name, made in finished.items()},
        "results": {name: made["results"] for name, made in finished.items()},
        "environment": describe_environment(command),
    }
    write_text(root / RESULTS, json.dumps(whole, indent=1) + "\n")
    say(experiment.report(config, whole["results"], root))
    return whole


def _settings(experiment: Experiment, stage: Stage, values: Results) -> Results:
    """Dotted key -> value of everything this stage and those before it depend on."""
    keys = ["seed"]
    for earlier in experiment.stages:
        keys += earlier.settings
        if earlier is stage:
            break
    settings = {}
    for key in keys:
        value: Any = values
        for part in key.split("."):
            value = value[part]
        settings[key] = value
    return settings


def _finished(root: Path, stage: Stage, settings: Results) -> Results | None:
    """What stage.json says; None: there is none yet. Raises ConfigError if it was made with other settings."""
    path = root / stage.name / MARK
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    before, now = _flat(found["settings"]), _flat(json.loads(json.dumps(settings)))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        (key, *_) = changed
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(
            f"stage {stage.name!r} in {root} was made with {key}={before.get(key)}, now it is {now.get(key)}{more}: start a "
            f"new one with name=..., or remove {path.parent} and what later stages made"
        )
    return found


def _flat(values: Results, at: str = "") -> Results:
    flat: Results = {}
    for key, value in values.items():
        flat |= _flat(value, f"{at}{key}.") if isinstance(value, dict) else {f"{at}{key}": value}
    return flat
