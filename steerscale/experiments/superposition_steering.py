"""Switching a feature on in a toy's hidden activations, and what comes out of the toy.

In the data that directions come from, feature A = 2i switches on feature B = 2i + 1 with some probability. In distribution, A
is switched on as it is there: with B. Out of distribution A and B are independent, and A is to be switched on alone. The
measure is the distance of the toy's outputs from its outputs for the counterfactual input, over the same distance without any
steering: 0 is perfect, 1 is worth nothing, above 1 does harm.

Shapes: B samples, n features, m hidden dimensions, P pairs, K latents, A strengths.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from steerscale.experiments.stages import Results
from steerscale.experiments.superposition_config import SuperpositionConfig
from steerscale.experiments.superposition_sae import latents, mean_differences, probe_directions
from steerscale.experiments.superposition_toy import Toys, draw_features
from steerscale.sae.base import SparseAutoencoder

STRENGTHS = torch.linspace(0.1, 2.5, 25)
"""Lengths of what is added, of which the best one in distribution is taken for both."""


class Samples(NamedTuple):
    """Inputs in which A is off, and what they were to be."""

    x_Bn: torch.Tensor
    wanted_Bn: torch.Tensor


class Task(NamedTuple):
    """What a toy makes of samples."""

    h_Bm: torch.Tensor
    """Its hidden activations."""
    now_Bn: torch.Tensor
    """Its outputs."""
    wanted_Bn: torch.Tensor
    """Its outputs for what the inputs were to be."""


def measure_steering(
    toy: Toys,
    saes: Mapping[str, SparseAutoencoder],
    config: SuperpositionConfig,
    *,
    correlation: float,
    generator: torch.Generator,
) -> Results:
    """Errors in and out of distribution by method, medians over all pairs; and how much of B comes along with A."""
    settings, active = config.dictionary, torch.tensor([config.dictionary.main])
    shape = (1, settings.vectors, settings.features)
    x_Bn = draw_features(shape, active, generator, correlation=correlation)[0]
    h_Bm, on_BP = toy.hidden(x_Bn.unsqueeze(0))[0], x_Bn[:, 0::2] > 0
    directions = {
        "difference of means": mean_differences(h_Bm, on_BP),
        "logistic probe": probe_directions(h_Bm, on_BP),
        "true direction": toy.W_Kmn[0].T[0::2],
        **{name: best_latents(sae, h_Bm, on_BP) for name, sae in saes.items()},
    }
    found: dict[str, list[Results]] = {name: [] for name in directions}
    for pair in range(settings.features // 2):
        inside = task_of(toy, make_samples(config, pair, generator, correlation=correlation))
        outside = task_of(toy, make_samples(config, pair, generator, correlation=0.0))
        for name, directions_Pm in directions.items():
            unit_m = directions_Pm[pair] / directions_Pm[pair].norm()
            errors_A = torch.stack([error(toy, inside, strength * unit_m) for strength in STRENGTHS])
            best = int(errors_A.argmin())
            found[name].append(
                {
                    "inside": float(errors_A[best]),
                    "outside": float(error(toy, outside, STRENGTHS[best] * unit_m)),
                    "side_effect": side_effect(toy, outside, STRENGTHS[best] * unit_m, pair),
                    "cosine": float(unit_m @ toy.W_Kmn[0, :, 2 * pair] / toy.W_Kmn[0, :, 2 * pair].norm()),
                }
            )
    return {name: {key: _median([row[key] for row in rows]) for key in rows[0]} for name, rows in found.items()}


def _median(values: list[float]) -> float:
    return float(torch.tensor(values).median())


def make_samples(config: SuperpositionConfig, pair: int, generator: torch.Generator, *, correlation: float) -> Samples:
    """Inputs with A off from a distribution with this correlation, and what switching A on means in it."""
    settings, value = config.dictionary, config.steering.value
    shape = (1, config.steering.samples, settings.features)
    x_Bn = draw_features(shape, torch.tensor([settings.main]), generator, correlation=correlation)[0]
    x_Bn = x_Bn[x_Bn[:, 2 * pair] == 0]
    wanted_Bn = x_Bn.clone()
    wanted_Bn[:, 2 * pair] = value
    comes_along_B = (torch.rand(len(x_Bn), generator=generator) < correlation) & (x_Bn[:, 2 * pair + 1] == 0)
    wanted_Bn[comes_along_B, 2 * pair + 1] = value
    return Samples(x_Bn, wanted_Bn)


def task_of(toy: Toys, samples: Samples) -> Task:
    """Run the toy on both."""
    h_Bm, wanted_Bm = (toy.hidden(x_Bn.unsqueeze(0))[0] for x_Bn in samples)
    return Task(h_Bm, steered(toy, h_Bm), steered(toy, wanted_Bm))


def steered(toy: Toys, h_Bm: torch.Tensor, added_m: torch.Tensor | None = None) -> torch.Tensor:
    """The toy's outputs [B, n] from hidden activations, with something added to them."""
    return toy.outputs((h_Bm if added_m is None else h_Bm + added_m).unsqueeze(0))[0]


def error(toy: Toys, task: Task, added_m: torch.Tensor) -> torch.Tensor:
    """Scalar; see the module's docstring."""
    missed = (steered(toy, task.h_Bm, added_m) - task.wanted_Bn).square().sum()
    return missed / (task.now_Bn - task.wanted_Bn).square().sum()


def side_effect(toy: Toys, task: Task, added_m: torch.Tensor, pair: int) -> float:
    """How much B's output rises for each unit that A's rises."""
    rise_n = (steered(toy, task.h_Bm, added_m) - task.now_Bn).mean(0)
    return float(rise_n[2 * pair + 1] / rise_n[2 * pair].clamp_min(1e-3))


def best_latents(sae: SparseAutoencoder, h_Bm: torch.Tensor, on_BP: torch.Tensor) -> torch.Tensor:
    """[P, m] decoder rows of the latents that tell A on from A off best, by balanced accuracy of being active at all."""
    active_BK = (latents(sae, h_Bm) > 0).float()
    on_BP = on_BP.float()
    hits_PK = on_BP.T @ active_BK / on_BP.sum(0).clamp_min(1).unsqueeze(1)
    false_PK = (1 - on_BP).T @ active_BK / (1 - on_BP).sum(0).clamp_min(1).unsqueeze(1)
    return sae.W_dec.detach()[(hits_PK - false_PK).argmax(1)]
