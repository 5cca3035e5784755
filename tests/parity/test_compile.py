"""Compiled layers repeat the run of one process that was not compiled."""

from pathlib import Path

import pytest
import torch

from steerscale.engines.config import EngineConfig
from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig
from steerscale.models.layer import compile_layers
from steerscale.parallel.layout import ParallelConfig
from steerscale.testing.parity import assert_parity
from tests.parity.conftest import Run
from tests.parity.runs import MODELS, layout, run_config


@pytest.mark.parametrize(
    ("model", "parallel", "documents", "engine"),
    [
        ("llama", layout(), True, {}),
        ("llama", layout(tensor=2, sequence=True), False, {"recompute": "pointwise"}),
        ("gpt2", layout(pipeline=2), False, {"recompute": "full"}),
        ("gpt2", layout(tensor=2), False, {"name": "deepspeed", "zero_stage": 2}),
    ],
    ids=["documents", "TP2+SP-pointwise", "PP2-full", "deepspeed-TP2"],
)
def test_parity_compiled(
    run: Run, alone: Run, model: str, parallel: ParallelConfig, documents: bool, engine: dict[str, str]
) -> None:
    if engine.get("name") == "deepspeed":
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    compiled = EngineConfig(compile="blocks", **engine)  # type: ignore[arg-type]
    assert_parity(run(model, parallel, documents=documents, engine=compiled), alone(model, documents=documents))


@pytest.mark.parametrize("key", ["dropout", "attention_dropout"])
def test_compiled_dropout_is_refused(key: str, tmp_path: Path) -> None:
    model = ModelConfig(**{**MODELS["gpt2"].__dict__, key: 0.1})
    config = run_config(tmp_path, tmp_path / "run", model, layout(), engine=EngineConfig(compile="blocks"))
    with pytest.raises(ConfigError, match=rf"engine\.compile=blocks with model\.{key}=0\.1.*use engine\.compile=none"):
        config.layout()


def test_compiled_zero_3_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.compile=blocks with engine\.zero_stage=3"):
        EngineConfig(name="deepspeed", zero_stage=3, compile="blocks")


def test_no_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        compile_layers([], torch.device("cpu"))
