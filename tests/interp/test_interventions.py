"""Interventions act where they say, alike on every layout; lens and attribution add up to the model's own logits."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steerscale.errors import ConfigError
from steerscale.interp import interventions
from steerscale.interp.interventions import ablate, add_direction, patch, project_out
from steerscale.language_model import LanguageModel
from steerscale.models.config import ModelConfig
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.ranks import RankPool
from tests.models.gpts import GPT2, LLAMA, build_random

ATOL = 2e-5  # float32 logits of order 1 to 10
ONE = ParallelLayout()
LAYOUTS = {
    "TP2": ParallelLayout(tensor=2),
    "PP2": ParallelLayout(pipeline=2),
    "TP2+SPxPP2": ParallelLayout(tensor=2, sequence=True, pipeline=2),
}
TOKENS = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(2))  # no whole slices for two ranks
FIRST, LAST = "blocks.0.hook_resid_post", "blocks.3.hook_resid_post"
DIRECTION = torch.linspace(-2, 1, GPT2.d_model)
MASK = torch.zeros(2, 7, dtype=torch.bool).index_fill_(1, torch.tensor([1, 5]), True)
FUNCTIONS = {
    "zero": {"blocks.2.hook_attn_out": ablate()},
    "mean": {"blocks.1.hook_mlp_out": ablate(DIRECTION)},
    "patch": {FIRST: patch(DIRECTION, [-1])},
    "add": {"blocks.1.hook_resid_post": add_direction(DIRECTION, 1.5, slice(2, 5))},
    "project": {"blocks.2.hook_resid_pre": project_out(DIRECTION, MASK)},
}


def observe(layout: ParallelLayout, model: ModelConfig) -> dict[str, np.ndarray]:
    """All that is compared, as far as this rank has it."""
    with initialize(layout) as context:
        lm = LanguageModel(build_random(model, context), context)
        found: dict[str, Any] = {name: lm.logits(TOKENS, functions) for name, functions in FUNCTIONS.items()}
        found["plain"] = lm.logits(TOKENS)
        found["losses"] = lm.losses(TOKENS, TOKENS.roll(-1, 1), FUNCTIONS["add"])
        found |= interventions.capture(lm, TOKENS, [FIRST, LAST])
        lenses = interventions.logit_lens(lm, TOKENS, [FIRST, LAST])
        found |= {f"lens {name}": lens for name, lens in lenses.items()}
        found["effect"] = interventions.logit_effect(lm, DIRECTION[None])
        parts_BSM = DIRECTION.expand(*TOKENS.shape, -1)
        found["attribution"] = interventions.direct_attribution(lm, TOKENS, parts_BSM, TOKENS)
        return {name: value.numpy() for name, value in found.items() if value is not None}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_interventions(layout: str, pool: RankPool) -> None:
    model = LLAMA if layout == "TP2" else GPT2
    expected = observe(ONE, model)
    ranks = pool.run(observe, LAYOUTS[layout], model, ranks=LAYOUTS[layout].world_size)
    assert set().union(*ranks) == set(expected)
    for found in ranks:
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=ATOL, err_msg=name)
    for name in FUNCTIONS:
        assert np.abs(expected[name] - expected["plain"]).max() > 0.01, name


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_lens_and_attribution_add_up_to_the_logits(model: ModelConfig) -> None:
    with initialize(ONE) as context:
        lm = LanguageModel(build_random(model, context), context)
        logits_BSV = lm.logits(TOKENS)
        assert logits_BSV is not None
        lens = interventions.logit_lens(lm, TOKENS, [LAST])[LAST]
        torch.testing.assert_close(lens, logits_BSV, rtol=0, atol=ATOL)
        whole_BSM = interventions.capture(lm, TOKENS, [LAST])[LAST]
        parts = [whole_BSM * 0.3, whole_BSM * 0.7]
        first, second = (interventions.direct_attribution(lm, TOKENS, part, TOKENS) for part in parts)
        bias_V = torch.zeros(model.tokens)
        if lm.final_norm.bias is not None:
            bias_V = F.linear(lm.final_norm.bias.detach(), lm.unembedding.detach())[: model.tokens]
        expected_BS = (logits_BSV - bias_V).gather(-1, TOKENS.unsqueeze(-1)).squeeze(-1)
        assert first is not None
        assert second is not None
        torch.testing.assert_close(first + second, expected_BS, rtol=0, atol=ATOL)


def test_functions_act_at_their_positions_only() -> None:
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    for positions in ([1, 5], [1, -2], slice(1, 6, 4), torch.tensor([1, 5]), MASK):
        changed = add_direction(DIRECTION, 2.0, positions)(x.clone())
        assert changed is not None
        assert torch.equal(changed[~MASK], x[~MASK])
        torch.testing.assert_close(changed[MASK], x[MASK] + 2 * DIRECTION)
    without = project_out(DIRECTION)(x.clone())
    assert without is not None
    assert float((without @ DIRECTION).abs().max()) < 1e-5
    torch.testing.assert_close(project_out(DIRECTION * 5)(x.clone()), without)
    assert add_direction(DIRECTION, 0.0)(x) is None
    with pytest.raises(ConfigError, match="direction of zeros"):
        project_out(torch.zeros(24))
    for outside in ([7], [1, -8], torch.tensor([9])):
        with pytest.raises(ConfigError, match="outside of the text's 7 tokens"):
            ablate(positions=outside)(x.clone())


def test_patching_another_text_in_gives_its_logits() -> None:
    other = TOKENS.flip(0)
    with initialize(ONE) as context:
        lm = LanguageModel(build_random(GPT2, context), context)
        activation = interventions.capture(lm, other, [FIRST])[FIRST]
        patched, expected = lm.logits(TOKENS, {FIRST: patch(activation)}), lm.logits(other)
        torch.testing.assert_close(patched, expected, rtol=0, atol=0)
        seen = interventions.capture(lm, TOKENS, [FIRST], {FIRST: patch(activation)})[FIRST]
        assert torch.equal(seen, activation)
