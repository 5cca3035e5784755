"""The distribution of the next token: repetition penalty, temperature, top-k, nucleus and min-p, in this order.

The same as transformers' `generate` with the same settings. Shapes: B texts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steerscale.config import require


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The defaults sample from the model's own distribution."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy, whatever the filters say."""
    top_k: int | None = None
    """Keep the k most probable tokens, and those as probable as the last of them; null: all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose mass reaches this (nucleus, Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep tokens at least this many times as probable as the most probable one (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Logits of tokens of prompt and text so far: positive ones are divided by this, negative ones multiplied (Keskar et al.
    2019); 1 is none."""
    seed: int = 0
    """Of the random choices. Each text of a batch draws from a sequence of its own: equal alone and in any batch at the same
    place."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}")
        require(self.top_k is None or self.top_k > 0, f"top_k must be positive, got {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        require(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}")
        require(self.repetition_penalty > 0, f"repetition_penalty must be positive, got {self.repetition_penalty}")


GREEDY = Sampling(temperature=0.0)
MODEL = Sampling()
"""The model's own distribution."""


def next_token_distribution(
    logits_BV: torch.Tensor, sampling: Sampling, *, texts: Sequence[Sequence[int]] | None = None
) -> torch.Tensor:
    """Probabilities float32 [B, V] of the next tokens.

    Args:
        texts: token ids of each text so far, prompt included; only a repetition penalty reads them.
    """
    logits_BV = logits_BV.float()
    if sampling.repetition_penalty != 1:
        assert texts is not None
        logits_BV = _penalize(logits_BV, sampling.repetition_penalty, texts)
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(dim=-1, keepdim=True), 1.0)
    logits_BV = _divide(logits_BV, sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        last_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < last_B1, float("-inf"))
    if sampling.top_p < 1:
        # From the least probable token upwards: one goes if it and all below it have no more mass than may be lost.
        order_BV = logits_BV.argsort(dim=-1)
        mass_BV = logits_BV.gather(-1, order_BV).softmax(dim=-1).cumsum(dim=-1)
        lost_BV = mass_BV <= 1 - sampling.top_p
        lost_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(torch.zeros_like(lost_BV).scatter_(-1, order_BV, lost_BV), float("-inf"))
    if sampling.min_p > 0:
        probabilities_BV = logits_BV.softmax(dim=-1)
        least_B1 = sampling.min_p * probabilities_BV.amax(dim=-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(probabilities_BV < least_B1, float("-inf"))
    return logits_BV.softmax(dim=-1)


def _divide(logits_BV: torch.Tensor, temperature: float) -> torch.Tensor:
    scaled_BV = logits_BV / temperature
    if not bool(
        scaled_BV.isfinite().all()
    ):  # a temperature near 0: the largest logits are beyond float32, differences are not
        largest_B1 = logits_BV.amax(dim=-1, keepdim=True)
        scaled_BV = ((logits_BV - largest_B1).double() / temperature).float()
    return scaled_BV


def _penalize(logits_BV: torch.Tensor, penalty: float, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen_BV[row, list(text)] = True
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    # A penalty near 0 or a huge one goes beyond float32: the largest numbers there are, and 0 stays 0.
    return torch.where(seen_BV, penalized_BV.nan_to_num(), logits_BV)


class Choice:
    """Draws next tokens of a batch; the same with the same seed, on any device."""

    def __init__(self, sampling: Sampling, batch_size: int) -> None:
        self._sampling = sampling
        # Torch takes 64 bits, and a negative seed as the same number modulo 2^64.
        seeds = [(sampling.seed + 1_000_003 * row) % 2**64 for row in range(batch_size)]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, logits_BV: torch.Tensor, texts: Sequence[Sequence[int]]) -> list[int]:
        """A token for each text."""
        weights_BV = next_token_distribution(logits_BV, self._sampling, texts=texts)
        if self._sampling.temperature == 0:
            return weights_BV.argmax(dim=-1).tolist()
        return [
            int(torch.multinomial(weights_V, 1, generator=generator))
            for weights_V, generator in zip(weights_BV.cpu(), self._generators)
        ]
