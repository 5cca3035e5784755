"""What is a latent about? Where it is most active in a text, how often, and the tokens its direction promotes.

Shapes: B sequences, S sequence, M d_model, V vocabulary, J latents looked at.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from steerscale.errors import LayoutError
from steerscale.interp.interventions import capture, logit_effect
from steerscale.interp.steering import Edit, Steering
from steerscale.language_model import LanguageModel
from steerscale.sae.weights import SAEWeights


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
    if lm.context.layout.pipeline > 1:
        raise LayoutError(
            f"parallel.pipeline must be 1 to look at latents, it is {lm.context.layout.pipeline}: their tops are kept "
            "where the activations are, the unembedding is on the last stage"
        )
    edits = [Edit(latent=latent, value=0.0) for latent in latents]
    steering = Steering(sae, edits, hook=hook, spare_special=spare_special, spare_first=spare_first)
    features = [Feature(latent=latent) for latent in latents]
    heaps: list[list[tuple[float, int, Context]]] = [[] for _ in latents]
    active_J, total_J, tokens, number = torch.zeros(len(latents)), torch.zeros(len(latents)), 0, 0
    for batch_BT in sequences:
        tokens_BS = batch_BT[:, :-1].contiguous()
        x_BSM = capture(lm, tokens_BS, [steering.hook])[steering.hook]
        counts_BS = steering.acts(lm, tokens_BS)
        values_BSJ = (steering.values(x_BSM) * counts_BS.unsqueeze(-1)).float().cpu()
        active_J += (values_BSJ > 0).sum(dim=(0, 1))
        total_J += values_BSJ.sum(dim=(0, 1))
        tokens += int(counts_BS.sum())
        best_BJ = values_BSJ.max(dim=1)
        for row, text in enumerate(tokens_BS.tolist()):
            number += 1
            for index, heap in enumerate(heaps):
                value, at = float(best_BJ.values[row, index]), int(best_BJ.indices[row, index])
                if value > 0:
                    begin = max(at - width, 0)
                    context = Context(value, tuple(text[begin : at + width + 1]), at - begin)
                    (heapq.heappush if len(heap) < num_contexts else heapq.heappushpop)(heap, (value, -number, context))
    effects_JV = logit_effect(lm, steering.directions_EM)
    assert effects_JV is not None
    for index, feature in enumerate(features):
        feature.contexts = [context for *_, context in sorted(heaps[index], reverse=True)]
        feature.frequency = float(active_J[index]) / max(tokens, 1)
        feature.mean = float(total_J[index] / active_J[index].clamp_min(1))
        feature.promoted = _extreme(effects_JV[index], num_tokens, largest=True)
        feature.suppressed = _extreme(effects_JV[index], num_tokens, largest=False)
    return features


def _extreme(effect_V: torch.Tensor, count: int, *, largest: bool) -> list[tuple[int, float]]:
    found = effect_V.topk(min(count, len(effect_V)), largest=largest)
    return list(zip(found.indices.tolist(), found.values.tolist()))
