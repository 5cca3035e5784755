"""What a Hugging Face directory may not be, and what it may."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerscale.errors import CheckpointError, ConfigError
from steerscale.models.hf.families import config_from_hf
from steerscale.models.hf.load import load_hf
from steerscale.models.hf.tensors import open_tensors
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from tests.models.gpts import GPT2, MODELS, build

ONE = ParallelLayout()


@pytest.fixture
def damaged(exported: Callable, tmp_path: Path) -> Callable[..., Path]:
    """A copy of an exported directory with other config fields or tensors (None: without)."""

    def make(name: str, fields: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Path:
        config = json.loads((exported(name) / "config.json").read_text()) | (fields or {})
        weights = load_file(exported(name) / "model.safetensors") | (tensors or {})
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file({key: t for key, t in weights.items() if t is not None}, tmp_path / "model.safetensors")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"model_type": "mistral"}, r"model_type='mistral' is not supported; these are: llama, gpt2"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures=.* only LlamaForCausalLM is"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type='llama3'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type='linear'"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"rope_theta": "much"}}, "rope_parameters.rope_theta='much'"),
        ("llama", {"sliding_window": 4096}, "sliding_window=4096 is not supported; this field is not understood"),
        ("llama", {"num_local_experts": 8}, "num_local_experts=8"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu' is"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
        ("llama", {"hidden_size": "24"}, "'hidden_size' must be of type int, got '24'"),
        ("llama", {"num_hidden_layers": True}, "'num_hidden_layers' must be of type int, got True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu'.*gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"embd_pdrop": 0.3}, r"embd_pdrop=0\.3 is not supported; it must equal resid_pdrop=0\.0"),
    ],
)
def test_config_that_is_not_understood_is_refused(
    damaged: Callable, name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf(damaged(name, fields))


def test_config_fields_that_are_off_or_harmless_are_ignored(damaged: Callable) -> None:
    fields = {
        "sliding_window": None,
        "rope_interleaved": False,
        "num_experts": 0,
        "use_cache": True,
        "eos_token_id": [1],
    }
    assert config_from_hf(damaged("llama", fields)).rope_theta == 500.0


def test_config_of_transformers_4_gives_rope_theta(damaged: Callable) -> None:
    fields = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 777}
    assert config_from_hf(damaged("llama", fields)).rope_theta == 777.0


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_unreadable_config_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json (cannot be read|must hold)"):
        config_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        (
            "llama",
            {"model.layers.1.mlp.up_proj.weight": None},
            r"lacks 1 tensors, such as model\.layers\.1\.mlp\.up_proj",
        ),
        ("llama", {"model.layers.4.mlp.x": torch.ones(1)}, r"holds 1 tensors .* such as model\.layers\.4\.mlp\.x"),
        ("llama", {"model.norm.weight": torch.ones(23)}, r"model\.norm\.weight has shape \(23,\), expected \(24,\)"),
        ("llama", {"lm_head.weight": torch.ones(62, 24)}, r"lm_head\.weight has shape \(62, 24\), expected \(61, 24\)"),
        ("llama", {"model.norm.weight": torch.ones(24).int()}, r"model\.norm\.weight is of type I32"),
        ("gpt2", {"transformer.wpe.weight": torch.ones(15, 24)}, r"wpe\.weight .* expected \(16, 24\) or more rows"),
        ("gpt2", {"transformer.h.0.attn.c_attn.weight": torch.ones(72, 24)}, r"c_attn\.weight .* expected \(24, 72\)"),
        ("tied_llama", {"lm_head.weight": torch.ones(61, 24)}, r"holds 1 tensors .* such as lm_head\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    damaged: Callable, name: str, tensors: dict[str, Any], message: str
) -> None:
    with initialize(ONE) as context:
        chunks = build(MODELS[name], context)
        with pytest.raises(CheckpointError, match=message):
            load_hf(damaged(name, tensors=tensors), chunks, context)


def test_pickled_weights_are_refused(exported: Callable, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((exported("gpt2") / "config.json").read_text())
    with initialize(ONE) as context:
        chunks = build(GPT2, context)
        with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
            load_hf(tmp_path, chunks, context)
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"pickled weights only \(pytorch_model\.bin\)"):
            load_hf(tmp_path, chunks, context)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "cannot be read: 'weight_map'"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "weight_map must name files beside it"),
    ],
)
def test_bad_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message), open_tensors(tmp_path):
        pass


def test_missing_or_truncated_file_is_refused(exported: Callable, tmp_path: Path) -> None:
    for path in exported("gpt2 split").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = min(tmp_path.glob("model-*"))
    first.write_bytes(first.read_bytes()[:-100])
    with initialize(ONE) as context:
        chunks = build(GPT2, context)
        with pytest.raises(CheckpointError, match=f"{first.name} cannot be read"):
            load_hf(tmp_path, chunks, context)
        first.unlink()
        with pytest.raises(CheckpointError, match=f"{first.name} cannot be read"):
            load_hf(tmp_path, chunks, context)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"norm_eps": 1e-5}, "its norm_eps is 1e-06, the configured 1e-05"),
        ("llama", {"rope_theta": 1e4}, r"its rope_theta is 500\.0, the configured 10000\.0"),
        ("llama", {"num_layers": 2}, "its num_layers is 4, the configured 2"),
        ("llama", {"vocab_size": 60}, "its tokens is 61, the configured 60"),
        ("gpt2", {"activation": "gelu"}, "its activation is gelu_tanh, the configured gelu"),
        ("gpt2", {"tie_embeddings": False}, "its tie_embeddings is True, the configured False"),
    ],
)
def test_import_into_another_model_is_refused(
    exported: Callable, name: str, changes: dict[str, Any], message: str
) -> None:
    with initialize(ONE) as context:
        chunks = build(dataclasses.replace(MODELS[name], **changes), context)
        with pytest.raises(ConfigError, match=message):
            load_hf(exported(name), chunks, context)
