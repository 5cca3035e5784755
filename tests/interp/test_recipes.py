"""Recipes: everything acts at once, in order; they say what is wrong with them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steerscale.config import dump_yaml
from steerscale.errors import ConfigError, DataError
from steerscale.interp.interventions import capture
from steerscale.interp.probes.probe import Probe, write_probe
from steerscale.interp.recipes import Recipe, load_recipe
from steerscale.interp.steering import Edit, Steering, When
from steerscale.language_model import LanguageModel
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.formats import write_sae
from tests.interp.saes import HOOK, random_sae
from tests.models.gpts import GPT2, build_random

D = GPT2.d_model
TOKENS = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(2))
SAE = random_sae(D, "topk")
WAY = torch.linspace(-1, 2, D)
OTHER_HOOK = "blocks.2.hook_mlp_out"
EVERYTHING = """
description: all kinds
model: nowhere
saes:
  - path: {at}/sae
    edits:
      - {{latent: 3, target: 4.0}}
      - {{latent: 41, add: 1.5, strength: 0.5, when: {{latent: 56, above: 0.1}}}}
directions:
  - {{hook: blocks.1.hook_resid_post, file: {at}/ways.safetensors, tensor: way, strength: 0.5}}
  - {{hook: blocks.2.hook_mlp_out, file: {at}/ways.safetensors, tensor: other, do: project_out}}
probes:
  - {{path: {at}/probes, do: set, target: b, value: 2}}
spare_first: 2
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Weights for the recipe above, and the recipe."""
    write_sae(SAE, tmp_path / "sae")
    save_file({"way": WAY, "other": WAY.flip(0)}, tmp_path / "ways.safetensors")
    probe = Probe(
        hook=HOOK,
        kind="diff_means",
        classes=("a", "b"),
        weight_CM=torch.stack([WAY.cos(), WAY.sin()]),
        bias_C=torch.tensor([0.5, -0.5]),
        means_CM=torch.stack([WAY, -WAY]),
    )
    (tmp_path / "probes").mkdir()
    write_probe(probe, tmp_path / "probes")
    (tmp_path / "all.yaml").write_text(EVERYTHING.format(at=tmp_path), encoding="utf-8")
    return tmp_path


def test_everything_acts_at_once_and_in_order(directory: Path) -> None:
    recipe = load_recipe(directory / "all.yaml")
    with initialize(ParallelLayout()) as context:
        lm = LanguageModel(build_random(GPT2, context), context, special_ids=frozenset({int(TOKENS[1, 4])}))
        functions = recipe.functions(lm)
        found = capture(lm, TOKENS, [HOOK, OTHER_HOOK], functions)
        x_BSM, earlier = (capture(lm, TOKENS, [name])[name] for name in (HOOK, OTHER_HOOK))
        without = recipe.open().functions(lm, strength=0.0)
        double = capture(lm, TOKENS, [HOOK], recipe.open().functions(lm, strength=2.0))[HOOK]
    f = SAE.encode(x_BSM)
    expected = x_BSM + (4.0 - f[..., 3:4]) * SAE.W_dec[3] / 1.7
    expected += (
        0.5
        * torch.where(f[..., 56:57] > 0.1, (f[..., 41:42] + 1.5).clamp_min(0) - f[..., 41:42], 0)
        * (SAE.W_dec[41] / 1.7)
    )
    expected += 0.5 * WAY
    way = WAY.sin() - WAY.cos()
    expected += ((2 + 1 - expected @ way) / way.square().sum()).unsqueeze(-1) * way
    acts = TOKENS.ne(TOKENS[1, 4]) & (torch.arange(9) >= 2)
    torch.testing.assert_close(found[HOOK][acts], expected[acts])
    assert torch.equal(found[HOOK][~acts], x_BSM[~acts])
    assert 0 < int((f[..., 56] > 0.1).sum()) < 27
    assert float((found[OTHER_HOOK][acts] @ WAY.flip(0)).abs().max()) < 1e-5
    assert not torch.equal(found[OTHER_HOOK], earlier)
    assert without == {}
    assert not torch.equal(double, found[HOOK])


def test_a_recipe_survives_its_file(directory: Path) -> None:
    recipe = load_recipe(directory / "all.yaml")
    (directory / "again.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    assert load_recipe(directory / "again.yaml") == recipe


def test_an_edit_waits_for_its_condition() -> None:
    x = torch.randn(4, 6, D, generator=torch.Generator().manual_seed(1))
    f = SAE.encode(x)
    edits = [Edit(latent=3, value=4.0, when=When(latent=70, above=0.2)), Edit(latent=70, value=2.0, mode="scale")]
    delta = Steering(SAE, edits).delta(x)
    holds = f[..., 70] > 0.2
    assert 0 < holds.sum() < holds.numel()
    without = torch.where(holds.unsqueeze(-1), (4.0 - f[..., 3:4]) * SAE.W_dec[3], 0) + f[..., 70:71] * SAE.W_dec[70]
    torch.testing.assert_close(delta, without / 1.7)
    with pytest.raises(ConfigError, match="latent 96 is not"):
        Steering(SAE, [Edit(latent=3, value=4.0, when=When(latent=96))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target: 4.0": "targt: 4.0"}, r"unknown key 'saes\[0\]\.edits\[0\]\.targt': did you mean 'target'"),
        ({"target: 4.0": "target: 4.0, scale: 0"}, "latent 3 needs exactly one of .* got target and scale"),
        ({", target: 4.0": ""}, "latent 3 needs exactly one of target, add and scale, got none"),
        ({"target: 4.0": "target: much"}, r"edits\[0\]\.target must be a number, got 'much'"),
        ({"above: 0.1": "over: 0.1"}, r"when\.over"),
        ({"do: project_out": "do: remove"}, "must be one of add | project_out, got 'remove'"),
        ({"spare_first: 2": "spare_first: -2"}, "spare_first must be >= 0, got -2"),
    ],
)
def test_a_recipe_says_what_is_wrong(directory: Path, changes: dict[str, str], message: str) -> None:
    text = (directory / "all.yaml").read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (directory / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as raised:
        load_recipe(directory / "bad.yaml")
    assert str(directory / "bad.yaml") in str(raised.value)


def test_published_recipes_are_recipes() -> None:
    found = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.yaml"))
    assert found
    for path in found:
        assert load_recipe(path).saes


def test_a_recipe_is_refused_without_what_it_names(directory: Path) -> None:
    with pytest.raises(ConfigError, match="changes nothing"):
        Recipe()
    recipe = load_recipe(directory / "all.yaml")
    lonely = directory / "alone.yaml"
    lonely.write_text(dump_yaml(recipe).replace("model: nowhere", "model: null"), encoding="utf-8")
    with pytest.raises(ConfigError, match="not known which language model"):
        load_recipe(lonely).open()
    for old, new, error, message in (
        ("tensor: way", "tensor: wey", DataError, "no tensor 'wey', only"),
        ("tensor: way", "tensor: null", DataError, "several tensors"),
        ("ways.safetensors", "ways.pt", DataError, "cannot be read"),
    ):
        lonely.write_text(dump_yaml(recipe).replace(old, new), encoding="utf-8")
        with pytest.raises(error, match=message):
            load_recipe(lonely).open()
    with initialize(ParallelLayout()) as context:
        lm = LanguageModel(build_random(GPT2, context), context)
        lonely.write_text(dump_yaml(recipe).replace(OTHER_HOOK, "blocks.9.hook_mlp_out"), encoding="utf-8")
        with pytest.raises(ConfigError, match="no hook point"):
            load_recipe(lonely).functions(lm)
        save_file({"way": torch.ones(5), "other": WAY}, directory / "ways.safetensors")
        with pytest.raises(ConfigError, match="width 5"):
            recipe.functions(lm)
