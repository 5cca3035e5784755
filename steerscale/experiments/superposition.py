"""Superposition: when toys store more features than dimensions, who finds the features again, and which directions steer.

Shapes: K toys, B samples, n features, m hidden dimensions, P pairs of features.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from steerscale.experiments.stages import Bench, Experiment, Results, Stage
from steerscale.experiments.superposition_config import SuperpositionConfig
from steerscale.experiments.superposition_report import report
from steerscale.experiments.superposition_sae import (
    latents,
    match,
    mean_and_error,
    mean_differences,
    principal_directions,
    probe_directions,
    train_sae,
    variance_explained,
)
from steerscale.experiments.superposition_steering import measure_steering
from steerscale.experiments.superposition_toy import (
    REPRESENTED,
    Toys,
    draw_features,
    interference,
    lengths,
    toy_losses,
    train_toys,
)
from steerscale.parallel.context import ParallelContext, initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.architectures import ARCHITECTURES
from steerscale.sae.base import SparseAutoencoder

TOYS = "toys.safetensors"


def sweep_sparsity(config: SuperpositionConfig, bench: Bench) -> Results:
    """Features stored over sparsity."""
    settings = config.sweep
    number = len(settings.active)
    p_K = torch.tensor(settings.active).repeat(config.seeds)
    importance_n = settings.importance_decay ** torch.arange(settings.features)
    toys = train_toys(
        p_K,
        importance_n.expand(len(p_K), -1),
        hidden=settings.hidden,
        steps=settings.steps,
        batch_size=settings.batch_size,
        seed=config.seed,
        progress=bench.progress,
    )
    represented_SP = (lengths(toys) > REPRESENTED).sum(1).double().view(-1, number)
    per_dimension_SP = toys.W_Kmn.square().sum(dim=(1, 2)).div(settings.hidden).view(-1, number)
    return {
        "active": settings.active,
        "hidden": settings.hidden,
        "features": settings.features,
        "represented": [mean_and_error(column) for column in represented_SP.T.tolist()],
        "squared_length_per_dimension": [mean_and_error(column) for column in per_dimension_SP.T.tolist()],
    }


def draw_phases(config: SuperpositionConfig, bench: Bench) -> Results:
    """Two features in one dimension: which are stored, over sparsity and the second one's relative importance."""
    settings = config.phase
    active = np.logspace(-2, 0, settings.points)
    importance = np.logspace(-1, 1, settings.points)
    grid = [(p, r) for r in importance for p in active]
    rows = torch.tensor(grid * settings.starts, dtype=torch.float32)
    importance_K2 = torch.stack([torch.ones(len(rows)), rows[:, 1]], dim=1)
    toys = train_toys(
        rows[:, 0],
        importance_K2,
        hidden=1,
        steps=settings.steps,
        batch_size=settings.batch_size,
        seed=config.seed,
        progress=bench.progress,
    )
    generator = torch.Generator().manual_seed(config.seed + 1)
    x_KBn = draw_features((len(grid), 8000, 2), rows[: len(grid), 0], generator)
    losses = torch.stack(
        [
            toy_losses(Toys(*(part[begin : begin + len(grid)] for part in toys)), x_KBn, importance_K2[: len(grid)])
            for begin in range(0, len(rows), len(grid))
        ]
    )
    chosen_K = losses.argmin(0) * len(grid) + torch.arange(len(grid))
    long_K2 = lengths(toys)[chosen_K] > REPRESENTED
    # 0: the second is not stored, 1: it has the dimension for itself, 2: both share it.
    phase_K = torch.where(long_K2[:, 1], 1 + long_K2[:, 0].long(), 0)
    shape = (settings.points, settings.points)
    return {
        "active": active.tolist(),
        "importance": importance.tolist(),
        "phase": phase_K.view(shape).tolist(),
        "interference": interference(toys)[chosen_K, 1].view(shape).tolist(),
    }


def train_dictionary_toys(config: SuperpositionConfig, bench: Bench) -> Results:
    """The toys whose features are to be found; one for each seed and sparsity."""
    settings = config.dictionary
    p_K = torch.tensor(settings.active).repeat(config.seeds)
    toys = train_toys(
        p_K,
        torch.ones(len(p_K), settings.features),
        hidden=settings.hidden,
        steps=settings.toy_steps,
        batch_size=settings.batch_size // 2,
        seed=config.seed + 2,
        progress=bench.progress,
    )
    save_file({"W": toys.W_Kmn.contiguous(), "b": toys.b_Kn}, bench.directory / TOYS)
    represented_SP = (lengths(toys) > REPRESENTED).double().mean(1).view(config.seeds, -1)
    return {
        "active": settings.active,
        "represented": [mean_and_error(column) for column in represented_SP.T.tolist()],
    }


def toy_of(root: Path, config: SuperpositionConfig, *, seed: int, active: float) -> Toys:
    """One of them, K = 1."""
    tensors = load_file(root / "toys" / TOYS)
    row = seed * len(config.dictionary.active) + config.dictionary.active.index(active)
    return Toys(tensors["W"][row : row + 1], tensors["b"][row : row + 1])


def recover(config: SuperpositionConfig, bench: Bench) -> Results:
    """Which dictionaries hold the true features: SAEs of all architectures, over sparsity, and what there is beside them."""
    work = [(active, seed) for active in config.dictionary.active for seed in range(config.seeds)]
    found: dict[str, list[Results]] = {}
    with initialize(ParallelLayout(micro_batch_size=config.dictionary.batch_size)) as context:
        for active, seed in bench.track(work):
            make = partial(recover_one, config, bench.root, context, active=active, seed=seed)
            found.setdefault(str(active), []).append(bench.part(f"{active:g}.{seed}", make))
    return {active: over_seeds(of_seeds) for active, of_seeds in found.items()}


def recover_one(
    config: SuperpositionConfig, root: Path, context: ParallelContext, *, active: float, seed: int
) -> dict[str, dict[str, float]]:
    """Scores of every dictionary for one toy."""
    settings = config.dictionary
    toy = toy_of(root, config, seed=seed, active=active)
    generator = torch.Generator().manual_seed(config.seed + 100 + seed)
    features_nm = toy.W_Kmn[0].T[lengths(toy)[0] > REPRESENTED]
    x_Bn = draw_features((1, settings.vectors, settings.features), torch.tensor([active]), generator)
    h_Bm, on_Bn = toy.hidden(x_Bn)[0], x_Bn[0] > 0
    as_many = torch.randn(settings.hidden * settings.expansion, settings.hidden, generator=generator)
    scores = {
        "random directions": match(as_many, features_nm),
        "PCA": match(principal_directions(h_Bm), features_nm, signed=False),
        "difference of means *": match(mean_differences(h_Bm, on_Bn), features_nm),
        "logistic probes *": match(probe_directions(h_Bm, on_Bn), features_nm),
    }
    draw, k = partial(draw_hidden, toy, active, generator), max(1, round(active * settings.features))
    for architecture in ARCHITECTURES if active == settings.main else [config.steering.architecture]:
        sae = train_sae(
            architecture, draw, context, hidden=settings.hidden, k=k, config=settings, seed=config.seed + seed
        )
        active_BK = latents(sae, h_Bm) > 0
        alive_K = active_BK.any(0)
        scores[f"SAE {architecture}"] = {
            **match(sae.W_dec.detach()[alive_K], features_nm),
            "l0": float(active_BK.sum(1).double().mean()),
            "alive": float(alive_K.double().mean()),
            "variance_explained": variance_explained(sae, h_Bm),
        }
    return scores


def over_seeds(of_seeds: list[Results]) -> Results:
    """Means and standard errors of every number."""
    return {
        name: {key: mean_and_error([scores[name][key] for scores in of_seeds]) for key in rows}
        for name, rows in of_seeds[0].items()
    }


def draw_hidden(
    toy: Toys, active: float, generator: torch.Generator, count: int, *, correlation: float = 0.0
) -> torch.Tensor:
    """New hidden activations [count, m] of one toy."""
    features = toy.W_Kmn.shape[2]
    x_KBn = draw_features((1, count, features), torch.tensor([active]), generator, correlation=correlation)
    return toy.hidden(x_KBn)[0]


def steer(config: SuperpositionConfig, bench: Bench) -> Results:
    """Directions from data with correlated features, in and out of that distribution."""
    with initialize(ParallelLayout(micro_batch_size=config.dictionary.batch_size)) as context:
        found = [
            bench.part(str(seed), partial(steer_one, config, bench.root, context, seed=seed))
            for seed in bench.track(range(config.seeds))
        ]
    return {correlation: over_seeds([of_seed[correlation] for of_seed in found]) for correlation in found[0]}


def steer_one(config: SuperpositionConfig, root: Path, context: ParallelContext, *, seed: int) -> Results:
    """What every method is worth on one toy, by correlation."""
    settings, main = config.dictionary, config.dictionary.main
    toy = toy_of(root, config, seed=seed, active=main)
    generator = torch.Generator().manual_seed(config.seed + 200 + seed)

    def trained(number: int, correlation: float) -> SparseAutoencoder:
        draw = partial(draw_hidden, toy, main, generator, correlation=correlation)
        x_Bn = draw_features(shape, active, generator, correlation=correlation)[0]
        k = max(1, round(float((x_Bn > 0).sum(1).double().mean())))
        return train_sae(
            config.steering.architecture, draw, context, hidden=settings.hidden, k=k, config=settings, seed=number
        )

    shape, active = (1, settings.vectors, settings.features), torch.tensor([main])
    broad = trained(config.seed + seed, 0.0)
    found = {}
    for correlation in config.steering.correlations:
        saes = {
            "SAE latent, same data": trained(config.seed + 50 + seed, correlation),
            "SAE latent, broad data": broad,
        }
        found[str(correlation)] = measure_steering(toy, saes, config, correlation=correlation, generator=generator)
    return found


EXPERIMENT = Experiment(
    config=SuperpositionConfig,
    stages=[
        Stage(name="sweep", run=sweep_sparsity, settings=("seeds", "sweep")),
        Stage(name="phase", run=draw_phases, settings=("phase",)),
        Stage(name="toys", run=train_dictionary_toys, settings=("dictionary",)),
        Stage(name="recovery", run=recover, settings=("steering.architecture",)),
        Stage(name="steering", run=steer, settings=("steering",)),
    ],
    report=report,
)
