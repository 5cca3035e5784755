"""How strongly may one steer? Effect against fluency and relevance, over strengths, beside baselines on the same prompts.

For each method and strength, by numbers that need no judge:

    target      probability of the concept's tokens as the next token after the prompt, mean over prompts
    kl          KL divergence of the steered from the unsteered next token's distribution, nats, mean over prompts
    concept     share of the generated texts in which the concept's expression matches
    perplexity  of the generated texts under the unsteered model after the plain prompt, exp of the mean loss a token
    repetition  share of the generated texts' 4-grams that were in the same text before
    relevance   own prompt against other prompts: share of the comparisons in which the unsteered model gives the generated text
                a larger probability after its own one, c; as 2 c - 1, not below 0, since chance is 1/2
    fluency     (perplexity without steering / perplexity, at most 1) x (1 - repetition)
    combined    harmonic mean of concept (1 - concept where it is to be suppressed), fluency and relevance

The last follows AxBench (2501.17148), which has a language model judge the three. These are proxies: a text can have the word
without being about it, and be fluent and empty.

Shapes: B texts, S sequence, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from steerscale.config import require
from steerscale.errors import LayoutError
from steerscale.generation import generate
from steerscale.interp.find import compile_pattern
from steerscale.interp.steering import Effect
from steerscale.language_model import LanguageModel
from steerscale.models.hooks import HookFunction
from steerscale.sampling import Sampling

_N_GRAM = 4
_BATCH = 32
"""Texts in a forward pass."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to bring a concept into a text, or out of it."""

    name: str
    functions: Callable[[float], Mapping[str, HookFunction]] | None = None
    """Of the strength; None: without steering."""
    instruction: str | None = None
    """Prompting: what is put in front of each prompt, with a blank line between; it has no strength."""
    strengths: list[float] | None = None
    """Its own; None: the sweep's."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is asked."""

    prompts: list[str]
    """Texts to go on from."""
    concept: str
    """A regular expression."""
    strengths: list[float]
    """Of every method but prompting; 0 is added, once for all."""
    tokens: list[int]
    """Those that count as the concept's; see `concept_tokens`."""
    suppress: bool = False
    """The concept is to be absent."""
    max_tokens: int = 32
    """Of a generated text."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, top_p=0.95))
    """How texts are generated."""
    distractors: int = 2
    """Other prompts that each text is compared with, for relevance."""

    def __post_init__(self) -> None:
        compile_pattern(self.concept)
        require(len(self.prompts) > self.distractors >= 1, f"relevance needs more than {self.distractors} prompts")
        require(bool(self.strengths), "there is no strength to try")
        require(bool(self.tokens), f"no token of the vocabulary matches {self.concept!r}: name some")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method at one strength; figures as above."""

    method: str
    strength: float
    target: float
    kl: float
    concept: float
    perplexity: float
    repetition: float
    relevance: float
    fluency: float
    combined: float
    texts: list[str]
    """As generated, one a prompt."""

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


FIGURES = ("target", "kl", "concept", "perplexity", "repetition", "relevance", "fluency", "combined")


def concept_tokens(lm: LanguageModel, concept: str) -> list[int]:
    """Tokens whose text, without blanks around it, is a match of the expression as a whole."""
    compiled = compile_pattern(concept)
    texts = [lm.tokenizer.decode([token]).strip() for token in range(lm.tokenizer.vocab_size)]
    return [token for token, text in enumerate(texts) if text and compiled.fullmatch(text)]


def run_sweep(
    lm: LanguageModel, sweep: Sweep, methods: Sequence[Method], *, on_point: Callable[[Point], None] | None = None
) -> list[Point]:
    """Every method at every strength, "none" first. One generation, one forward pass of prompts and one of texts each.

    Raises:
        LayoutError: under a pipeline.
        ConfigError: a prompt and its text are longer than the model looks back: its losses would be of something else.
    """
    if lm.context.layout.pipeline > 1:
        raise LayoutError(f"parallel.pipeline must be 1 to sweep, it is {lm.context.layout.pipeline}")
    plain = [lm.encode(prompt) for prompt in sweep.prompts]
    led = {one.instruction: _led(lm, sweep, one.instruction) for one in methods if one.instruction is not None}
    longest = max(map(len, plain))
    require(
        longest + sweep.max_tokens <= lm.seq_len,
        f"the model looks back on {lm.seq_len} tokens: the longest prompt has {longest}, and {sweep.max_tokens} are to follow",
    )
    for instruction, prompts in led.items():
        longest = max(map(len, prompts))
        require(
            longest <= lm.seq_len,
            f"the model looks back on {lm.seq_len} tokens: with {instruction[:40]!r} in front the longest prompt has {longest}",
        )
    before = next_distributions(lm, plain, {})
    points: list[Point] = []
    cases = [(Method(name="none"), 0.0)]
    for method in methods:
        strengths = [1.0] if method.functions is None else method.strengths or sweep.strengths
        cases += [(method, strength) for strength in strengths if strength]
    for method, strength in cases:
        functions = {} if method.functions is None else method.functions(strength)
        prompts = plain if method.instruction is None else led[method.instruction]
        base = points[0].perplexity if points else None
        point = _measure(lm, sweep, method.name, strength, plain, prompts, before, functions, base)
        points.append(point)
        if on_point is not None:
            on_point(point)
    return points


def _led(lm: LanguageModel, sweep: Sweep, instruction: str) -> list[list[int]]:
    """Tokens of the prompts with an instruction in front."""
    return [lm.encode(f"{instruction}\n\n{prompt}") for prompt in sweep.prompts]


def _measure(
    lm: LanguageModel,
    sweep: Sweep,
    name: str,
    strength: float,
    plain: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    before: Sequence[torch.Tensor],
    functions: Mapping[str, HookFunction],
    base: float | None,
) -> Point:
    """`plain` are the prompts as they are, `prompts` what the model gets; `base`: perplexity without steering."""
    after = next_distributions(lm, prompts, functions)
    made = generate(lm, prompts, sweep.sampling, max_tokens=sweep.max_tokens, functions=functions)
    tokens, texts = [one.tokens for one in made], [one.text for one in made]
    losses = _losses(lm, plain, tokens, sweep.distractors)
    own, others = losses[0], losses[1:]
    count = sum(map(len, tokens))
    perplexity = math.exp(sum(own) / count)
    wins = [float(mine < other) for row in others for mine, other in zip(own, row)]
    relevance = max(0.0, 2 * sum(wins) / len(wins) - 1)
    share = sum(re.search(sweep.concept, text) is not None for text in texts) / len(texts)
    repetition = repeated(tokens)
    fluency = min(1.0, (base or perplexity) / perplexity) * (1 - repetition)
    return Point(
        method=name,
        strength=strength,
        target=sum(float(one[sweep.tokens].sum()) for one in after) / len(after),
        kl=sum(Effect(before_V=old, after_V=new).kl for old, new in zip(before, after)) / len(after),
        concept=share,
        perplexity=perplexity,
        repetition=repetition,
        relevance=relevance,
        fluency=fluency,
        combined=harmonic_mean([1 - share if sweep.suppress else share, fluency, relevance]),
        texts=texts,
    )


def next_distributions(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], functions: Mapping[str, HookFunction]
) -> list[torch.Tensor]:
    """Probabilities [V] of the token after each prompt."""
    found: list[torch.Tensor] = []
    for begin in range(0, len(prompts), _BATCH):
        part = prompts[begin : begin + _BATCH]
        last_B = torch.tensor([len(prompt) - 1 for prompt in part], device=lm.context.device)
        logits_BV = lm.logits(_padded(lm, part), functions, at_B=last_B)
        assert logits_BV is not None
        found += logits_BV.softmax(dim=-1).cpu().unbind()
    return found


def _padded(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [B, S], filled up on the right, where causal attention of what counts does not see it."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *([row[-1]] * (length - len(row)))] for row in rows], device=lm.context.device)


def _losses(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], distractors: int
) -> list[list[float]]:
    """Loss of each text after its own prompt, and after each of the next `distractors` prompts: sums over tokens, nats."""
    found = []
    for shift in range(distractors + 1):
        rows = [[*prompts[(row + shift) % len(prompts)], *text] for row, text in enumerate(texts)]
        losses: list[float] = []
        for begin in range(0, len(rows), _BATCH):
            part = rows[begin : begin + _BATCH]
            tokens_BS = _padded(lm, part)
            losses_BS = lm.losses(tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous())
            assert losses_BS is not None
            for index, (row, text) in enumerate(zip(part, texts[begin:])):
                losses.append(float(losses_BS[index, len(row) - len(text) - 1 : len(row) - 1].double().sum()))
        found.append(losses)
    return found


def repeated(texts: Sequence[Sequence[int]]) -> float:
    """Share of the 4-grams of tokens that came before in the same text; 0 where all are shorter."""
    total, distinct = 0, 0
    for text in texts:
        grams = [tuple(text[at : at + _N_GRAM]) for at in range(len(text) - _N_GRAM + 1)]
        total, distinct = total + len(grams), distinct + len(set(grams))
    return 1 - distinct / total if total else 0.0


def harmonic_mean(values: Sequence[float]) -> float:
    """0 if one of them is."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)
