"""What latents are compared with: activation addition, difference of means, a probe's direction, prompting.

Vectors are as long as the change that the recipe makes at strength 1 on the same prompts (a mean over tokens), so that one axis
of strengths serves all: what differs is where they point.

Shapes: B texts, S sequence, M d_model, V places.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from steerscale.config import require
from steerscale.errors import ConfigError
from steerscale.interp.combine import acting, weighted
from steerscale.interp.interventions import add_direction, capture
from steerscale.interp.probes.activations import collect, encode_examples
from steerscale.interp.probes.edit import direction
from steerscale.interp.probes.fit import fit_probe
from steerscale.interp.probes.labels import Example
from steerscale.interp.recipes import OpenRecipe
from steerscale.interp.sweep import Method
from steerscale.language_model import LanguageModel
from steerscale.models.hooks import HookFunction


def recipe_hook(opened: OpenRecipe) -> str:
    """The hook point that baselines act at: the first SAE's, direction's or probe's."""
    hooks = [source.hook for source in opened.sources] + [direction.hook for direction in opened.recipe.directions]
    return (hooks + [probe.hook for probe in opened.probes])[0]


def change_norm(lm: LanguageModel, opened: OpenRecipe, prompts: Sequence[str], hook: str) -> float:
    """Mean norm of what the recipe changes at strength 1, over the prompts' tokens that it does not spare.

    Raises ConfigError if it changes nothing there.
    """
    functions, total, count = opened.functions(lm), 0.0, 0
    for prompt in prompts:
        tokens_BS = torch.tensor([lm.encode(prompt)], device=lm.context.device)
        before, after = (capture(lm, tokens_BS, [hook], chosen)[hook] for chosen in ({}, functions))
        norms_BS = (after - before).float().norm(dim=-1)
        acts_BS = acting(lm, tokens_BS, spare_special=opened.spare_special, spare_first=opened.spare_first)
        total, count = total + float(norms_BS[acts_BS].sum()), count + int(acts_BS.sum())
    if total == 0:
        raise ConfigError(
            "the recipe changes nothing on these prompts, so that there is no length for baselines: prompts must be longer "
            f"than the {opened.spare_first} first tokens that it spares, and activate what it scales"
        )
    return total / count


def recipe_method(lm: LanguageModel, opened: OpenRecipe, *, name: str = "recipe") -> Method:
    """The recipe itself."""
    return Method(name=name, functions=lambda strength: opened.functions(lm, strength=strength))


def vector_method(
    lm: LanguageModel, opened: OpenRecipe, name: str, vector_M: torch.Tensor, *, hook: str, norm: float
) -> Method:
    """A vector of any length, brought to the length `norm` and added where the recipe would act."""
    require(float(vector_M.norm()) > 0, f"the vector of {name} is zero: its texts do not differ for the model")
    change = add_direction((vector_M * (norm / vector_M.norm())).to(lm.context.device))

    def functions(strength: float) -> Mapping[str, HookFunction]:
        act = partial(weighted, lm, change, spare_special=opened.spare_special, spare_first=opened.spare_first)
        return {hook: act(strength)}

    return Method(name=name, functions=functions)


def pair_vector(lm: LanguageModel, pair: tuple[str, str], hook: str) -> torch.Tensor:
    """[M] last token's activation of the first text minus that of the second (activation addition, Turner et al. 2308.10248).

    Here it is added at every position, as the other methods act, not at the first ones only.
    """
    first_M, second_M = (
        capture(lm, torch.tensor([lm.encode(text)], device=lm.context.device), [hook])[hook][0, -1].float()
        for text in pair
    )
    return first_M - second_M


def contrast_vectors(
    lm: LanguageModel,
    texts: tuple[Sequence[str], Sequence[str]],
    hook: str,
    *,
    drop_first: int,
    tokens: int = 3000,
) -> dict[str, torch.Tensor]:
    """[M] of the tokens of texts with the concept against those without: difference of means, a logistic probe's weights.

    `tokens`: to read at most, half of them of either kind.
    """
    names = ("with", "without")
    examples = [Example(text=text, label=name) for name, part in zip(names, texts) for text in part]
    places = []
    for name in names:
        chosen = [example for example in examples if example.label == name]
        places += encode_examples(
            lm, chosen, position="all", vectors=tokens // 2, drop_first=drop_first + len(lm.prefix)
        )
    x_VM = collect(lm, places, [hook])[hook]
    y_V = torch.tensor([names.index(place.label) for one in places for place in one.places])
    means_M = [x_VM[y_V == number].mean(dim=0) for number in (0, 1)]
    probe = fit_probe(x_VM, y_V, names, hook=hook, kind="logistic", position="all")
    return {"difference of means": means_M[0] - means_M[1], "probe": direction(probe, 0, 1)}
