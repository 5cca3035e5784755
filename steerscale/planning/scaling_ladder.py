"""A ladder of small models to fit a scaling law to: sizes x tokens, each rung with batch, learning rate and warm-up by rule.

The rules, N without embeddings, D in tokens:

    peak learning rate  1.79 N^-0.713 D^0.307, at most 2^-7     Step Law, Li et al. 2025 (arXiv 2503.04715)
    batch in tokens     0.58 D^0.571                            the same
    warm-up in tokens   as many as all parameters, at most D/10 Porian et al. 2024 (arXiv 2406.19146)
    decay               cosine over the run, to a tenth         Hoffmann et al. 2022, appendix B
    AdamW's beta2       0.99, as small batches want it          Porian et al., section 5

Step Law was fitted to models of 6e7 to 1e9 parameters; below, it extrapolates, which is why its learning rate is capped by
the largest they tried.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steerscale.config import require
from steerscale.errors import ConfigError, LayoutError
from steerscale.models.config import ModelConfig
from steerscale.planning.architecture import TOLERANCE, find_architecture
from steerscale.planning.flops import model_flops_per_token
from steerscale.planning.scaling_fit import LEAST_POINTS

LARGEST_LEARNING_RATE = 2**-7
"""Upper end of Step Law's grid."""
DECAY_TO = 0.1
"""Final learning rate over the peak."""
BETA2 = 0.99
"""Decay of the second moment."""
WARMUP_SHARE = 0.1
"""Longest warm-up, as a share of the run."""
LEAST_STEPS = 50
"""With fewer, what is measured is the warm-up."""
LEAST_KINDS = 3
"""Sizes, and numbers of tokens: as many as the parametric fit asks for."""
MOST_EPOCHS = 4
"""Repeated up to so often, text is almost worth fresh text (Muennighoff et al. 2023); the laws know no repetition."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One model to train."""

    model: ModelConfig
    batch: int
    """Sequences an optimizer step."""
    steps: int
    warmup_steps: int
    lr: float
    """Peak learning rate."""
    held_out: bool = False
    """Not for the fit, but for testing it."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.model.num_parameters()

    @property
    def tokens(self) -> int:
        """Trained on, whole batches."""
        return self.steps * self.batch * self.model.seq_len

    @property
    def flops(self) -> float:
        """Exact model FLOPs, attention and logits included."""
        return float(model_flops_per_token(self.model) * self.tokens)

    @property
    def name(self) -> str:
        """Like n1.05M_d2M."""
        return f"n{_short(self.parameters)}_d{_short(self.tokens)}{'_held_out' if self.held_out else ''}"

    def overrides(self) -> dict[str, Any]:
        """Its keys of a run's configuration."""
        shape = ("num_layers", "d_model", "num_heads", "num_kv_groups", "d_head", "d_ff")
        return {
            **{f"model.{key}": getattr(self.model, key) for key in shape},
            "parallel.global_batch_size": self.batch,
            "train.steps": self.steps,
            "optim.lr": self.lr,
            "optim.min_lr": float(f"{DECAY_TO * self.lr:.4g}"),
            "optim.warmup_steps": self.warmup_steps,
            "optim.beta2": BETA2,
        }


def ladder(
    sizes: Sequence[float],
    tokens: Sequence[float],
    *,
    like: ModelConfig,
    multiple: int = 1,
    largest_lr: float = LARGEST_LEARNING_RATE,
) -> list[Rung]:
    """Every size on every number of tokens, the cheapest first.

    Args:
        sizes: all parameters of each model; the shapes found are within 10 %.
        tokens: that each is trained on.
        like: the models' blocks, sequence and vocabulary.
        multiple: batches are multiples of so many sequences: micro-batch x data-parallel ranks.
        largest_lr: no peak learning rate is above it, whatever the rule says.

    Raises ConfigError if a fit could not be made of them, or for a size that no shape has.
    """
    for option, values in (("--sizes", sizes), ("--tokens", tokens)):
        if len(set(values)) < max(len(values), LEAST_KINDS):
            raise ConfigError(
                f"{option} needs at least {LEAST_KINDS} different numbers, none twice, got {_listed(values)}: a law cannot be "
                "fitted to fewer"
            )
    models = {size: _shape(size, like, option="--sizes") for size in sorted(sizes)}
    found: dict[int, float] = {}
    for size, model in models.items():
        other = found.setdefault(model.num_parameters(), size)
        if other != size:
            raise ConfigError(
                f"--sizes {other:g} and {size:g} become the same model of {model.num_parameters():,} parameters: take them "
                "further apart"
            )
    rungs = [
        make_rung(model, count, multiple=multiple, largest_lr=largest_lr)
        for model in models.values()
        for count in sorted(tokens)
    ]
    assert len(rungs) >= LEAST_POINTS
    return sorted(rungs, key=lambda rung: rung.flops)


def held_out_rung(
    rungs: Sequence[Rung],
    parameters: float,
    tokens: float,
    *,
    like: ModelConfig,
    multiple: int = 1,
    largest_lr: float = LARGEST_LEARNING_RATE,
) -> Rung:
    """The run to predict. Raises ConfigError unless it takes more compute than any rung, as `fit --hold-out 1` expects."""
    model = _shape(parameters, like, option="--hold-out")
    rung = make_rung(model, tokens, multiple=multiple, largest_lr=largest_lr, held_out=True)
    largest = max(6.0 * one.parameters * one.tokens for one in rungs)
    if 6.0 * rung.parameters * rung.tokens <= largest:
        raise ConfigError(
            f"--hold-out {parameters:g},{tokens:g} is {6 * rung.parameters * rung.tokens:.3g} FLOPs, and the ladder goes up to "
            f"{largest:.3g}: a prediction is worth something beyond that, take a larger model or more tokens"
        )
    return rung


def make_rung(
    model: ModelConfig,
    tokens: float,
    *,
    multiple: int = 1,
    largest_lr: float = LARGEST_LEARNING_RATE,
    held_out: bool = False,
) -> Rung:
    """One model on about so many tokens, by the rules above. Raises ConfigError if that is too few steps."""
    require(math.isfinite(tokens) and tokens > 0, f"--tokens must be positive numbers, got {tokens:g}")
    require(multiple >= 1, f"batches must be multiples of at least 1 sequence, got {multiple}")
    n = model.num_parameters(embeddings=False)
    batch = max(round(0.58 * tokens**0.571 / model.seq_len / multiple), 1) * multiple
    steps = round(tokens / (batch * model.seq_len))
    if steps < LEAST_STEPS:
        raise ConfigError(
            f"{tokens:g} tokens are {steps} steps of {batch} sequences of {model.seq_len}, and a run needs {LEAST_STEPS}: take "
            "more tokens, shorter sequences (--seq-len) or smaller multiples (--micro-batch-size)"
        )
    warmup = min(model.num_parameters(), WARMUP_SHARE * tokens) / (batch * model.seq_len)
    return Rung(
        model=model,
        batch=batch,
        steps=steps,
        warmup_steps=max(round(warmup), 1),
        lr=float(f"{min(1.79 * n**-0.713 * tokens**0.307, largest_lr):.4g}"),
        held_out=held_out,
    )


def check_tokens(rungs: Sequence[Rung], available: int) -> list[str]:
    """Whether a dataset of `available` training tokens is enough; sentences about repetition.

    Raises ConfigError if it would be read more than `MOST_EPOCHS` times.
    """
    longest = max(rungs, key=lambda rung: rung.tokens)
    epochs = longest.tokens / available
    if epochs > MOST_EPOCHS:
        raise ConfigError(
            f"{longest.name} would read the {available:,} training tokens {epochs:.1f} times, and what is repeated more than "
            f"{MOST_EPOCHS} times teaches no law: take fewer --tokens or more text"
        )
    if epochs > 1:
        return [f"{longest.name} reads the dataset {epochs:.1f} times; the laws take all tokens for new"]
    return []


def _shape(parameters: float, like: ModelConfig, *, option: str) -> ModelConfig:
    require(
        math.isfinite(parameters) and parameters >= 1, f"{option} must be numbers of parameters, got {parameters:g}"
    )
    try:
        return find_architecture(parameters, like=like)
    except LayoutError as error:
        raise ConfigError(
            f"{option} {parameters:g}: no shape comes within {TOLERANCE:.0%} of it with heads of 32 or 64 and a vocabulary of "
            f"{like.tokens:,} (a width of 64 has {64 * like.padded_vocab:,} in its embedding alone): take another size "
            "or a smaller vocabulary"
        ) from error


def _short(count: float) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale * 0.9995:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.0f}"


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values) or "none"
