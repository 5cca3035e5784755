"""Public formats of SAEs: published layouts against the published formulas, round trips, ranges of latents, refusals."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from steerscale.cli import sae_convert
from steerscale.errors import CheckpointError, ConfigError, DataError
from steerscale.sae.formats import FORMATS, detect_format, read_sae, write_sae
from steerscale.sae.weights import ARCHITECTURES, SAEWeights
from tests.sae.saes import D_IN, N, random_sae

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

HOLDS = {
    "saelens": ARCHITECTURES,
    "sparsify": ("topk",),
    "gemma_scope": ("relu", "jumprelu", "batch_topk", "matryoshka"),
    "gemma_scope_2": ("relu", "jumprelu", "batch_topk", "matryoshka"),
    "llama_scope": ("relu", "topk", "jumprelu", "batch_topk", "matryoshka"),
}
"""What each format can express."""


def _one_threshold(sae: SAEWeights) -> SAEWeights:
    return sae if sae.threshold is None else replace(sae, threshold=torch.full_like(sae.threshold, 0.4))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(256, D_IN, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("format", "architecture"), [(f, a) for f, known in HOLDS.items() for a in known])
def test_round_trip_keeps_features_and_reconstruction(
    tmp_path: Path, x: torch.Tensor, format: str, architecture: str
) -> None:
    sae = replace(_one_threshold(random_sae(architecture)), input_scale=1.3)
    write_sae(sae, tmp_path / "sae", format)
    assert detect_format(tmp_path / "sae") == format
    back = read_sae(tmp_path / "sae")
    assert back.input_scale == 1
    torch.testing.assert_close(back.encode(x), sae.encode(x), **TOLERANCE)
    torch.testing.assert_close(back.reconstruct(x), sae.reconstruct(x), **TOLERANCE)
    if format in ("saelens", "gemma_scope_2"):
        assert (back.hook, back.hook_out, back.model) == (sae.hook, None, sae.model)
    if format == "saelens":
        assert (back.architecture, back.k) == (architecture, sae.k)


@pytest.mark.parametrize(
    ("format", "architecture"), [(f, a) for f in FORMATS for a in ARCHITECTURES if a not in HOLDS[f]]
)
def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, format: str, architecture: str
) -> None:
    with pytest.raises(ConfigError, match=f"the {format} format cannot hold this {architecture} SAE: it is for"):
        write_sae(random_sae(architecture), tmp_path / "sae", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["saelens", "gemma_scope_2"])
def test_round_trip_of_a_transcoder_with_skip_path(tmp_path: Path, x: torch.Tensor, format: str) -> None:
    sae = replace(random_sae("jumprelu", d_out=5), W_skip=torch.randn(D_IN, 5), input_scale=0.7, output_scale=1.9)
    write_sae(sae, tmp_path / "sae", format)
    back = read_sae(tmp_path / "sae")
    torch.testing.assert_close(back.reconstruct(x), sae.reconstruct(x), **TOLERANCE)
    assert (back.hook, back.hook_out) == (sae.hook, sae.hook_out)


def test_llama_scope_refuses_thresholds_that_differ(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has one threshold for all latents"):
        write_sae(random_sae("jumprelu"), tmp_path / "sae", "llama_scope")


def test_convert_offers_every_format() -> None:
    assert tuple(FORMATS) == sae_convert.FORMATS


# Gemma Scope


def _gemma_params(seed: int = 3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "w_enc": generator.normal(size=(D_IN, N)).astype(np.float32),
        "w_dec": generator.normal(size=(N, D_IN)).astype(np.float32),
        "b_enc": generator.normal(size=N).astype(np.float32),
        "b_dec": generator.normal(size=D_IN).astype(np.float32),
        "threshold": np.abs(generator.normal(size=N)).astype(np.float32) + 0.1,
    }


def _jumprelu_reference(params: dict[str, np.ndarray], x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features and reconstruction of Gemma Scope's paper (2408.05147, eq. 1 to 3), in float64."""
    p = {name: array.astype(np.float64) for name, array in params.items()}
    z = x.double().numpy() @ p["w_enc"] + p["b_enc"]
    features = np.where(z > p["threshold"], z, 0.0)
    return features, features @ p["w_dec"] + p["b_dec"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_gemma_scope_npz_has_the_l0_and_reconstruction_of_the_published_formula(
    tmp_path: Path, x: torch.Tensor, save: Callable[..., None]
) -> None:
    params = _gemma_params()
    params["w_dec"] = np.asfortranarray(params["w_dec"])  # both orders occur
    save(tmp_path / "params.npz", **params)
    sae = read_sae(tmp_path)
    features, reconstruction = _jumprelu_reference(params, x)
    ours = sae.encode(x)
    assert torch.equal(ours > 0, torch.from_numpy(features > 0))
    assert (ours > 0).sum(-1).double().mean().item() == (features > 0).sum(-1).mean()
    assert 1 < (features > 0).sum(-1).mean() < N / 2
    torch.testing.assert_close(ours.double(), torch.from_numpy(features), **TOLERANCE)
    torch.testing.assert_close(sae.decode(ours).double(), torch.from_numpy(reconstruction), **TOLERANCE)


def test_gemma_scope_hook_and_model_from_a_published_path(tmp_path: Path) -> None:
    published = tmp_path / "models--google--gemma-scope-9b-it-res/snapshots/abc/layer_20/width_16k/average_l0_91"
    published.mkdir(parents=True)
    np.savez(published / "params.npz", **_gemma_params())
    sae = read_sae(published)
    assert (sae.model, sae.hook) == ("gemma-2-9b-it", "blocks.20.hook_resid_post")
    np.savez(tmp_path / "params.npz", **_gemma_params())
    assert read_sae(tmp_path / "params.npz").hook is None


def test_gemma_scope_is_written_as_numpy_reads_it(tmp_path: Path) -> None:
    sae = random_sae("jumprelu")
    write_sae(sae, tmp_path / "sae", "gemma_scope")
    with np.load(tmp_path / "sae/params.npz", allow_pickle=False) as params:
        assert set(params) == {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
        np.testing.assert_array_equal(params["w_dec"], sae.W_dec.numpy())


def test_gemma_scope_never_unpickles(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    np.savez(tmp_path / "params.npz", **{**_gemma_params(), "threshold": np.array([Bomb()] * N, dtype=object)})
    with pytest.raises(CheckpointError, match="threshold is of type object, expected a float type"):
        read_sae(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_gemma_scope_2_layout(tmp_path: Path, x: torch.Tensor) -> None:
    params = _gemma_params()
    skip = torch.randn(D_IN, D_IN)
    tensors = {name: torch.from_numpy(array) for name, array in params.items()}
    save_file({**tensors, "affine_skip_connection": skip}, tmp_path / "params.safetensors")
    config = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-4b-it",
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
        "width": N,
        "l0": 12,
        "affine_connection": True,
        "type": "transcoder",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    sae = read_sae(tmp_path)
    _, expected = _jumprelu_reference(params, x)
    torch.testing.assert_close(
        sae.reconstruct(x).double(), torch.from_numpy(expected) + x.double() @ skip.double(), **TOLERANCE
    )
    assert (sae.hook, sae.hook_out) == ("blocks.5.hook_mlp_in", "blocks.5.hook_mlp_out")
    assert (sae.model, sae.metadata) == ("google/gemma-3-4b-it", {"l0": 12})
    write_sae(sae, tmp_path / "again", "gemma_scope_2")
    assert json.loads((tmp_path / "again/config.json").read_text()) == config
    assert torch.equal(load_file(tmp_path / "again/params.safetensors")["affine_skip_connection"], skip)


def test_gemma_scope_2_crosscoders_are_refused(tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in _gemma_params().items()}
    tensors["w_dec"] = tensors["w_dec"][:, None].repeat(1, 3, 1)
    save_file(tensors, tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "jump_relu"}')
    with pytest.raises(ConfigError, match="SAEs that read or write several hooks at once are not understood"):
        read_sae(tmp_path)


# Llama Scope


def _llama_scope(directory: Path, **changes: object) -> dict[str, torch.Tensor]:
    tensors = {
        "encoder.weight": torch.randn(N, D_IN),
        "encoder.bias": torch.randn(N),
        "decoder.weight": torch.randn(D_IN, N),
        "decoder.bias": torch.randn(D_IN),
    }
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    config = {
        "hook_point_in": "blocks.19.hook_resid_post",
        "hook_point_out": "blocks.19.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.52734375,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 17.125, "out": 17.125},
        "d_model": D_IN,
        "d_sae": N,
        "top_k": 3,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        **changes,
    }
    (directory / "checkpoints").mkdir(parents=True)
    save_file(tensors, directory / "checkpoints/final.safetensors")
    (directory / "hyperparams.json").write_text(json.dumps(config))
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize("norms", [(17.125, 17.125), (64.0, 3.390625)], ids=["sae", "transcoder"])
@pytest.mark.parametrize("include_norm", [True, False])
def test_llama_scope_folds_norms_as_its_authors_do(
    tmp_path: Path, x: torch.Tensor, norms: tuple[float, float], include_norm: bool
) -> None:
    """Reference: x scaled to the width, z by the decoder, the threshold in the units of the input; unfolded throughout."""
    hook_out = "blocks.19.hook_resid_post" if norms[0] == norms[1] else "blocks.19.hook_mlp_out"
    t = _llama_scope(
        tmp_path,
        dataset_average_activation_norm={"in": norms[0], "out": norms[1]},
        hook_point_out=hook_out,
        sparsity_include_decoder_norm=include_norm,
    )
    x = 10 * x
    scale_in, scale_out = D_IN**0.5 / norms[0], D_IN**0.5 / norms[1]
    z = (x.double() * scale_in) @ t["encoder.weight"].T + t["encoder.bias"]
    decoder_norms = t["decoder.weight"].norm(dim=0) if include_norm else torch.ones(N)
    in_input_units = z * decoder_norms / scale_out if include_norm else z / scale_in
    active = in_input_units > 0.52734375
    assert 0.05 < active.double().mean() < 0.95
    expected = ((z * active) @ t["decoder.weight"].T + t["decoder.bias"]) / scale_out
    sae = read_sae(tmp_path)
    assert torch.equal(sae.encode(x) > 0, active)
    torch.testing.assert_close(sae.reconstruct(x).double(), expected, rtol=1e-5, atol=1e-4)
    assert (sae.hook, sae.hook_out) == ("blocks.19.hook_resid_post", None if norms[0] == norms[1] else hook_out)


def test_llama_scope_topk_selects_by_value_times_decoder_norm(tmp_path: Path, x: torch.Tensor) -> None:
    t = _llama_scope(tmp_path, act_fn="topk", dataset_average_activation_norm={"in": D_IN**0.5, "out": D_IN**0.5})
    z = x.double() @ t["encoder.weight"].T + t["encoder.bias"]
    weighted = (z * t["decoder.weight"].norm(dim=0)).clamp(min=0)
    kth = weighted.sort(dim=-1, descending=True).values[:, 2:3]
    torch.testing.assert_close(read_sae(tmp_path).encode(x).double(), weighted * (weighted >= kth), **TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_activation": "token-wise"}, "norm_activation='token-wise' is not supported; only dataset-wise"),
        ({"dataset_average_activation_norm": None}, "dataset_average_activation_norm=None is not supported"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "'out': 1} is not supported; .* both positive"),
        ({"d_model": 0}, "d_model=0 is not supported"),
        ({"use_glu_encoder": True}, "use_glu_encoder=True is not supported"),
        ({"act_fn": "tanh"}, "act_fn='tanh' is not supported; these are: jumprelu, topk, relu"),
        ({"jump_relu_threshold": None}, "the field 'jump_relu_threshold' is missing"),
        ({"jump_relu_threshold": "high"}, "the field 'jump_relu_threshold' must be of type float, got 'high'"),
    ],
)
def test_llama_scope_configurations_that_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    _llama_scope(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_sae(tmp_path)


# Any format


@pytest.mark.parametrize(("format", "architecture"), [(f, HOLDS[f][-1]) for f in FORMATS])
def test_ranges_of_latents_are_those_of_the_whole(tmp_path: Path, format: str, architecture: str) -> None:
    write_sae(_one_threshold(random_sae(architecture)), tmp_path / "sae", format)
    whole = read_sae(tmp_path / "sae")
    for start, stop in ((0, 5), (5, N), (7, 8)):
        part = read_sae(tmp_path / "sae", latents=slice(start, stop))
        expected = whole.slice_latents(start, stop)
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            ours, theirs = getattr(part, name), getattr(expected, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs), name
        assert (part.first_latent, part.total_latents, part.k) == (start, N, whole.k)
    for bad in (slice(0, N + 1), slice(3, 3), slice(0, N, 2)):
        with pytest.raises(ConfigError, match="is no range of them"):
            read_sae(tmp_path / "sae", latents=bad)


def test_a_range_of_a_gated_sae(tmp_path: Path, x: torch.Tensor) -> None:
    sae = random_sae("gated")
    write_sae(sae, tmp_path / "sae", "saelens")
    part = read_sae(tmp_path / "sae", latents=slice(4, 9))
    torch.testing.assert_close(part.encode(x), sae.encode(x)[:, 4:9], **TOLERANCE)


def test_npz_ranges_hold_no_more_than_a_block_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny blocks: every row is cut before the next is read, and the result is the same."""
    np.savez_compressed(tmp_path / "params.npz", **_gemma_params())
    whole = read_sae(tmp_path, latents=slice(3, 11))
    read: list[int] = []
    original = zipfile.ZipExtFile.read

    def counted(self: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        read.append(n or 0)
        return original(self, n)

    monkeypatch.setattr("steerscale.sae.formats.gemma_scope._BLOCK_BYTES", 2 * N * 4)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    part = read_sae(tmp_path, latents=slice(3, 11))
    assert torch.equal(part.W_enc, whole.W_enc)
    assert torch.equal(part.W_dec, whole.W_dec)
    assert max(read) <= 2 * N * 4 + 64


def test_only_a_whole_sae_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="these are 4 latents of 24: only a whole SAE is written"):
        write_sae(random_sae("relu").slice_latents(0, 4), tmp_path / "sae")


def test_written_files_are_readable_by_others_and_nothing_is_overwritten(tmp_path: Path) -> None:
    write_sae(random_sae("relu"), tmp_path / "sae")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "sae").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}
    with pytest.raises(DataError, match="exists and was not written by steerscale"):
        write_sae(random_sae("relu"), tmp_path / "sae")


def test_directories_that_are_no_sae(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no SAE in a known format"):
        read_sae(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_sae(tmp_path / "absent")
    with pytest.raises(ConfigError, match="SAE format 'pt' is unknown: one of saelens, sparsify"):
        read_sae(tmp_path, "pt")
    write_sae(random_sae("topk"), tmp_path / "both")
    save_file({"w": torch.ones(1)}, tmp_path / "both/sae.safetensors")
    with pytest.raises(CheckpointError, match="could be saelens or sparsify: say which"):
        read_sae(tmp_path / "both")
    assert read_sae(tmp_path / "both", "saelens").architecture == "topk"


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "gemma_scope"])
def test_damaged_and_missing_weights(tmp_path: Path, format: str) -> None:
    write_sae(_one_threshold(random_sae(HOLDS[format][-1])), tmp_path / "sae", format)
    path = next((tmp_path / "sae").rglob("*.safetensors"))
    tensors = load_file(path)
    del tensors["b_dec" if "b_dec" in tensors else "decoder.bias"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"has no tensor '(b_dec|decoder.bias)', only "):
        read_sae(tmp_path / "sae")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_sae(tmp_path / "sae")


def test_a_cut_off_npz(tmp_path: Path) -> None:
    write_sae(random_sae("jumprelu"), tmp_path / "sae", "gemma_scope")
    path = tmp_path / "sae/params.npz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_sae(tmp_path / "sae")


@pytest.mark.parametrize(
    ("architecture", "changes", "wrong"),
    [
        ("topk", {"k": [4]}, r"k=\[4\] is not supported"),
        ("topk", {"k": float("nan")}, "needs an integer k"),
        ("topk", {"activation_fn_kwargs": True}, "'activation_fn_kwargs' must be of type dict"),
        ("gated", {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm=True is not supported"),
        ("relu", {"metadata": {"hook_name": 3}}, "hook_name=3 is not supported"),
    ],
)
def test_saelens_configurations_that_are_refused(architecture: str, changes: dict, wrong: str, tmp_path: Path) -> None:
    write_sae(random_sae(architecture), tmp_path / "sae")
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    (tmp_path / "sae/cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises((CheckpointError, ConfigError), match=wrong):
        read_sae(tmp_path / "sae")


def test_an_npz_that_is_understood_in_part_is_refused(tmp_path: Path) -> None:
    write_sae(random_sae("jumprelu"), tmp_path / "sae", "gemma_scope")
    path = tmp_path / "sae/params.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "b_dec": np.zeros(())})
    with pytest.raises(ConfigError, match=r"b_dec must have shape \[8\]"):
        read_sae(tmp_path / "sae")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("w_enc.npy", b"")
    raw = path.read_bytes()
    method = raw.index(b"PK\x01\x02") + 10
    path.write_bytes(raw[:method] + b"\x63\x00" + raw[method + 2 :])  # a way of compression that zipfile does not know
    with pytest.raises(CheckpointError, match="cannot be read: That compression method"):
        read_sae(tmp_path / "sae")
