"""Dictionaries of directions for a toy's hidden activations, and how well they match its true features.

Shapes: B vectors, m hidden dimensions, n features, K candidate directions.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from steerscale.experiments.superposition_config import DictionaryConfig
from steerscale.interp.probes.fit import FitConfig, fit_probe
from steerscale.parallel.context import ParallelContext
from steerscale.sae.architectures import ARCHITECTURES
from steerscale.sae.base import SparseAutoencoder
from steerscale.sae.config import SAEConfig, specs_of
from steerscale.sae.initial import draw_weights, initialize_from_data

HOOK = "toy"
RECOVERED = 0.9
"""Cosine above which a feature counts as found."""
Draw = Callable[[int], torch.Tensor]
"""Number -> so many new hidden activations [B, m]."""


def train_sae(
    architecture: str,
    draw: Draw,
    context: ParallelContext,
    *,
    hidden: int,
    k: int,
    config: DictionaryConfig,
    seed: int,
) -> SparseAutoencoder:
    """One of our architectures, by plain Adam on one process: what matters here is the dictionary, not how it scales.

    `context`: of one process, with micro-batches of config.batch_size.
    """
    sae_config = SAEConfig(
        hooks=[HOOK],
        architecture=architecture,  # type: ignore[arg-type]
        expansion=config.expansion,
        k=k,
        sparsity=config.sparsity.get(architecture, 0.0),
        sparsity_warmup_steps=config.sae_steps // 4,
        dead_after=50 * config.batch_size,
        bandwidth=0.05,
        initial_threshold=0.02,
    )
    (spec,) = specs_of(sae_config, {HOOK: hidden})
    sae = ARCHITECTURES[architecture](spec, context)
    sae.into_main_grad = False  # that is for Megatron-Core's gradient buffers
    draw_weights(sae, seed=seed)
    initialize_from_data(sae, *[draw(config.batch_size)] * 2)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * (1 - step / config.sae_steps)))
    for step in range(config.sae_steps):
        h_Bm = draw(config.batch_size)
        sae.before_step(step)
        losses = sae(h_Bm, h_Bm)
        optimizer.zero_grad()
        (losses.total / len(h_Bm)).backward()
        optimizer.step()
        decay.step()
        sae.after_update()
    return sae.eval()


@torch.no_grad()
def latents(sae: SparseAutoencoder, h_Bm: torch.Tensor) -> torch.Tensor:
    """Activations [B, K] of all latents."""
    selection, values = sae.features(sae.encode(h_Bm).pre_BN)
    return selection.dense(values.float())


def variance_explained(sae: SparseAutoencoder, h_Bm: torch.Tensor) -> float:
    """1 - the share of the variance that the reconstruction misses."""
    with torch.no_grad():
        missed = (sae.reconstruct(h_Bm) - h_Bm).square().sum()
    return float(1 - missed / (h_Bm - h_Bm.mean(0)).square().sum())


def principal_directions(h_Bm: torch.Tensor) -> torch.Tensor:
    """[m, m] principal components; PCA does not tell which way they point, so `match` is told to ignore signs."""
    return torch.linalg.svd(h_Bm - h_Bm.mean(0), full_matrices=False).Vh


def mean_differences(h_Bm: torch.Tensor, on_Bn: torch.Tensor) -> torch.Tensor:
    """[n, m] mean where a feature is active less mean where it is not; supervised."""
    on_Bn = on_Bn.float()
    with_nm = (on_Bn.T @ h_Bm) / on_Bn.sum(0).clamp_min(1).unsqueeze(1)
    off_Bn = 1 - on_Bn
    return with_nm - (off_Bn.T @ h_Bm) / off_Bn.sum(0).clamp_min(1).unsqueeze(1)


def probe_directions(h_Bm: torch.Tensor, on_Bn: torch.Tensor) -> torch.Tensor:
    """[n, m] directions of logistic probes for each feature; supervised."""
    config = FitConfig(l2=1.0, iterations=50)
    probes = [
        fit_probe(h_Bm, on_B.long(), ("off", "on"), hook=HOOK, kind="logistic", position="all", config=config)
        for on_B in on_Bn.T
    ]
    return torch.stack([probe.weight_CM[1] - probe.weight_CM[0] for probe in probes])


def match(candidates_Km: torch.Tensor, features_nm: torch.Tensor, *, signed: bool = True) -> dict[str, float]:
    """How well candidates match true directions.

    mean_max_cosine: over features, the best candidate's cosine (Sharkey et al. 2022). matched_cosine: the same with every
    candidate used once, the assignment being the best (Hungarian). recovered: features with a matched cosine above 0.9.
    """
    cosines_nK = _unit(features_nm) @ _unit(candidates_Km).T
    cosines = (cosines_nK if signed else cosines_nK.abs()).numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    matched = np.zeros(len(cosines))  # of features for which there is no candidate left, 0
    matched[rows] = cosines[rows, columns]
    return {
        "mean_max_cosine": float(cosines.max(axis=1).mean()),
        "matched_cosine": float(matched.mean()),
        "recovered": float((matched > RECOVERED).mean()),
    }


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-9)


def mean_and_error(values: Sequence[float]) -> list[float]:
    """[mean, standard error] over seeds."""
    array = np.array(values)
    return [float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array)))]
