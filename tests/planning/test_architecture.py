from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from steerscale.config import from_mapping, load_yaml
from steerscale.errors import ConfigError, LayoutError
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.architecture import TOLERANCE, find_architecture, preset_yaml, usual_aspect

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "model"


def preset(name: str) -> ModelConfig:
    return from_mapping(ModelConfig, {**load_yaml(PRESETS / f"{name}.yaml"), "vocab_size": 51200})


@pytest.mark.parametrize(("name", "shape"), [("125m", (12, 768)), ("6.7b", (32, 4096)), ("175b", (96, 12288))])
def test_find_architecture_finds_gpt3s_shapes_again(name: str, shape: tuple[int, int]) -> None:
    published = preset(name)
    found = find_architecture(published.num_parameters(), like=published)
    assert (found.num_layers, found.d_model) == shape
    assert found.num_parameters() == published.num_parameters()
    assert found.d_model / found.num_layers == pytest.approx(usual_aspect(found.num_parameters()), rel=0.1)


@pytest.mark.parametrize("like", ["6.7b", "7b_gqa_swiglu"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 4), (8, 8), (3, 5), (8, 6)])
@pytest.mark.parametrize("parameters", [1.3e9, 13.9e9, 70e9])
def test_found_models_are_near_and_can_be_split(parameters: float, tensor: int, pipeline: int, like: str) -> None:
    model = find_architecture(parameters, like=preset(like), tensor=tensor, pipeline=pipeline)
    assert abs(model.num_parameters() / parameters - 1) <= TOLERANCE
    ParallelLayout(tensor=tensor, pipeline=pipeline).check_model(model)
    assert (model.norm, model.position, model.seq_len) == (
        preset(like).norm,
        preset(like).position,
        preset(like).seq_len,
    )
    assert model.ffn_width / model.d_model == pytest.approx(preset(like).ffn_width / preset(like).d_model, rel=0.05)


def test_preset_is_read_back_as_the_same_model() -> None:
    for like in ("6.7b", "7b_gqa_swiglu"):
        model = find_architecture(2e9, like=preset(like), tensor=2)
        text = preset_yaml(model, comment="1.9 B parameters")
        assert text.startswith("# 1.9 B parameters\n")
        read = from_mapping(ModelConfig, yaml.safe_load(text))
        assert read.vocab_size is None
        assert replace(read, vocab_size=51200) == model


def test_what_cannot_be_split_is_refused_with_its_degrees() -> None:
    with pytest.raises(LayoutError, match=r"no model within 10% of 3e\+06 .* --pp 8 and heads that --tp 8 divide"):
        find_architecture(3e6, like=preset("6.7b"), tensor=8, pipeline=8)
    with pytest.raises(ConfigError, match="--tp must be at least 1, got 0"):
        find_architecture(1e9, like=preset("6.7b"), tensor=0)
