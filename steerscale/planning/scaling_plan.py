"""GPU hours -> FLOPs -> what each scaling law makes of them, what other sizes cost, and how long it takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from steerscale.config import require
from steerscale.errors import ConfigError
from steerscale.planning.scaling_laws import (
    FLOPS_PER_PARAMETER_AND_TOKEN,
    KAPLAN,
    LAWS,
    REFIT,
    Optimum,
    ParametricLaw,
    Published,
    kaplan_loss,
    local_exponent,
    non_embedding_parameters,
    tokens_for,
    total_parameters,
)

SMALLEST_PARAMETERS = 1e6
"""Below, the laws say nothing: Chinchilla's smallest model has 44e6 parameters."""
OVER_TRAINING = (1.0, 0.7, 0.5, 0.35, 0.25)
"""Sizes shown as shares of the optimal one, at the same budget."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """GPU time, and the model FLOPs it buys."""

    gpu_hours: float
    peak_tflops: float
    """Dense bf16 peak of one GPU, 1e12 FLOP/s."""
    mfu: float
    """Model FLOPs utilisation, 0 to 1."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.gpu_hours) and self.gpu_hours > 0,
            f"--gpu-hours must be a positive number, got {self.gpu_hours:g}",
        )
        require(
            math.isfinite(self.peak_tflops) and self.peak_tflops > 0,
            f"--peak-tflops must be a positive number, got {self.peak_tflops:g}",
        )
        require(
            0 < self.mfu <= 1,
            f"--mfu must be above 0 and at most 1, got {self.mfu:g}: a share of the peak, 0.45 for 45 %",
        )

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of one GPU."""
        return self.peak_tflops * self.mfu

    @property
    def flops(self) -> float:
        """Model FLOPs in all."""
        return self.gpu_hours * 3600 * self.tflops * 1e12

    def hours_for(self, flops: float) -> float:
        """GPU hours that so many model FLOPs take."""
        return flops / (3600 * self.tflops * 1e12)

    def days(self, gpus: int) -> float:
        """Days that the whole budget lasts on so many GPUs."""
        require(gpus >= 1, f"--gpus must be at least 1, got {gpus}")
        return self.gpu_hours / gpus / 24


@dataclass(frozen=True, kw_only=True)
class Row:
    """One law's answer."""

    law: str
    parameters: float
    """All of them, embeddings included."""
    non_embedding: float
    tokens: float
    own_loss: float | None
    """Predicted by the law itself; None: it predicts none."""
    loss: float
    """Predicted by `REFIT`, to compare the rows."""
    flops_over_budget: float
    """6 N D over the budget, N as the law counts: 1, but for Kaplan's, whose D is that of the critical batch size."""
    note: str = ""
    """What to know about it."""

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.parameters


def law_rows(flops: float) -> list[Row]:
    """Each published law at a budget, and last the reconciled one."""
    rows = []
    for entry in LAWS:
        best = entry.law.optimum(flops)
        n = best.parameters if entry.counts_embeddings else total_parameters(best.parameters)
        notes = []
        if not entry.counts_embeddings:
            notes.append("N fitted without embeddings")
        if best.parameters > entry.parameters[1]:
            notes.append(f"extrapolates from models of at most {entry.parameters[1] / 1e9:.3g}B")
        rows.append(
            Row(
                law=entry.title,
                parameters=n,
                non_embedding=non_embedding_parameters(n),
                tokens=best.tokens,
                own_loss=_own_loss(entry, best, flops),
                loss=REFIT.loss(n, best.tokens),
                flops_over_budget=best.flops / flops,
                note="; ".join(notes),
            )
        )
    return [*rows, _reconciled(flops)]


def _own_loss(entry: Published, best: Optimum, flops: float) -> float | None:
    if isinstance(entry.law, ParametricLaw):
        return entry.law.loss(best.parameters, best.tokens)
    return kaplan_loss(flops=flops) if entry.law is KAPLAN else None


def _reconciled(flops: float) -> Row:
    """The refit's optimum with N and C in all parameters, and what it looks like in Kaplan's counting."""
    best = REFIT.optimum(flops)
    local = local_exponent(REFIT, best.parameters)
    return Row(
        law="reconciled",
        parameters=best.parameters,
        non_embedding=non_embedding_parameters(best.parameters),
        tokens=best.tokens,
        own_loss=REFIT.loss(best.parameters, best.tokens),
        loss=REFIT.loss(best.parameters, best.tokens),
        flops_over_budget=1.0,
        note=f"refit, embeddings counted: N ~ C^{REFIT.exponent:.3f}; without them C^{local:.3f} at this size",
    )


def spread(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Smallest and largest N and D over the laws that count embeddings: how far the literature agrees."""
    counted = [row for row in rows if row.law != "Kaplan"]
    return {
        "parameters": (min(row.parameters for row in counted), max(row.parameters for row in counted)),
        "tokens": (min(row.tokens for row in counted), max(row.tokens for row in counted)),
    }


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A size that is not the law's optimum, and what that costs."""

    parameters: float
    tokens: float
    loss: float
    """By `REFIT`."""
    extra_loss: float
    """Over the optimum's of the same budget."""
    budget_factor: float | None
    """Budget at which this size reaches the optimum's loss, over the budget; None: it never does."""

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.parameters


def choice(flops: float, parameters: float) -> Choice:
    """`parameters` trained with the whole budget."""
    best = REFIT.optimum(flops)
    least = REFIT.loss(best.parameters, best.tokens)
    tokens = tokens_for(flops, parameters)
    loss = REFIT.loss(parameters, tokens)
    needed = REFIT.tokens_for_loss(least, parameters)
    return Choice(
        parameters=parameters,
        tokens=tokens,
        loss=loss,
        extra_loss=loss - least,
        budget_factor=None if needed is None else needed / tokens,
    )


def over_training(flops: float) -> list[Choice]:
    """Smaller models trained longer on the same budget: dearer to train to a loss, cheaper to use."""
    return [choice(flops, share * REFIT.optimum(flops).parameters) for share in OVER_TRAINING]


def inference_optimum(flops: float, inference_tokens: float) -> Optimum:
    """Least loss where training and use share the budget: `6 N D + 2 N inference_tokens = flops`.

    The setting of Sardana et al. 2024 (arXiv 2401.00448), with the budget given instead of the loss. The loss has one
    minimum in log N, found by golden section. Raises ConfigError if use alone would take the budget of any model.
    """
    require(inference_tokens >= 0, f"--inference-tokens must not be negative, got {inference_tokens:g}")

    def tokens(parameters: float) -> float:
        return flops / (FLOPS_PER_PARAMETER_AND_TOKEN * parameters) - inference_tokens / 3

    def loss(log_n: float) -> float:
        n = math.exp(log_n)
        return REFIT.loss(n, tokens(n)) if tokens(n) > 0 else math.inf

    low, high = math.log(SMALLEST_PARAMETERS), math.log(REFIT.optimum(flops).parameters)
    if high <= low or tokens(SMALLEST_PARAMETERS) <= 0:
        raise ConfigError(
            f"--inference-tokens {inference_tokens:g} would take the whole budget of {flops:.3g} FLOPs even with "
            f"{SMALLEST_PARAMETERS:g} parameters: give more GPU hours or fewer tokens"
        )
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - golden * (high - low), low + golden * (high - low)
        # Where use eats everything the loss is infinite on both sides: the way out is to smaller models.
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    parameters = math.exp((low + high) / 2)
    return Optimum(parameters=parameters, tokens=tokens(parameters))


def pick(flops: float, tokens: tuple[float, float] | None) -> Optimum:
    """The reconciled law's optimum, moved into the range of tokens if one is given.

    Raises ConfigError if what is left is no model that the laws know.
    """
    best = REFIT.optimum(flops)
    if tokens is not None:
        first, last = tokens
        require(
            0 < first <= last,
            f"--tokens {first:g}..{last:g} is no range: give two positive numbers, the smaller one first",
        )
        trained = min(max(best.tokens, first), last)
        best = Optimum(parameters=tokens_for(flops, trained), tokens=trained)
    if best.parameters < SMALLEST_PARAMETERS:
        raise ConfigError(
            f"the budget of {flops:.3g} FLOPs leaves {best.parameters:.3g} parameters for {best.tokens:.3g} tokens, and the "
            f"laws know no model below {SMALLEST_PARAMETERS:g}: give more GPU hours or fewer tokens"
        )
    return best
