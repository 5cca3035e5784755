"""Othello: a GPT reads the moves of random games, and keeps the board (Li et al. 2210.13382, Nanda et al. 2309.00941)."""

from dataclasses import dataclass, field
from pathlib import Path

from steerscale.config import require
from steerscale.experiments.othello_games import write_games
from steerscale.experiments.stages import Bench, Experiment, ExperimentConfig, Results, Stage
from steerscale.train.config import RunConfig

DATASET = "games/dataset"


@dataclass(frozen=True, kw_only=True)
class GamesConfig:
    """Random games, each of them new."""

    train: int = 50_000
    """Games to train the GPT on."""
    valid: int = 500
    """Held-out games for its loss."""
    test: int = 2_000
    """Further ones, for probes and interventions."""

    def __post_init__(self) -> None:
        for name in ("train", "valid", "test"):
            require(getattr(self, name) > 1, f"games.{name} must be at least 2, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class OthelloConfig(ExperimentConfig):
    """The experiment."""

    games: GamesConfig = field(default_factory=GamesConfig)
    """Data."""
    gpt: RunConfig
    """The training run; its keys are those of docs/configuration.md."""


def make_games(config: OthelloConfig, bench: Bench) -> Results:
    """The dataset."""
    sizes = {"train": config.games.train, "valid": config.games.valid, "test": config.games.test}
    manifest = write_games(bench.directory / "dataset", sizes, seed=config.seed, progress=bench.progress)
    return {"tokens": {split: info.tokens for split, info in manifest.splits.items()}}


def train_gpt(config: OthelloConfig, bench: Bench) -> Results:
    """The GPT."""
    bench.train(config.gpt)
    return {}


def report(config: OthelloConfig, results: dict[str, Results], root: Path) -> str:
    """Tables and plots."""
    return str(results)


EXPERIMENT = Experiment(
    config=OthelloConfig,
    stages=[
        Stage(name="games", run=make_games, settings=("games",)),
        Stage(
            name="train",
            run=train_gpt,
            settings=("gpt.seed", "gpt.model", "gpt.train", "gpt.optim", "gpt.parallel", "gpt.engine"),
        ),
    ],
    report=report,
)
