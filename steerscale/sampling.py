"""Next tokens from a trained model: temperature, top-k and nucleus sampling.

Shapes: S tokens so far, V vocabulary.
"""

from collections.abc import Iterator

import torch

from steerscale.config import require
from steerscale.models.gpt import GPT


def next_token_distribution(
    logits_V: torch.Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> torch.Tensor:
    """Probabilities [V] of the next token, in float32.

    Args:
        temperature: divides the logits; 0 puts everything on the largest one (greedy).
        top_k: keep the k most probable tokens; None keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches this (Holtzman et al. 2020), after top_k.
    """
    require(temperature >= 0, f"temperature must not be negative, got {temperature}")
    require(top_k is None or top_k > 0, f"top_k must be positive, got {top_k}")
    require(0 < top_p <= 1, f"top_p must be in (0, 1], got {top_p}")
    logits_V = logits_V.float()
    if temperature == 0:
        return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(dim=-1, keepdim=True), 1.0)
    logits_V = logits_V / temperature
    if top_k is not None and top_k < logits_V.numel():
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], float("-inf"))
    probabilities_V = logits_V.softmax(dim=-1)
    if top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        # A token stays if the mass before it is below top_p: the one that crosses the line is still in.
        dropped = order_V[sorted_V.cumsum(dim=-1) - sorted_V >= top_p]
        probabilities_V = probabilities_V.index_fill(0, dropped, 0.0)
        probabilities_V = probabilities_V / probabilities_V.sum()
    return probabilities_V


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    *,
    max_tokens: int,
    eos_id: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to `max_tokens` new tokens after `prompt`, one by one; ends after `eos_id`.

    For a whole model in one process. Each token runs the whole (last seq_len tokens of the) text again: no KV cache yet.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = list(prompt)
    require(bool(tokens), "the prompt is empty: give at least one token")
    for _ in range(max_tokens):
        tokens_BS = torch.tensor([tokens[-model.model.seq_len :]], device=device)
        logits_V = model(tokens_BS)[-1, 0, : model.model.tokens]
        weights = next_token_distribution(logits_V, temperature=temperature, top_k=top_k, top_p=top_p)
        token = int(torch.multinomial(weights, 1, generator=generator))
        yield token
        if token == eos_id:
            return
        tokens.append(token)
