"""What is a latent about? Where it is most active in a text, how often, and the tokens its direction promotes.

Shapes: B sequences, S sequence, M d_model, V vocabulary, J latents looked at, C tokens or latents named for each.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from steerscale.interp.interventions import logit_effect
from steerscale.interp.latent_index import LatentIndex, build_index
from steerscale.language_model import LanguageModel
from steerscale.sae.weights import SAEWeights

_ELEMENTS = 2**25
"""Logits or cosines at once: 128 MiB."""


class Context(NamedTuple):
    """A place where a latent is active."""

    value: float
    """Of the latent, at the token `at`."""
    tokens: tuple[int, ...]
    """Around it."""
    at: int
    """Index into `tokens`."""


@dataclass
class Feature:
    """What was found about one latent."""

    latent: int
    contexts: list[Context] = field(default_factory=list)
    """The strongest first, one a sequence."""
    frequency: float = 0.0
    """Share of the tokens that activate it."""
    mean: float = 0.0
    """Of its values where it is active."""
    promoted: list[tuple[int, float]] = field(default_factory=list)
    """(token, logit) of its direction, largest first; see `interventions.logit_effect`."""
    suppressed: list[tuple[int, float]] = field(default_factory=list)
    """The same, smallest first."""

    @property
    def largest(self) -> float:
        """Its largest value; 0 if it was never active."""
        return self.contexts[0].value if self.contexts else 0.0


def describe_latents(
    lm: LanguageModel,
    sae: SAEWeights,
    latents: Sequence[int],
    sequences: Iterable[torch.Tensor],
    *,
    hook: str | None = None,
    spare_special: bool = True,
    spare_first: int = 0,
    num_contexts: int = 5,
    width: int = 12,
    num_tokens: int = 8,
) -> list[Feature]:
    """Read `sequences` (int64 [B, S + 1]) and describe each latent; no pipeline.

    Tokens that steering would spare do not count. `width`: tokens of a context on either side.
    Raises LayoutError under a pipeline; ConfigError as `Steering` does.
    """
    index = build_index(
        lm,
        sae,
        sequences,
        latents=latents,
        hook=hook,
        spare_special=spare_special,
        spare_first=spare_first,
        num_top=num_contexts,
        num_drawn=0,
        width=width,
    )
    promoted, suppressed = token_effects(lm, sae, latents, num_tokens)
    return [
        Feature(
            latent=latent,
            contexts=[*_contexts(index, row)],
            frequency=float(index.active_J[row]) / index.num_tokens,
            mean=float(index.total_J[row] / index.active_J[row].clamp_min(1)),
            promoted=promoted.pairs(row),
            suppressed=suppressed.pairs(row),
        )
        for row, latent in enumerate(latents)
    ]


def _contexts(index: LatentIndex, row: int) -> Iterator[Context]:
    length = index.tokens_RS.shape[1]
    for value, position in zip(index.top.value_GK[row].tolist(), index.top.position_GK[row].tolist()):
        if position >= 0:
            text, at = index.tokens_RS[position // length].tolist(), position % length
            begin = max(at - index.width, 0)
            yield Context(value, tuple(text[begin : at + index.width + 1]), at - begin)


class TokenEffects(NamedTuple):
    """Tokens [J, C] that latents' directions promote or suppress most, the most first."""

    tokens_JC: torch.Tensor
    """Ids, int64."""
    logits_JC: torch.Tensor
    """See `interventions.logit_effect`, float32."""

    def pairs(self, row: int) -> list[tuple[int, float]]:
        """(token, logit) of one latent."""
        return list(zip(self.tokens_JC[row].tolist(), self.logits_JC[row].tolist()))


def token_effects(
    lm: LanguageModel, sae: SAEWeights, latents: Sequence[int], num_tokens: int
) -> tuple[TokenEffects, TokenEffects]:
    """Tokens that these latents promote, and that they suppress; on all ranks alike, no pipeline.

    The logits [J, V] are gathered for a few latents at a time.
    """
    scale = sae.input_scale if sae.output_scale is None else sae.output_scale
    step = max(1, _ELEMENTS // lm.model.tokens)
    count = min(num_tokens, lm.model.tokens)
    found: dict[bool, list[TokenEffects]] = {True: [], False: []}
    for begin in range(0, len(latents), step):
        rows = torch.tensor(latents[begin : begin + step])
        effects_JV = logit_effect(lm, (sae.W_dec[rows] / scale).to(lm.context.device))
        assert effects_JV is not None
        for largest, parts in found.items():
            best = effects_JV.topk(count, dim=-1, largest=largest)
            parts.append(TokenEffects(best.indices.cpu(), best.values.cpu()))
    promoted, suppressed = (TokenEffects(*map(torch.cat, zip(*parts))) for parts in found.values())
    return promoted, suppressed


@torch.no_grad()
def decoder_neighbours(sae: SAEWeights, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For every latent the `count` others whose decoder rows are most alike: numbers int64 and cosines float32 [J, C].

    All products of the J rows, a few rows at a time: 2 J^2 d_model FLOPs.
    """
    total = sae.num_latents
    directions_JM = torch.nn.functional.normalize(sae.W_dec.to(device).float(), dim=-1)
    step, parts = max(1, _ELEMENTS // total), []
    for begin in range(0, total, step):
        cosines = directions_JM[begin : begin + step] @ directions_JM.T
        rows = torch.arange(len(cosines), device=device)
        cosines[rows, begin + rows] = float("-inf")  # itself
        parts.append(cosines.topk(min(count, total - 1), dim=-1))
    return torch.cat([part.indices for part in parts]).cpu(), torch.cat([part.values for part in parts]).cpu()
