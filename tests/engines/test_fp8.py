from dataclasses import replace
from typing import Any

import pytest

from steerscale.engines.config import EngineConfig
from steerscale.engines.fp8 import check_fp8_shapes
from steerscale.errors import ConfigError, LayoutError
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelConfig, ParallelLayout

MODEL = ModelConfig(num_layers=2, d_model=64, num_heads=4, seq_len=16, vocab_size=128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "engine.fp8=hybrid needs engine.precision=bf16"),
        (
            {"precision": "bf16", "kernels": "liger"},
            "needs Transformer Engine's linear layers, got engine.kernels=liger",
        ),
        ({"precision": "bf16", "kernels": "torch"}, "got engine.kernels=torch: set engine.kernels=te"),
        ({"precision": "bf16", "name": "deepspeed"}, "engine.fp8=hybrid needs engine=megatron, got engine=deepspeed"),
    ],
)
def test_settings_that_do_not_go_with_fp8_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(fp8="hybrid", **settings)


def test_settings_that_go_with_fp8() -> None:
    for kernels in ("te", "auto"):
        assert EngineConfig(fp8="e4m3", precision="bf16", kernels=kernels).fp8 == "e4m3"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "degrees", "message"),
    [
        ({}, {}, None),
        ({"d_model": 72, "d_head": 16, "d_ff": 256}, {}, "model.d_model is 72"),
        ({"d_ff": 168}, {}, "model.d_ff / parallel.tensor is 168"),
        ({"d_ff": 176}, {"tensor": 2}, "model.d_ff / parallel.tensor is 88"),
        ({"d_head": 12}, {"tensor": 2}, "model.num_heads x model.d_head / parallel.tensor is 24"),
        ({"seq_len": 24}, {"micro_batch_size": 1}, "parallel.micro_batch_size x model.seq_len is 24"),
        ({"seq_len": 24}, {"micro_batch_size": 2}, None),
        ({}, {"tensor": 2, "sequence": True, "micro_batch_size": 1}, r"parallel.tensor \(parallel.sequence\) is 8"),
    ],
)
def test_sizes_that_cannot_be_multiplied_in_8_bits_are_refused(
    change: dict[str, Any], degrees: dict[str, Any], message: str | None
) -> None:
    layout = ParallelLayout.resolve(ParallelConfig(**{"micro_batch_size": 2, "global_batch_size": 2, **degrees}))
    model = replace(MODEL, **change)
    check_fp8_shapes("none", model, layout)
    if message is None:
        check_fp8_shapes("hybrid", model, layout)
        return
    with pytest.raises(LayoutError, match=f"engine.fp8=hybrid needs multiples of 16: .*{message}"):
        check_fp8_shapes("hybrid", model, layout)
