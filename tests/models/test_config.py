from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerscale.config import from_mapping, load_yaml
from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig

SHAPE: dict[str, Any] = {"num_layers": 2, "d_model": 8, "num_heads": 2, "seq_len": 16, "vocab_size": 100}
PRESETS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))


def test_num_parameters_of_mha_gelu_and_biases_by_hand() -> None:
    model = ModelConfig(**SHAPE)
    qkv, output = 8 * 24 + 24, 8 * 8 + 8
    mlp = 8 * 32 + 32 + 32 * 8 + 8
    norm = 8 + 8
    blocks = 2 * (qkv + output + mlp + 2 * norm) + norm
    assert model.num_parameters(embeddings=False) == blocks == 1760
    assert model.num_parameters() == blocks + 128 * 8 + 16 * 8


def test_num_parameters_of_gqa_swiglu_untied_without_biases_by_hand() -> None:
    model = ModelConfig(
        **SHAPE | {"num_heads": 4},
        num_kv_groups=2,
        d_head=4,
        d_ff=12,
        position="rotary",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
    )
    queries, keys, values, output = 8 * 16, 8 * 8, 8 * 8, 16 * 8
    gate, up, down = 8 * 12, 8 * 12, 12 * 8
    blocks = 2 * (queries + keys + values + output + gate + up + down + 2 * 8) + 8
    assert model.num_parameters(embeddings=False) == blocks == 1384
    assert model.num_parameters() == blocks + 2 * 128 * 8
    assert replace(model, tie_embeddings=True).num_parameters() == blocks + 128 * 8
    # a gated MLP's first matrix has two biases a unit; Qwen has biases in QKV alone
    assert replace(model, bias=True).num_parameters() == blocks + 2 * 128 * 8 + 2 * (32 + 8 + 24 + 8)
    assert replace(model, qkv_bias=True).num_parameters() == blocks + 2 * 128 * 8 + 2 * 32


def test_widths_are_derived_unless_given() -> None:
    model = ModelConfig(**SHAPE)
    assert (model.kv_groups, model.head_width, model.ffn_width, model.gated) == (2, 4, 32, False)
    given = ModelConfig(**SHAPE, num_kv_groups=1, d_head=6, d_ff=20, activation="swiglu")
    assert (given.kv_groups, given.head_width, given.ffn_width, given.gated) == (1, 6, 20, True)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 128), (128, 128), (129, 256), (50257, 50304)])
def test_padded_vocab_is_the_next_multiple(tokens: int, rows: int) -> None:
    assert ModelConfig(**SHAPE | {"vocab_size": tokens}).padded_vocab == rows


def test_unknown_vocabulary_is_an_error_where_it_matters() -> None:
    model = ModelConfig(**SHAPE | {"vocab_size": None})
    assert model.num_parameters(embeddings=False) == 1760
    with pytest.raises(ConfigError, match="vocab_size is not known yet"):
        model.num_parameters()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "model.num_layers must be positive, got 0"),
        ({"pad_vocab_to": 0}, "model.pad_vocab_to must be positive, got 0"),
        ({"vocab_size": 0}, "model.vocab_size must be positive or null, got 0"),
        ({"d_ff": -1}, "model.d_ff must be positive or null, got -1"),
        ({"num_heads": 3}, "num_heads must divide model.d_model: 3 does not divide 8"),
        ({"num_kv_groups": 3}, "num_kv_groups must divide model.num_heads: 3 does not divide 2"),
        ({"position": "rotary", "d_head": 5}, "needs an even head width, got 5"),
        ({"dropout": 1.0}, "model.dropout must be in"),
        ({"attention_dropout": -0.1}, "model.attention_dropout must be in"),
        ({"norm_eps": 0.0}, "model.norm_eps must be positive"),
        ({"init_std": 0.0}, "model.init_std must be positive"),
        ({"rope_theta": 0.0}, "model.rope_theta must be positive"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**SHAPE | changes)


def test_a_head_width_of_its_own_frees_the_number_of_heads() -> None:
    assert ModelConfig(**SHAPE | {"num_heads": 3}, d_head=4).head_width == 4


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_is_valid_and_leaves_the_vocabulary_to_the_dataset(path: Path) -> None:
    assert from_mapping(ModelConfig, load_yaml(path)).vocab_size is None
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("125m", 125e6),
        ("350m", 350e6),
        ("1.3b", 1.3e9),
        ("2.7b", 2.7e9),
        ("6.7b", 6.7e9),
        ("7b_gqa_swiglu", 7e9),
        ("13b", 13e9),
        ("175b", 175e9),
    ],
)
def test_preset_has_the_parameters_it_is_named_after(name: str, parameters: float) -> None:
    (path,) = (path for path in PRESETS if path.stem == name)
    model = replace(from_mapping(ModelConfig, load_yaml(path)), vocab_size=51200)
    assert model.num_parameters() == pytest.approx(parameters, rel=0.05)
