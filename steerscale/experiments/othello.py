"""Othello: a GPT reads the moves of random games, and keeps the board (Li et al. 2210.13382, Nanda et al. 2309.00941)."""

from pathlib import Path

from steerscale.experiments.othello_board import (
    hooks_of,
    measure_legality,
    measure_probes,
    read_probes,
    trained,
    untrained,
)
from steerscale.experiments.othello_config import OthelloConfig
from steerscale.experiments.othello_edit import make_cases, measure_interventions
from steerscale.experiments.othello_games import read_games, write_games
from steerscale.experiments.othello_report import report
from steerscale.experiments.stages import Bench, Experiment, Results, Stage


def make_games(config: OthelloConfig, bench: Bench) -> Results:
    """The dataset."""
    sizes = {"train": config.games.train, "valid": config.games.valid, "test": config.games.test}
    manifest = write_games(dataset(bench.root), sizes, seed=config.seed, progress=bench.progress)
    return {"games": sizes, "tokens": {split: info.tokens for split, info in manifest.splits.items()}}


def train_gpt(config: OthelloConfig, bench: Bench) -> Results:
    """The GPT, by the loop of every training run."""
    bench.train(config.gpt)
    return {
        "steps": config.gpt.train.steps,
        "games_seen": config.gpt.train.steps * config.gpt.layout().global_batch_size,
    }


def check_moves(config: OthelloConfig, bench: Bench) -> Results:
    """Whether its moves are legal."""
    games = read_games(dataset(bench.root), "test", config.legality_games)
    with trained(Path(config.gpt.run_dir)) as lm:
        return measure_legality(lm, games, bench)


def probe_board(config: OthelloConfig, bench: Bench) -> Results:
    """Whether the board can be read from it, and from an untrained one."""
    train, test = config.probes.train_games, config.probes.test_games
    games = read_games(dataset(bench.root), "test", train + test)
    with trained(Path(config.gpt.run_dir)) as lm:
        models = {"trained": lm, "untrained": untrained(lm, seed=config.seed + 1)}
        split = {"train": games[:train], "test": games[train:]}
        return measure_probes(models, split, config.probes, seed=config.seed, bench=bench)


def edit_board(config: OthelloConfig, bench: Bench) -> Results:
    """Whether it plays by a board that was changed in its residual stream."""
    used, settings = config.probes.train_games + config.probes.test_games, config.interventions
    games = read_games(dataset(bench.root), "test", used + settings.games)[used:]
    cases = make_cases(games, first_move=settings.first_move, last_move=settings.last_move, seed=config.seed)
    with trained(Path(config.gpt.run_dir)) as lm:
        hooks = [hook for hook in hooks_of(lm) if hook.endswith("resid_post")]
        probes = {kind: read_probes(bench.root / "probes", kind, hooks) for kind in ("mine", "colour")}
        return measure_interventions(lm, cases, probes, settings, seed=config.seed, bench=bench)


def dataset(root: Path) -> Path:
    """Where the games are."""
    return root / "games" / "dataset"


EXPERIMENT = Experiment(
    config=OthelloConfig,
    stages=[
        Stage(name="games", run=make_games, settings=("games",)),
        Stage(
            name="train",
            run=train_gpt,
            settings=("gpt.seed", "gpt.model", "gpt.train", "gpt.optim", "gpt.parallel", "gpt.engine.precision"),
        ),
        Stage(name="legality", run=check_moves, settings=("legality_games",)),
        Stage(name="probes", run=probe_board, settings=("probes",)),
        Stage(name="interventions", run=edit_board, settings=("interventions",)),
    ],
    report=report,
)
