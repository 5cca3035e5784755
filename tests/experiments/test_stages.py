"""Stages: what is skipped, what is refused, what is written."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from steerscale.errors import ConfigError
from steerscale.experiments.stages import (
    MARK,
    RESULTS,
    Bench,
    Experiment,
    ExperimentConfig,
    Progress,
    Results,
    Stage,
    run_experiment,
)


@dataclass(frozen=True, kw_only=True)
class Adding(ExperimentConfig):
    """Adds numbers."""

    first: int = 1
    second: int = 2
    speed: int = 0


class Adder:
    """An experiment of two stages that remembers which ones ran."""

    def __init__(self, root: Path) -> None:
        self.root, self.ran, self.said, self.fails = root, [], [], False

    def one(self, config: Adding, bench: Bench) -> Results:
        self.ran.append("one")
        (bench.directory / "sum.txt").write_text(str(config.first))
        return {"sum": config.first}

    def two(self, config: Adding, bench: Bench) -> Results:
        self.ran.append("two")
        if self.fails:
            raise RuntimeError
        return {"sum": int((bench.root / "one" / "sum.txt").read_text()) + config.second}

    def __call__(self, **settings: int) -> Results:
        experiment = Experiment(
            config=Adding,
            stages=[
                Stage(name="one", run=self.one, settings=("first",)),
                Stage(name="two", run=self.two, settings=("second",)),
            ],
            report=lambda config, results, root: f"the sum is {results['two']['sum']}",
        )
        config = Adding(name="adding", run_dir=str(self.root), **settings)
        return run_experiment(experiment, config, train=lambda run: None, say=self.said.append)


@pytest.fixture
def adder(tmp_path: Path) -> Adder:
    return Adder(tmp_path / "adding")


def test_results_come_from_all_stages_and_are_written(adder: Adder) -> None:
    whole = adder()
    assert whole["results"] == {"one": {"sum": 1}, "two": {"sum": 3}}
    assert json.loads((adder.root / RESULTS).read_text()) == whole
    assert adder.said[-1] == "the sum is 3"


def test_what_is_there_is_not_made_again(adder: Adder) -> None:
    adder()
    assert adder(speed=7)["results"]["two"]["sum"] == 3  # no stage depends on it
    assert adder.ran == ["one", "two"]
    assert "done before" in adder.said[-3]


def test_a_failed_stage_is_run_again_and_what_came_before_is_not(adder: Adder) -> None:
    adder.fails = True
    with pytest.raises(RuntimeError):
        adder()
    assert not (adder.root / RESULTS).exists()
    adder.fails = False
    adder()
    assert adder.ran == ["one", "two", "two"]


def test_other_settings_are_refused_also_of_later_stages(adder: Adder) -> None:
    adder()
    with pytest.raises(ConfigError, match=r"stage 'one' .* first=1, now it is 5"):
        adder(first=5)
    (adder.root / "one" / MARK).unlink()
    with pytest.raises(ConfigError, match=r"stage 'two' .* first=1, now it is 5"):
        adder(first=5)
    assert adder.ran == ["one", "two"]


def test_parts_of_an_interrupted_stage_are_kept_for_the_same_settings(tmp_path: Path) -> None:
    def bench(**settings: int) -> Bench:
        return Bench(
            root=tmp_path, directory=tmp_path, train=lambda run: None, progress=lambda *_: None, settings=settings
        )

    made: list[int] = []

    def make() -> list[float]:
        made.append(1)
        return [0.1, len(made)]

    assert bench(a=1).part("first", make) == [0.1, 1]
    assert bench(a=1).part("first", make) == [0.1, 1]
    assert bench(a=1).part("second", make) == [0.1, 2]
    assert bench(a=2).part("first", make) == [0.1, 3]
    with pytest.raises(ZeroDivisionError):
        bench(a=2).part("third", lambda: 1 / 0)
    assert bench(a=2).part("third", make) == [0.1, 4]


def test_progress_tells_the_time_left_now_and_then() -> None:
    said: list[str] = []
    progress = Progress(say=said.append, interval=0.0, start=-1e9)
    progress(1, 4)
    progress(4, 4)
    assert len(said) == 1
    assert said[0].startswith("  1/4, ")
