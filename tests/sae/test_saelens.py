"""Against the installed sae-lens and eai-sparsify: what we write they load, what they write we load, same numbers."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from steerscale.errors import CheckpointError
from steerscale.sae.formats import read_sae, write_sae
from steerscale.sae.weights import SAEWeights
from tests.sae.saes import D_IN, N, random_sae

pytestmark = pytest.mark.skipif(
    find_spec("sae_lens") is None or find_spec("sparsify") is None,
    reason="needs sae-lens and eai-sparsify: pip install --no-deps -r requirements-peers.txt",
)

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

HOOK, HOOK_OUT = "blocks.3.hook_resid_post", "blocks.3.hook_mlp_out"


@contextmanager
def _their_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def sae_lens() -> Any:
    with _their_warnings():
        import sae_lens
    return sae_lens


@pytest.fixture(scope="module")
def sparsify() -> Any:
    with _their_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # where Triton is installed it would be used, on a CPU too
        import sparsify
    return sparsify


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(200, D_IN, generator=torch.Generator().manual_seed(11))


def _same(theirs: Any, ours: SAEWeights, x: torch.Tensor) -> None:
    """Same features and reconstruction, and neither trivial."""
    with torch.no_grad():
        features, reconstruction = theirs.encode(x), theirs(x)
    active = (features > 0).double().mean().item()
    assert 0.02 < active < 0.98
    torch.testing.assert_close(ours.encode(x), features, **TOLERANCE)
    torch.testing.assert_close(ours.reconstruct(x), reconstruction, **TOLERANCE)


@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize(
    ("architecture", "their_class"),
    [
        ("relu", "StandardSAE"),
        ("gated", "GatedSAE"),
        ("topk", "TopKSAE"),
        ("jumprelu", "JumpReLUSAE"),
        ("batch_topk", "JumpReLUSAE"),
        ("matryoshka", "JumpReLUSAE"),
    ],
)
def test_saelens_loads_what_we_write(
    sae_lens: Any, tmp_path: Path, x: torch.Tensor, architecture: str, their_class: str, subtract_b_dec: bool
) -> None:
    sae = replace(
        random_sae(architecture), subtract_b_dec=subtract_b_dec, input_scale=0.8, metadata={"context_size": 128}
    )
    write_sae(sae, tmp_path / "sae")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert type(theirs).__name__ == their_class
    _same(theirs, sae, x)
    metadata = theirs.cfg.metadata
    assert (metadata.hook_name, metadata.model_name, metadata.context_size) == (HOOK, "gpt2-small", 128)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_saelens_loads_our_transcoders(
    sae_lens: Any, tmp_path: Path, x: torch.Tensor, architecture: str, skip: bool
) -> None:
    sae = replace(random_sae(architecture, d_out=5), W_skip=torch.randn(D_IN, 5) if skip else None, input_scale=0.8)
    write_sae(sae, tmp_path / "sae")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert theirs.cfg.architecture().endswith("skip_transcoder" if skip else "transcoder")
    assert theirs.cfg.metadata.hook_name_out == HOOK_OUT
    _same(theirs, sae, x)


def _randomize(theirs: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            std = 0.3 if name.startswith(("b_", "r_")) else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if name == "threshold":
                parameter.abs_()
    return theirs


def _their_inference_sae(sae_lens: Any, architecture: str, **changes: Any) -> Any:
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=HOOK, model_name="gpt2-small", prepend_bos=True)
    values = {"architecture": architecture, "d_in": D_IN, "d_sae": N, "metadata": metadata.to_dict(), **changes}
    return _randomize(sae_lens.SAE.from_dict(values))


@pytest.mark.parametrize(
    ("architecture", "ours", "changes"),
    [
        ("standard", "relu", {}),
        ("standard", "relu", {"apply_b_dec_to_input": False}),
        ("gated", "gated", {}),
        ("topk", "topk", {"k": 5}),
        ("topk", "topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", "jumprelu", {}),
        ("jumprelu", "jumprelu", {"apply_b_dec_to_input": False}),
        ("transcoder", "relu", {"d_out": 5, "apply_b_dec_to_input": False}),
        ("skip_transcoder", "relu", {"d_out": 5, "apply_b_dec_to_input": False}),
        ("jumprelu_transcoder", "jumprelu", {"d_out": 5, "apply_b_dec_to_input": False}),
        ("jumprelu_skip_transcoder", "jumprelu", {"d_out": 5, "apply_b_dec_to_input": False}),
    ],
)
def test_we_load_what_saelens_writes(
    sae_lens: Any, tmp_path: Path, x: torch.Tensor, architecture: str, ours: str, changes: dict[str, Any]
) -> None:
    theirs = _their_inference_sae(sae_lens, architecture, **changes)
    theirs.save_model(tmp_path)
    sae = read_sae(tmp_path)
    assert (sae.architecture, sae.hook, sae.model) == (ours, HOOK, "gpt2-small")
    assert sae.metadata["prepend_bos"] is True
    _same(theirs, sae, x)


TRAINING: list[tuple[str, str, dict[str, Any]]] = [
    ("Standard", "relu", {}),
    ("Gated", "gated", {}),
    ("TopK", "topk", {"k": 4}),
    ("JumpReLU", "jumprelu", {}),
    ("BatchTopK", "batch_topk", {"k": 4.0}),
    ("MatryoshkaBatchTopK", "matryoshka", {"k": 4.0, "matryoshka_widths": [6, 12, N]}),
]


@pytest.mark.parametrize("checkpoint", [False, True], ids=["inference", "checkpoint"])
@pytest.mark.parametrize(("name", "ours", "changes"), TRAINING, ids=[name for name, _, _ in TRAINING])
def test_we_load_what_saelens_trains(
    sae_lens: Any, tmp_path: Path, x: torch.Tensor, name: str, ours: str, changes: dict[str, Any], checkpoint: bool
) -> None:
    """Both of its ways to save a training SAE: for inference, and as in its checkpoints. Reference: its load of the first."""
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D_IN, d_sae=N, **changes)
    training = _randomize(getattr(sae_lens, f"{name}TrainingSAE")(config))
    if "BatchTopK" in name:
        training.topk_threshold.fill_(0.3)
    training.save_model(tmp_path / "checkpoint")
    training.save_inference_model(tmp_path / "inference")  # changes the SAE in memory
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    sae = read_sae(tmp_path / ("checkpoint" if checkpoint else "inference"))
    assert (sae.architecture, sae.k) == (ours, changes.get("k"))
    _same(theirs, sae, x)


def test_an_activation_scale_beside_a_checkpoint_is_applied(sae_lens: Any, tmp_path: Path, x: torch.Tensor) -> None:
    from sae_lens.training.activation_scaler import ActivationScaler

    theirs = _their_inference_sae(sae_lens, "standard", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"no activation_scaler.json says by how much"):
        read_sae(tmp_path)
    ActivationScaler(scaling_factor=0.4).save(str(tmp_path / "activation_scaler.json"))
    sae = read_sae(tmp_path)
    theirs.fold_activation_norm_scaling_factor(0.4)
    _same(theirs, sae, x)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale", "covariance_whitening"])
def test_normalizations_that_depend_on_each_vector_are_refused(sae_lens: Any, tmp_path: Path, kind: str) -> None:
    _their_inference_sae(sae_lens, "standard", normalize_activations=kind).save_model(tmp_path)
    with pytest.raises(CheckpointError, match=f"normalize_activations='{kind}' is not supported"):
        read_sae(tmp_path)


@pytest.mark.parametrize("architecture", ["abstopk", "matching_pursuit"])
def test_their_other_architectures_are_refused_by_name(sae_lens: Any, tmp_path: Path, architecture: str) -> None:
    _their_inference_sae(sae_lens, architecture).save_model(tmp_path)
    with pytest.raises(CheckpointError, match=f"architecture='{architecture}' is not supported; these are: standard"):
        read_sae(tmp_path)


def test_their_form_before_version_6(sae_lens: Any, tmp_path: Path, x: torch.Tensor) -> None:
    """Flat, topk as an activation function; their own converter is the reference."""
    theirs = _their_inference_sae(sae_lens, "topk", k=6)
    theirs.save_model(tmp_path)
    flat = {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 6},
        "d_in": D_IN,
        "d_sae": N,
        "dtype": "float32",
        "hook_name": HOOK,
        "model_name": "gpt2-small",
        "normalize_activations": False,
        "prepend_bos": False,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(flat))
    sae = read_sae(tmp_path)
    assert (sae.architecture, sae.k, sae.hook, sae.model) == ("topk", 6, HOOK, "gpt2-small")
    _same(sae_lens.SAE.load_from_disk(tmp_path), sae, x)


# The other formats, read by SAELens' own loaders from a local copy of what it would download


def _their_loader(monkeypatch: pytest.MonkeyPatch, directory: Path, loader: str, **arguments: str) -> Any:
    from sae_lens.loading import pretrained_sae_loaders

    def local(repo_id: str, filename: str, subfolder: str = "", **_: object) -> str:  # instead of a download
        return str(directory / Path(subfolder, filename).relative_to(arguments["folder_name"]))

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", local)
    config, tensors, _ = getattr(pretrained_sae_loaders, loader)(**arguments)
    return pretrained_sae_loaders.handle_config_defaulting(config), tensors


def test_saelens_reads_our_gemma_scope(
    sae_lens: Any, tmp_path: Path, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = random_sae("jumprelu")
    write_sae(sae, tmp_path / "sae", "gemma_scope")
    config, tensors = _their_loader(
        monkeypatch,
        tmp_path / "sae",
        "gemma_2_sae_huggingface_loader",
        repo_id="google/gemma-scope-2b-pt-res",
        folder_name="layer_20/width_16k/average_l0_71",
    )
    theirs = sae_lens.SAE.from_dict({**config, "d_in": D_IN, "d_sae": N})  # they take sizes from names
    theirs.load_state_dict(tensors)
    _same(theirs, sae, x)


def test_saelens_reads_our_llama_scope_once_it_is_scaled_by_one(
    sae_lens: Any, tmp_path: Path, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = random_sae("jumprelu")
    sae = replace(sae, threshold=torch.full((N,), 0.25))
    write_sae(sae, tmp_path / "sae", "llama_scope")
    config, tensors = _their_loader(
        monkeypatch,
        tmp_path / "sae",
        "llama_scope_sae_huggingface_loader",
        repo_id="fnlp/Llama3_1-8B-Base-LXR-8x",
        folder_name="Llama3_1-8B-Base-L19R-8x",
        cfg_overrides={"dtype": "float32", "normalize_activations": "none"},  # type: ignore[arg-type]
    )
    theirs = sae_lens.SAE.from_dict(config)
    theirs.load_state_dict(tensors)
    _same(theirs, sae, x)


# eai-sparsify


def _their_coder(sparsify: Any, **changes: Any) -> Any:
    return _randomize(sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(num_latents=N, k=4, **changes)))


def _same_as_coder(theirs: Any, ours: SAEWeights, x: torch.Tensor) -> None:
    with torch.no_grad():
        top_values, top_indices, _ = theirs.encode(x)
        reconstruction = theirs.decode(top_values, top_indices)
        if theirs.W_skip is not None:
            reconstruction = reconstruction + x @ theirs.W_skip.mT  # as in its forward
    features = torch.zeros(len(x), N).scatter(-1, top_indices, top_values)
    torch.testing.assert_close(ours.encode(x), features, **TOLERANCE)
    torch.testing.assert_close(ours.reconstruct(x), reconstruction, **TOLERANCE)


CODERS = [{}, {"transcode": True}, {"transcode": True, "skip_connection": True}]


@pytest.mark.parametrize("changes", CODERS, ids=["sae", "transcoder", "skip"])
def test_we_load_what_sparsify_writes(sparsify: Any, tmp_path: Path, x: torch.Tensor, changes: dict[str, Any]) -> None:
    theirs = _their_coder(sparsify, **changes)
    theirs.save_to_disk(tmp_path / "layers.5.mlp")
    (tmp_path / "config.json").write_text('{"model": "gpt2"}')
    sae = read_sae(tmp_path / "layers.5.mlp")
    assert (sae.architecture, sae.k, sae.hook, sae.model) == ("topk", 4, "blocks.5.hook_mlp_out", "gpt2")
    _same_as_coder(theirs, sae, x)


@pytest.mark.parametrize("changes", CODERS, ids=["sae", "transcoder", "skip"])
def test_sparsify_loads_what_we_write(sparsify: Any, tmp_path: Path, x: torch.Tensor, changes: dict[str, Any]) -> None:
    skip = torch.randn(D_IN, D_IN) if "skip_connection" in changes else None
    sae = replace(random_sae("topk", k=4), subtract_b_dec=not changes, W_skip=skip, input_scale=1.4)
    write_sae(sae, tmp_path / "layers.5", "sparsify")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "layers.5")
    assert theirs.cfg.num_latents == N
    _same_as_coder(theirs, sae, x)


def test_groupmax_of_sparsify_is_refused(sparsify: Any, tmp_path: Path) -> None:
    _their_coder(sparsify, activation="groupmax").save_to_disk(tmp_path)
    with pytest.raises(CheckpointError, match="activation='groupmax' is not supported; only topk is"):
        read_sae(tmp_path)
