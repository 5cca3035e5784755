"""Which latents are about something? By labelled text, by a query over top contexts, by a target token, by a direction.

    labels        AUC of the latent's value between places that have the label and places that have not, for all latents; chosen
                  on one half of the text, told for the other: the best of thousands flatters itself
    query         share of a latent's strongest contexts in which a regular expression matches at the peak
    attribution   value x gradient: how much of log p(target) comes from the latent, to first order (Sundararajan et al. 2017;
                  Syed et al. 2310.10348)
    direct        what the latent's direction adds straight to the target's logit, by no later block, over the mean token's
    direction     cosine of the latent's decoder row, or encoder column, with a vector: of a probe, say

A label that two sets of prompts make is a contrast of these. All of it on a model without pipeline.

Shapes: V places (tokens, or texts), M d_model, J latents, n active entries.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from steerscale.config import require
from steerscale.errors import ConfigError, LayoutError
from steerscale.interp.interventions import logit_effect
from steerscale.interp.latent_index import LatentIndex
from steerscale.interp.probes.activations import Encoded, collect, encode_examples
from steerscale.interp.probes.labels import Example, Span, split_examples
from steerscale.language_model import LanguageModel
from steerscale.sae.weights import SAEWeights

_ELEMENTS = 2**24
"""Values at once: 64 MiB in float32."""
MATCH, OTHER = "match", "other"
"""Labels of `pattern_examples`."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A latent and what speaks for it."""

    latent: int
    figures: dict[str, float] = field(default_factory=dict)
    """By name; the first one ranks."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Latents' values at many places, those above 0."""

    latent_n: torch.Tensor
    place_n: torch.Tensor
    value_n: torch.Tensor
    num_latents: int
    num_places: int

    def pooled(self, text_V: torch.Tensor) -> "Activity":
        """Means over the places of each text; `text_V`: its number, 0 .. T-1, for every place."""
        count = int(text_V.max()) + 1
        sizes_T = torch.bincount(text_V, minlength=count)
        keys, inverse_n = (self.latent_n * count + text_V[self.place_n]).unique(return_inverse=True)
        totals = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, inverse_n, self.value_n.double())
        text = keys % count
        return Activity(
            latent_n=keys // count,
            place_n=text,
            value_n=(totals / sizes_T[text]).float(),
            num_latents=self.num_latents,
            num_places=count,
        )


def activity(lm: LanguageModel, sae: SAEWeights, encoded: Sequence[Encoded], hook: str) -> Activity:
    """Values of all latents at the places of labelled text (`probes.activations.encode_examples`)."""
    _one_stage(lm)
    x_VM = collect(lm, encoded, [hook])[hook]
    step, parts = max(1, _ELEMENTS // sae.num_latents), []
    for begin in range(0, len(x_VM), step):
        values = sae.encode(x_VM[begin : begin + step]).float()
        place, latent = values.nonzero().T
        parts.append((latent, place + begin, values[place, latent]))
    latent_n, place_n, value_n = (torch.cat(part) for part in zip(*parts))
    return Activity(
        latent_n=latent_n, place_n=place_n, value_n=value_n, num_latents=sae.num_latents, num_places=len(x_VM)
    )


def label_figures(found: Activity, has_V: torch.Tensor) -> dict[str, torch.Tensor]:
    """How well each latent tells places with a label (bool [V]) from the others; float64 [J] by name.

    auc: probability that a place with the label has the larger value than one without, ties counted half (Mann-Whitney).
    places: how many have the label. inside, outside: mean values; largest: of those with the label. active inside, active
    outside: share of the places that activate it.
    Raises ConfigError if all places or none have the label.
    """
    inside, outside = int(has_V.sum()), int((~has_V).sum())
    require(inside > 0 and outside > 0, f"{inside} places have the label and {outside} have not: both are needed")
    order_n = found.value_n.argsort(stable=True)
    order_n = order_n[found.latent_n[order_n].argsort(stable=True)]
    latent_n, value_n, has_n = found.latent_n[order_n], found.value_n[order_n], has_V[found.place_n[order_n]].double()
    active_J = torch.bincount(latent_n, minlength=found.num_latents)
    rank_n = torch.arange(len(latent_n)) - (active_J.cumsum(0) - active_J)[latent_n] + 1.0
    tied_n = torch.ones_like(latent_n)
    tied_n[1:] = (latent_n[1:] != latent_n[:-1]) | (value_n[1:] != value_n[:-1])
    group_n = tied_n.cumsum(0) - 1
    rank_n = (torch.bincount(group_n, rank_n.double()) / torch.bincount(group_n))[group_n]

    def total(weights: torch.Tensor) -> torch.Tensor:
        return torch.bincount(latent_n, weights, minlength=found.num_latents)

    active_inside_J = total(has_n)
    active_outside_J = active_J - active_inside_J
    # Wins of active places with the label over active ones without; then over silent ones; ties of the silent.
    wins_J = total(rank_n * has_n) - active_inside_J * (active_inside_J + 1) / 2
    wins_J = wins_J + active_inside_J * (outside - active_outside_J)
    wins_J = wins_J + 0.5 * (inside - active_inside_J) * (outside - active_outside_J)
    value_n = value_n.double()
    largest_J = torch.zeros(found.num_latents, dtype=torch.float64).scatter_reduce(0, latent_n, value_n * has_n, "amax")
    return {
        "auc": wins_J / (inside * outside),
        "places": torch.full((found.num_latents,), float(inside)),
        "inside": total(value_n * has_n) / inside,
        "outside": total(value_n * (1 - has_n)) / outside,
        "largest": largest_J,
        "active inside": active_inside_J / inside,
        "active outside": active_outside_J / outside,
    }


def find_by_label(
    lm: LanguageModel,
    sae: SAEWeights,
    examples: Sequence[Example],
    label: str,
    *,
    hook: str,
    count: int = 10,
    vectors: int = 20_000,
    drop_first: int = 4,
    latents: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Found]:
    """Latents whose values tell `label` from all other labels, by their AUC on one half of the examples.

    Where words are labelled, a place is a word's last token. Where texts are, it is a text, and a latent's value there the mean
    over its tokens.

    Args:
        count: latents to return, by the AUC on the first half.
        vectors: tokens to read in each half.
        drop_first: first tokens of a text that do not count: what the SAE was not trained on.
        latents: these instead of the best ones.
    Raises ConfigError if no example has the label, or all have, or `latents` names one that the SAE has not.
    """
    for latent in latents or ():
        require(0 <= latent < sae.num_latents, f"latent {latent} is not among the SAE's {sae.num_latents}")
    whole = examples[0].label is not None
    figures = []
    for half in split_examples(examples, seed=seed, held_out=0.5):
        position = "all" if whole else "last"
        encoded = encode_examples(lm, half, position=position, vectors=vectors, drop_first=drop_first + len(lm.prefix))
        found = activity(lm, sae, encoded, hook)
        if whole:
            found = found.pooled(torch.repeat_interleave(torch.tensor([len(one.places) for one in encoded])))
            has = [one.places[0].label == label for one in encoded]
        else:
            has = [place.label == label for one in encoded for place in one.places]
        if not any(has):
            names = sorted({place.label for one in encoded for place in one.places})
            raise ConfigError(f"no place has the label {label!r}: there are {', '.join(names)}")
        figures.append(label_figures(found, torch.tensor(has)))
    chosen, told = figures
    order = chosen["auc"].argsort(descending=True, stable=True).tolist() if latents is None else latents
    return [
        Found(
            latent=latent,
            figures={"auc": float(chosen["auc"][latent])}
            | {f"held-out {name}" if name == "auc" else name: float(value[latent]) for name, value in told.items()},
        )
        for latent in order[:count]
    ]


def pattern_examples(lines: Sequence[str], pattern: str) -> list[Example]:
    """Texts whose words and signs are labelled MATCH where a regular expression's matches reach, OTHER elsewhere.

    Raises ConfigError for what is no regular expression.
    """
    compiled, examples = compile_pattern(pattern), []
    for number, line in enumerate(lines):
        matches = [match.span() for match in compiled.finditer(line) if match.end() > match.start()]
        spans = tuple(
            Span(*word.span(), MATCH if any(a < word.end() and word.start() < b for a, b in matches) else OTHER)
            for word in re.finditer(r"\w+|[^\w\s]", line)
        )
        if spans:
            examples.append(Example(text=line, spans=spans, group=number))
    return examples


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Raises ConfigError for what is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error


def find_by_query(lm: LanguageModel, index: LatentIndex, pattern: str, *, count: int = 10) -> list[Found]:
    """Latents in whose strongest contexts the expression matches at the peak, by the share of these contexts."""
    compiled, length, found = compile_pattern(pattern), index.tokens_RS.shape[1], []
    for row, latent in enumerate(index.latents):
        positions = [position for position in index.top.position_GK[row].tolist() if position >= 0]
        hits, near = 0, 0
        for position in positions:
            text, at = index.tokens_RS[position // length], position % length
            begin = max(at - index.width, 0)
            before, through, after = (
                lm.tokenizer.decode(text[begin:end].tolist()) for end in (at, at + 1, at + index.width + 1)
            )
            spans = [match.span() for match in compiled.finditer(after)]
            hits += any(a < len(through) and b > len(before) for a, b in spans)
            near += bool(spans)
        if positions and near:
            share = len(positions)
            figures = {"at peak": hits / share, "in context": near / share, "contexts": share}
            found.append(Found(latent=latent, figures={**figures, "largest": float(index.largest_J[row])}))
    found.sort(key=lambda one: (-one.figures["at peak"], -one.figures["in context"], -one.figures["contexts"]))
    return found[:count]


def find_by_attribution(
    lm: LanguageModel,
    sae: SAEWeights,
    prompts: Sequence[Sequence[int]],
    target: int,
    *,
    hook: str,
    count: int = 10,
    drop_first: int = 0,
) -> list[Found]:
    """Latents that log p(`target`) after the prompts owes most to: sum over positions of value x gradient, mean over prompts.

    The figure "gradient" is the sum of gradients alone, of all positions: what turning the latent up by 1 everywhere would add
    to log p, to first order, whether it is active or not.
    """
    _one_stage(lm)
    scale = sae.input_scale if sae.output_scale is None else sae.output_scale
    attribution_J, gradient_J = torch.zeros(sae.num_latents), torch.zeros(sae.num_latents)
    require(bool(prompts), "attribution needs prompts")
    for prompt in prompts:
        x_SM, gradient_SM = target_gradient(lm, prompt, target, hook)
        x_SM, gradient_SM = x_SM[drop_first:], gradient_SM[drop_first:]
        slope_SJ = gradient_SM.cpu() @ (sae.W_dec / scale).T
        attribution_J += (sae.encode(x_SM.cpu()).float() * slope_SJ).sum(dim=0) / len(prompts)
        gradient_J += slope_SJ.sum(dim=0) / len(prompts)
    order = attribution_J.argsort(descending=True, stable=True).tolist()[:count]
    return [
        Found(
            latent=latent, figures={"attribution": float(attribution_J[latent]), "gradient": float(gradient_J[latent])}
        )
        for latent in order
    ]


def target_gradient(
    lm: LanguageModel, prompt: Sequence[int], target: int, hook: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [S, M] at `hook`, and the gradient of log p(`target`) after `prompt` to them, float32."""
    leaves: list[torch.Tensor] = []

    def keep(x_BSM: torch.Tensor) -> torch.Tensor:
        leaves.append(x_BSM.detach().requires_grad_())
        return leaves[0]

    tokens_BS = torch.tensor([list(prompt)], device=lm.context.device)
    at_B = torch.tensor([len(prompt) - 1], device=lm.context.device)
    logits_BV = lm.logits(tokens_BS, {hook: keep}, at_B=at_B, gradients=True)
    assert logits_BV is not None
    (gradient_BSM,) = torch.autograd.grad(logits_BV.log_softmax(dim=-1)[0, target], leaves)
    return leaves[0].detach()[0].float(), gradient_BSM[0].float()


def find_by_direct_effect(lm: LanguageModel, sae: SAEWeights, target: int, *, count: int = 10) -> list[Found]:
    """Latents whose direction raises the logit of `target` most, straight; see `interventions.logit_effect`.

    Ranked by the logit over the mean token's in standard deviations over the vocabulary ("z"): directions that favour all
    frequent tokens would come first otherwise. Memory: d_model x vocabulary float32.
    """
    _one_stage(lm)
    scale = sae.input_scale if sae.output_scale is None else sae.output_scale
    effect_MV = logit_effect(lm, torch.eye(lm.model.d_model, device=lm.context.device))
    assert effect_MV is not None
    effect_MV = (effect_MV - effect_MV.mean(dim=-1, keepdim=True)).cpu()
    spread_MM = effect_MV @ effect_MV.T / effect_MV.shape[1]
    W_dec = sae.W_dec.float() / scale
    logit_J = W_dec @ effect_MV[:, target]
    z_J = logit_J / ((W_dec @ spread_MM) * W_dec).sum(dim=-1).clamp_min(1e-30).sqrt()
    return [
        Found(latent=latent, figures={"z": float(z_J[latent]), "logit": float(logit_J[latent])})
        for latent in _best(z_J, count)
    ]


def find_by_direction(sae: SAEWeights, direction_M: torch.Tensor, *, count: int = 10) -> list[Found]:
    """Latents whose decoder rows point most alike; with the encoder's cosine beside it. Raises ConfigError on widths."""
    if len(direction_M) != sae.d_out:
        raise ConfigError(f"the direction has width {len(direction_M)}, the SAE is of activations of width {sae.d_out}")
    unit_M = torch.nn.functional.normalize(direction_M.float().cpu(), dim=0)
    decoder_J = torch.nn.functional.normalize(sae.W_dec.float(), dim=1) @ unit_M
    encoder_J = unit_M @ torch.nn.functional.normalize(sae.W_enc.float(), dim=0)
    return [
        Found(latent=latent, figures={"decoder": float(decoder_J[latent]), "encoder": float(encoder_J[latent])})
        for latent in _best(decoder_J, count)
    ]


def _best(score_J: torch.Tensor, count: int) -> list[int]:
    return score_J.argsort(descending=True, stable=True).tolist()[:count]


def _one_stage(lm: LanguageModel) -> None:
    if lm.context.layout.pipeline > 1:
        raise LayoutError(f"parallel.pipeline must be 1 to find latents, it is {lm.context.layout.pipeline}")
