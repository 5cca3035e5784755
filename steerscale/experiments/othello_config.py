"""What the Othello experiment can be told."""

from dataclasses import dataclass, field

from steerscale.config import require
from steerscale.experiments.stages import ExperimentConfig
from steerscale.interp.probes.fit import FitConfig
from steerscale.train.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class GamesConfig:
    """Random games, each of them new."""

    train: int = 50_000
    """Games to train the GPT on."""
    valid: int = 500
    """Held-out games for its loss."""
    test: int = 4_000
    """Further ones, for everything that is measured."""

    def __post_init__(self) -> None:
        for name in ("train", "valid", "test"):
            require(getattr(self, name) > 1, f"games.{name} must be at least 2, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Probes of the board."""

    train_games: int = 1000
    """Games whose activations they are fitted on."""
    test_games: int = 400
    """Games they are scored on."""
    per_game: int = 12
    """Moves drawn from each of them."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The fit."""

    def __post_init__(self) -> None:
        for name in ("train_games", "test_games", "per_game"):
            require(getattr(self, name) > 0, f"probes.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class InterventionConfig:
    """Flipped discs."""

    games: int = 1000
    """Games to draw cases from, one each; half of the cases choose first layer and margin, the other half is reported."""
    first_move: int = 4
    """The earliest move after which a disc is flipped, counted from 0."""
    last_move: int = 50
    """The latest."""
    margins: list[float] = field(default_factory=lambda: [1.0, 3.0, 6.0, 12.0])
    """How far above the present owner's logit the other's is set, to choose from."""

    def __post_init__(self) -> None:
        require(
            0 <= self.first_move <= self.last_move < 60,
            f"interventions.first_move and .last_move must be in order and below 60, got {self.first_move}, {self.last_move}",
        )
        require(self.games > 3, f"interventions.games must be at least 4, got {self.games}")
        require(bool(self.margins), "interventions.margins is empty: give one at least")


@dataclass(frozen=True, kw_only=True)
class OthelloConfig(ExperimentConfig):
    """The experiment."""

    games: GamesConfig = field(default_factory=GamesConfig)
    """Data."""
    gpt: RunConfig
    """The training run; its keys are those of docs/configuration.md."""
    legality_games: int = 500
    """Held-out games on which the GPT's moves are checked."""
    probes: ProbeConfig = field(default_factory=ProbeConfig)
    """Probes."""
    interventions: InterventionConfig = field(default_factory=InterventionConfig)
    """Interventions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        probes = self.probes.train_games + self.probes.test_games
        needed = max(self.legality_games, probes + self.interventions.games)
        require(
            self.games.test >= needed,
            f"games.test={self.games.test} is too few: probes.train_games, .test_games and interventions.games are different "
            f"games, {needed} in all",
        )
