"""Initial weights of SAEs."""

import pytest
import torch

from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.architectures import ARCHITECTURES
from steerscale.sae.base import SparseAutoencoder
from steerscale.sae.config import SAEConfig, specs_of
from steerscale.sae.initial import draw_weights, initialize_from_data

HOOK = "blocks.0.hook_resid_post"


@pytest.mark.parametrize("tied", [True, False])
def test_encoder_scale_multiplies_the_encoder_alone(tied: bool) -> None:
    whole, half = _drawn(tied_init=tied), _drawn(tied_init=tied, encoder_scale=0.5)
    assert torch.equal(half.W_dec, whole.W_dec)
    torch.testing.assert_close(half.W_enc, whole.W_enc / 2)
    assert torch.equal(whole.W_enc, whole.W_dec) is tied


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_vector_that_is_not_finite_spoils_nothing_for_good(bad: float) -> None:
    """Scales and b_dec stay what the first batch makes them: they have to come from the others in it."""
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    spoilt = torch.cat([x[:5], torch.full((1, 8), bad), x[5:]])
    expected, got = _drawn(), _drawn()
    initialize_from_data(expected, x, x)
    initialize_from_data(got, spoilt, spoilt)
    for name in ("input_scale", "output_scale", "mean"):
        assert torch.equal(got.scalar_state[name], expected.scalar_state[name])
        assert got.scalar_state[name].isfinite().all()
    assert torch.equal(got.b_dec, expected.b_dec)


def _drawn(**config: object) -> SparseAutoencoder:
    (spec,) = specs_of(SAEConfig(hooks=[HOOK], expansion=4, k=2, **config), {HOOK: 8})  # type: ignore[arg-type]
    with initialize(ParallelLayout()) as context:
        sae = ARCHITECTURES["topk"](spec, context)
        draw_weights(sae, seed=0)
    return sae
