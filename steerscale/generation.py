"""Text from a language model, token by token, for many prompts at once, on any layout.

Shapes: B texts, S sequence, V vocabulary.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Literal

import torch

from steerscale.config import require
from steerscale.language_model import LanguageModel
from steerscale.models.hooks import HookFunction
from steerscale.models.kv_cache import KeyValueCache, cached
from steerscale.sampling import MODEL, Choice, Sampling

_CONTEXT = 8
"""Tokens of the prompt that new ones are decoded with."""
_INCOMPLETE = "\ufffd"
"""What stands for a character whose bytes have not all come."""


@dataclass
class Completion:
    """What the model made of one prompt."""

    tokens: list[int] = field(default_factory=list)
    """New tokens; the eos or the tokens of the stop string that ended it are among them."""
    text: str = ""
    """Without the prompt, the eos and the stop string."""
    end: Literal["eos", "stop", "length"] = "length"
    """Why it ends: an eos, a stop string, or `max_tokens`."""


def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = MODEL,
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    functions: Mapping[str, HookFunction] | None = None,
    cache: bool = True,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Go on from each prompt; on all ranks alike.

    Args:
        prompts: token ids, see `LanguageModel.encode`.
        stop: a text ends where one of these appears in it.
        functions: called at hook points in every forward pass, for steering. With the cache they see the prompts once (padded
            on the right to the longest) and then each new position alone.
        cache: keep keys and values; without it (and once a text is longer than the model looks back, and under sequence
            parallelism) each token runs the last `seq_len` tokens again.
        on_text: called with (number of the prompt, piece of text) as text becomes certain.
    """
    results = [Completion() for _ in prompts]
    texts = [_Text(lm, prompt, stop) for prompt in prompts] if lm.has_tokenizer else []
    require(not stop or bool(texts), "stop strings need a tokenizer")
    eos_id = lm.tokenizer.eos_id if texts else None
    open_rows = set(range(len(prompts)))
    steps = next_tokens(
        lm, prompts, sampling, max_tokens=max_tokens, functions=functions, cache=cache, open_rows=open_rows
    )
    with closing(steps):  # whatever a callback raises, the cache is taken out
        for tokens in steps:
            for row in sorted(open_rows):
                result, token = results[row], tokens[row]
                result.tokens.append(token)
                if token == eos_id:
                    result.end = "eos"
                elif texts and texts[row].add(token):
                    result.end = "stop"
                done = result.end != "length" or len(result.tokens) == max_tokens
                if texts:
                    piece = texts[row].take(all=done)
                    result.text += piece
                    if on_text is not None and piece:
                        on_text(row, piece)
                if done:
                    open_rows.discard(row)
    return results


def next_tokens(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_tokens: int,
    functions: Mapping[str, HookFunction] | None = None,
    cache: bool = True,
    open_rows: set[int] | None = None,
) -> Generator[list[int], None, None]:
    """Yield a next token for every prompt, up to `max_tokens` times, or until the caller has emptied `open_rows`."""
    require(bool(prompts) and all(map(len, prompts)), "the prompt is empty: give at least one token")
    require(max_tokens >= 1, f"max_tokens must be at least 1, got {max_tokens}")
    require(
        all(0 <= token < lm.model.tokens for prompt in prompts for token in prompt),
        f"a prompt has token ids outside of the model's 0 to {lm.model.tokens - 1}",
    )
    texts = [list(prompt) for prompt in prompts]
    choice = Choice(sampling, len(texts))
    longest = max(map(len, texts))
    slots = min(longest + max_tokens, lm.seq_len)
    with ExitStack() as stack:
        stack.callback(lm.close)
        keeping = stack.enter_context(ExitStack())
        kept: KeyValueCache | None = None
        if cache and not lm.context.layout.sequence and longest <= lm.seq_len:
            kept = keeping.enter_context(cached(lm.chunks, len(texts), slots))
        for step in range(max_tokens):
            if kept is not None and longest + step > lm.seq_len:
                keeping.close()  # positions move on from here: nothing that was kept stays true
                kept = None
            logits_BV = _last_logits(lm, texts, kept, functions, first=step == 0)
            # Nothing can be drawn from what is no number; all ranks are told, so that all of them end.
            whole = logits_BV is not None and bool(logits_BV.isfinite().all())
            drawn = choice.draw(logits_BV, texts) if logits_BV is not None and whole else []
            tokens = lm.tell(None if logits_BV is None else drawn)
            require(
                bool(tokens),
                "the model's logits are not finite: what changes it is too strong, or its weights are damaged",
            )
            for text, token in zip(texts, tokens):
                text.append(token)
            yield tokens
            if open_rows is not None and not open_rows:
                return


def _last_logits(
    lm: LanguageModel,
    texts: Sequence[Sequence[int]],
    kept: KeyValueCache | None,
    functions: Mapping[str, HookFunction] | None,
    *,
    first: bool,
) -> torch.Tensor | None:
    """Logits [B, V] after the last token of each text, on the last stage."""
    device = lm.context.device
    if kept is not None and not first:
        tokens_B1 = torch.tensor([[text[-1]] for text in texts], device=device)
        positions_B1 = torch.tensor([[len(text) - 1] for text in texts], device=device)
        kept.begin(positions_B1)
        return lm.logits(tokens_B1, functions, positions_BS=positions_B1, at_B=torch.zeros_like(tokens_B1[:, 0]))
    windows = [list(text[-lm.seq_len :]) for text in texts]
    length = max(map(len, windows))
    # On the right, where causal attention of what counts does not see it.
    tokens_BS = torch.tensor([window + window[-1:] * (length - len(window)) for window in windows], device=device)
    if kept is not None:
        kept.begin(torch.arange(length, device=device).expand_as(tokens_BS))
    last_B = torch.tensor([len(window) - 1 for window in windows], device=device)
    return lm.logits(tokens_BS, functions, at_B=last_B)


def next_logits(
    lm: LanguageModel, prompt: Sequence[int], functions: Mapping[str, HookFunction] | None = None
) -> torch.Tensor | None:
    """Logits float32 [V] of the token after `prompt`; None but on the last stage."""
    logits_BV = _last_logits(lm, [prompt], None, functions, first=True)
    lm.close()
    return None if logits_BV is None else logits_BV[0]


class _Text:
    """Text of growing tokens: what of it is certain, and whether a stop string has come."""

    def __init__(self, lm: LanguageModel, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = lm.tokenizer, [string for string in stop if string]
        # Decoded together with the prompt's end: a tokenizer drops the space before a text's first word.
        self._tokens = list(prompt[-_CONTEXT:])
        self._prompt = self._tokenizer.decode(self._tokens)
        self._text, self._taken = "", 0

    def add(self, token: int) -> bool:
        """Returns whether the text now ends."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        # The prompt may end within a character, which is then the new text's; or with what stands for damaged ones itself.
        known = self._prompt if text.startswith(self._prompt) else self._prompt.rstrip(_INCOMPLETE)
        self._text = text[len(known) :]
        found = [at for at in (self._text.find(string) for string in self._stop) if at >= 0]
        if found:
            self._text = self._text[: min(found)]
        return bool(found)

    def take(self, *, all: bool) -> str:
        """What has become certain since the last call; with `all`, the rest.

        Held back: an incomplete character, and what could be the beginning of a stop string.
        """
        end = len(self._text)
        if not all:
            end = len(self._text.rstrip(_INCOMPLETE))
            for string in self._stop:
                for size in range(min(len(string) - 1, end), 0, -1):
                    if self._text[:end].endswith(string[:size]):
                        end -= size
                        break
        piece = self._text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece
