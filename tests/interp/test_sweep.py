"""Sweeps: figures against plain definitions; methods beside each other at one length."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerscale.errors import ConfigError
from steerscale.interp import sweep_baselines
from steerscale.interp.interventions import capture
from steerscale.interp.recipes import EditRecipe, Recipe, SAERecipe
from steerscale.interp.steering import effect
from steerscale.interp.steering_plot import plot_sweep
from steerscale.interp.sweep import Method, Sweep, concept_tokens, harmonic_mean, repeated, run_sweep
from steerscale.language_model import LanguageModel
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.formats import write_sae
from steerscale.sampling import GREEDY
from steerscale.tokenizers.base import Tokenizer
from tests.interp.saes import HOOK, random_sae
from tests.models.gpts import GPT2, build_random

D = GPT2.d_model


class Letters(Tokenizer):
    """61 characters, one a token."""

    type, vocab_size, eos_id, bos_id, pad_id, hash = "letters", 61, -1, None, None, ""
    _letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456\n"

    def encode(self, text: str) -> list[int]:
        return [self._letters.index(letter) for letter in text]

    def decode(self, ids: object) -> str:
        return "".join(self._letters[int(token)] for token in ids)  # type: ignore[attr-defined]

    def piece(self, token: int) -> str:
        return self._letters[token]

    def encode_documents(self, texts: list[str]) -> list:
        raise NotImplementedError

    def id_of(self, piece: str) -> int | None:
        raise NotImplementedError

    def save(self, directory: Path) -> None:
        raise NotImplementedError


def model(context: object) -> LanguageModel:
    return LanguageModel(build_random(GPT2, context), context, tokenizer=Letters())  # type: ignore[arg-type]


def test_figures_of_texts() -> None:
    assert repeated([[1, 2, 3, 4, 1, 2, 3, 4], [1, 2]]) == pytest.approx(0.2)
    assert repeated([[7] * 8]) == pytest.approx(1 - 1 / 5)
    assert repeated([[1, 2, 3, 4, 5]] * 2) == 0  # another text is no repetition
    assert repeated([[1]]) == 0
    assert harmonic_mean([1, 0.5, 0.5]) == pytest.approx(0.6)
    assert harmonic_mean([1, 1, 0]) == 0


def test_a_sweep_compares_methods_at_one_length(tmp_path: Path) -> None:
    write_sae(random_sae(D), tmp_path / "sae")
    edits = [EditRecipe(latent=3, target=4.0), EditRecipe(latent=41, add=1.5)]
    recipe = Recipe(model="nowhere", saes=[SAERecipe(path=str(tmp_path / "sae"), edits=edits)], spare_first=1)
    prompts = ["abcab", "xyz01", "Hello 5"]
    with initialize(ParallelLayout()) as context:
        lm, opened = model(context), recipe.open()
        norm = sweep_baselines.change_norm(lm, opened, prompts, HOOK)
        vector_M = sweep_baselines.pair_vector(lm, ("ab1", "abc"), HOOK)
        vectors = sweep_baselines.contrast_vectors(lm, (["abc 1", "22 z"], ["abc d", "xyz"]), HOOK, drop_first=1)
        methods = [
            sweep_baselines.recipe_method(lm, opened),
            Method(name="prompting", instruction="Count"),
            sweep_baselines.vector_method(lm, opened, "pair", vector_M, hook=HOOK, norm=norm),
        ]
        tokens = concept_tokens(lm, r"\d")
        sweep = Sweep(
            prompts=prompts, concept=r"\d", strengths=[0, 0.5, 2], tokens=tokens, max_tokens=6, sampling=GREEDY
        )
        points = run_sweep(lm, sweep, methods)
        for longer in ({"max_tokens": 10}, {"prompts": [*prompts, "a" * 11]}):
            with pytest.raises(ConfigError, match="looks back on 16 tokens"):
                run_sweep(lm, replace(sweep, **longer), methods[:1])
        with pytest.raises(ConfigError, match="in front the longest prompt has 19"):
            run_sweep(lm, sweep, [Method(name="prompting", instruction="Count them")])
        told = [effect(lm, opened.functions(lm, strength=2.0), lm.encode(prompt)) for prompt in prompts]
        prompt = torch.tensor([lm.encode(prompts[1])])
        moved = capture(lm, prompt, [HOOK], methods[2].functions(2.0))[HOOK] - capture(lm, prompt, [HOOK])[HOOK]  # type: ignore[misc]
        texts = [torch.tensor([lm.encode(prompt + text)]) for prompt, text in zip(prompts, points[2].texts)]
        losses = [lm.losses(text[:, :-1], text[:, 1:]) for text in texts]
    assert [(point.method, point.strength) for point in points] == [
        ("none", 0), ("recipe", 0.5), ("recipe", 2), ("prompting", 1), ("pair", 0.5), ("pair", 2)
    ]  # fmt: skip
    assert tokens == list(range(53, 60))
    none, strong = points[0], points[2]
    assert none.kl == 0 < points[3].kl
    assert none.fluency == pytest.approx(1 - none.repetition)
    assert strong.kl == pytest.approx(sum(one.kl for one in told if one) / 3)
    assert strong.target == pytest.approx(sum(float(one.after_V[53:60].sum()) for one in told if one) / 3)
    mean = sum(float(loss[0, -6:].sum()) for loss in losses if loss is not None) / 18
    assert strong.perplexity == pytest.approx(float(torch.tensor(mean).exp()), rel=1e-4)
    assert strong.concept == sum(any(letter.isdigit() for letter in text) for text in strong.texts) / 3
    norms = moved[0].norm(dim=-1)
    assert norms[0] == 0
    torch.testing.assert_close(norms[1:], torch.full((4,), 2 * norm), rtol=1e-4, atol=0)
    assert set(vectors) == {"difference of means", "probe"}
    plot_sweep(tmp_path / "sweep.png", points, title="x$")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="more than 2 prompts"):
        Sweep(prompts=["a"], concept="a", strengths=[1], tokens=[1])
