"""SAEs as plain tensors: published formulas, folding, ranges of latents."""

from dataclasses import replace

import pytest
import torch

from steerscale.errors import ConfigError
from steerscale.sae.weights import ARCHITECTURES, SAEWeights
from tests.sae.saes import D_IN, N, random_sae

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 33, D_IN, generator=torch.Generator().manual_seed(1))


def _z(sae: SAEWeights, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Pre-activations, one vector and latent at a time in float64."""
    assert bias is not None
    out = torch.empty(*x.shape[:-1], sae.num_latents, dtype=torch.float64)
    for position, vector in enumerate(x.reshape(-1, D_IN).double()):
        centred = vector - sae.b_dec.double()
        for latent in range(sae.num_latents):
            z = (centred * sae.W_enc[:, latent].double()).sum() + bias[latent].double()
            out.view(-1, sae.num_latents)[position, latent] = z
    return out


def test_encode_relu_is_the_published_formula(x: torch.Tensor) -> None:
    sae = random_sae("relu")
    expected = _z(sae, x[:, :3], sae.b_enc).clamp(min=0)
    torch.testing.assert_close(sae.encode(x[:, :3]).double(), expected, **TOLERANCE)
    assert 0 < (expected > 0).double().mean() < 1


@pytest.mark.parametrize("architecture", ["jumprelu", "batch_topk", "matryoshka"])
def test_encode_keeps_what_is_above_its_threshold(x: torch.Tensor, architecture: str) -> None:
    sae = random_sae(architecture)
    assert sae.threshold is not None
    z = _z(sae, x[:, :3], sae.b_enc)
    expected = z * (z > sae.threshold.double())
    torch.testing.assert_close(sae.encode(x[:, :3]).double(), expected, **TOLERANCE)
    assert ((z > 0) & (expected == 0)).any(), "the threshold must matter"


def test_encode_jumprelu_at_its_threshold_is_zero() -> None:
    ones = torch.ones(1)
    sae = SAEWeights(
        architecture="jumprelu",
        W_enc=ones[:, None],
        W_dec=ones[:, None],
        b_enc=ones * 0,
        b_dec=ones * 0,
        threshold=ones,
    )
    assert sae.encode(torch.tensor([[1.0], [1.5]])).tolist() == [[0.0], [1.5]]


def test_encode_topk_keeps_the_k_largest(x: torch.Tensor) -> None:
    sae = random_sae("topk", k=3)
    z = _z(sae, x[:, :3], sae.b_enc)
    kth = z.sort(dim=-1, descending=True).values[..., 2:3]
    expected = torch.where(z >= kth, z, 0).clamp(min=0)
    torch.testing.assert_close(sae.encode(x[:, :3]).double(), expected, **TOLERANCE)


def test_encode_topk_never_keeps_negative_values() -> None:
    sae = replace(random_sae("topk", k=N), b_enc=torch.full((N,), -0.5))
    assert (sae.encode(torch.zeros(4, D_IN) + sae.b_dec) == 0).all()


def test_encode_gated_is_the_published_formula(x: torch.Tensor) -> None:
    sae = random_sae("gated")
    assert sae.r_mag is not None
    gate = _z(sae, x[:, :3], sae.b_gate)
    with_mag = replace(sae, W_enc=sae.W_enc * sae.r_mag.exp())  # W_mag = exp(r_mag) W_gate, row by row
    magnitude = _z(with_mag, x[:, :3], sae.b_mag).clamp(min=0)
    torch.testing.assert_close(sae.encode(x[:, :3]).double(), magnitude * (gate > 0), **TOLERANCE)
    assert ((gate > 0) != (magnitude > 0)).any(), "gate and magnitude must disagree somewhere"


def test_decode_and_skip(x: torch.Tensor) -> None:
    sae = replace(random_sae("relu", d_out=5), W_skip=torch.randn(D_IN, 5), input_scale=2.0, output_scale=4.0)
    features = sae.encode(x)
    expected = (features.double() @ sae.W_dec.double() + sae.b_dec + 2 * x.double() @ sae.W_skip.double()) / 4
    torch.testing.assert_close(sae.reconstruct(x).double(), expected, **TOLERANCE)
    torch.testing.assert_close(
        sae.decode(features).double(), expected - x.double() @ sae.W_skip.double() / 2, **TOLERANCE
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fold_scale_changes_neither_features_nor_reconstruction(x: torch.Tensor, architecture: str) -> None:
    sae = replace(random_sae(architecture), input_scale=0.3)
    folded = sae.fold_scale()
    assert folded.input_scale == 1
    torch.testing.assert_close(folded.encode(x), sae.encode(x), **TOLERANCE)
    torch.testing.assert_close(folded.reconstruct(x), sae.reconstruct(x), **TOLERANCE)
    assert not torch.allclose(replace(sae, input_scale=1.0).reconstruct(x), sae.reconstruct(x), **TOLERANCE)


def test_fold_scale_of_a_transcoder(x: torch.Tensor) -> None:
    sae = replace(random_sae("jumprelu", d_out=5), W_skip=torch.randn(D_IN, 5), input_scale=2.0, output_scale=0.5)
    folded = sae.fold_scale()
    torch.testing.assert_close(folded.encode(x), sae.encode(x), **TOLERANCE)
    torch.testing.assert_close(folded.reconstruct(x), sae.reconstruct(x), **TOLERANCE)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "topk"])
def test_fold_decoder_norm_rescales_features_only(x: torch.Tensor, architecture: str) -> None:
    sae = random_sae(architecture)
    sae.W_dec[3] = 0  # a dead row has no norm to fold
    norms = sae.W_dec.norm(dim=1)
    folded = sae.fold_decoder_norm()
    torch.testing.assert_close(folded.W_dec.norm(dim=1), (norms > 0).float(), **TOLERANCE)
    torch.testing.assert_close(folded.encode(x), sae.encode(x) * torch.where(norms > 0, norms, 1), **TOLERANCE)
    torch.testing.assert_close(folded.reconstruct(x), sae.reconstruct(x), **TOLERANCE)


def test_fold_decoder_norm_of_topk_only_if_selection_stays(x: torch.Tensor) -> None:
    sae = random_sae("topk")
    with pytest.raises(ConfigError, match=r"decoder norms from .* would change"):
        sae.fold_decoder_norm()
    equal = replace(sae, W_dec=2 * sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True))
    torch.testing.assert_close(equal.fold_decoder_norm().encode(x), 2 * equal.encode(x), **TOLERANCE)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "topk"])
def test_slices_make_up_the_whole(x: torch.Tensor, architecture: str) -> None:
    sae = replace(random_sae(architecture), input_scale=1.7)
    parts = [sae.slice_latents(0, 7), sae.slice_latents(7, N)]
    torch.testing.assert_close(torch.cat([part.encode(x) for part in parts], dim=-1), sae.encode(x), **TOLERANCE)
    summed = sum(part.reconstruct(x) for part in parts) - sae.b_dec / 1.7
    torch.testing.assert_close(summed, sae.reconstruct(x), **TOLERANCE)
    assert (parts[1].first_latent, parts[1].total_latents, parts[1].is_whole) == (7, N, False)
    assert parts[1].slice_latents(1, 3).first_latent == 8


def test_a_slice_of_topk_does_not_encode(x: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="latents 2 to 9 of a topk SAE cannot encode alone"):
        random_sae("topk").slice_latents(2, 9).encode(x)


def test_slices_outside_are_refused() -> None:
    with pytest.raises(ConfigError, match="latents 4 to 99"):
        random_sae("relu").slice_latents(4, 99)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "sparse"}, "architecture 'sparse' is unknown: one of relu"),
        ({"architecture": "jumprelu"}, "a jumprelu SAE needs threshold"),
        ({"threshold": torch.ones(N)}, "a relu SAE has no threshold"),
        ({"architecture": "topk"}, "a topk SAE needs an integer k from 1 to its 24"),
        ({"architecture": "topk", "k": 2.5}, "got 2.5"),
        ({"architecture": "topk", "k": N + 1}, "got 25"),
        ({"b_enc": torch.ones(N + 1)}, r"b_enc must have shape \[24\], got \[25\]"),
        ({"W_dec": torch.ones(N + 1, D_IN)}, r"W_dec must have shape \[24, 8\], got \[25, 8\]"),
        ({"W_dec": torch.ones(3, N, D_IN)}, "several hooks at once"),
        ({"W_skip": torch.ones(D_IN, 3)}, "W_skip must have shape"),
        ({"input_scale": 0.0}, "scales must be positive"),
        ({"hook_out": "blocks.0.hook_mlp_out"}, "subtract_b_dec=True needs"),
        ({"W_dec": torch.ones(N, 5), "b_dec": torch.ones(5)}, "subtract_b_dec=True needs"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(random_sae("relu"), **change)
