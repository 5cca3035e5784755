"""DeepSpeed's settings: what is refused, what it is told, and what is made of a ds_config from elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from steerscale.cli import main
from steerscale.engines.config import EngineConfig, check_engine
from steerscale.engines.deepspeed_config import ds_config
from steerscale.engines.deepspeed_import import import_ds_config, read_ds_config
from steerscale.errors import ConfigError, LayoutError
from steerscale.optim import OptimConfig
from steerscale.parallel.layout import ParallelLayout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 1}, "engine.zero_stage=1 is a setting of DeepSpeed"),
        ({"offload_optimizer": True}, "engine.offload_optimizer=True is a setting of DeepSpeed"),
        ({"precision": "fp16"}, "engine.precision=fp16 needs engine=deepspeed"),
        ({"name": "deepspeed", "zero_stage": 4}, "engine.zero_stage must be 0, 1, 2 or 3, got 4"),
        ({"name": "deepspeed", "zero_stage": 2, "distributed_optimizer": False}, "engine.zero_stage=2 shards"),
        ({"name": "deepspeed", "zero_stage": 0, "precision": "bf16"}, "engine.precision=bf16 with ZeRO-0"),
        ({"name": "deepspeed", "zero_stage": 0, "precision": "fp16"}, "engine.precision=fp16 with ZeRO-0"),
        ({"name": "deepspeed", "zero_stage": 0, "offload_optimizer": True}, "engine.offload_optimizer=true needs ZeRO"),
        ({"name": "deepspeed", "distributed_optimizer": False, "precision": "bf16"}, "with ZeRO-0"),
        ({"name": "deepspeed", "kernels": "apex"}, "engine.kernels=apex"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "layout", "sae", "message"),
    [
        ({"zero_stage": 2}, {"pipeline": 2}, False, "engine.zero_stage=2 with parallel.pipeline=2"),
        ({"zero_stage": 3}, {"pipeline": 4}, False, "engine.zero_stage=3 with parallel.pipeline=4"),
        (
            {},
            {"pipeline": 2, "virtual_pipeline": 2},
            False,
            "parallel.virtual_pipeline=2: DeepSpeed's pipeline is plain",
        ),
        ({"offload_optimizer": True}, {"pipeline": 2}, False, "engine.offload_optimizer=true with parallel.pipeline=2"),
        ({}, {"tensor": 2, "sequence": True}, False, "parallel.sequence=true: DeepSpeed does not"),
        ({}, {"pipeline": 2}, True, "parallel.pipeline=2: SAEs train under DeepSpeed without"),
        ({"zero_stage": 3}, {}, True, "engine.zero_stage=3: an SAE's decoder"),
        ({"precision": "fp16"}, {}, True, "engine.precision=fp16: SAEs"),
    ],
)
def test_layouts_that_deepspeed_cannot_run_are_refused(
    settings: dict[str, Any], layout: dict[str, Any], sae: bool, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        check_engine(EngineConfig(name="deepspeed", **settings), ParallelLayout(**layout), sae=sae)
    if not sae and not settings:
        check_engine(EngineConfig(), ParallelLayout(**layout))  # Megatron-Core can


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        ({}, 1),
        ({"zero_stage": 0}, 0),
        ({"distributed_optimizer": False}, 0),
        ({"zero_stage": 3}, 3),
        ({"name": "megatron"}, 1),
        ({"name": "megatron", "distributed_optimizer": False}, 0),
    ],
)
def test_zero_is_what_is_asked_for(settings: dict[str, Any], stage: int) -> None:
    engine = EngineConfig(**{"name": "deepspeed", **settings})
    assert engine.zero == stage
    assert EngineConfig(**vars(engine)) == engine  # as a resume reads it


def test_ds_config_names_the_batch_as_deepspeed_does() -> None:
    layout = ParallelLayout(data=4, micro_batch_size=2, gradient_accumulation_steps=8)
    engine = EngineConfig(name="deepspeed", precision="bf16")
    config = ds_config(engine, OptimConfig(clip=0.5), layout, parameters=1000, on_cuda=False)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 8
    assert config["train_batch_size"] == 64
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 1
    assert config["bf16"]["enabled"]
    back = import_ds_config(config)
    assert back.overrides["parallel.data"] == 4
    assert back.overrides["engine.precision"] == "bf16"
    assert not back.unmapped


FOREIGN = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "Adam", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-4, "warmup_num_steps": 100, "total_num_steps": 1000},
    },
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 5e8,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "nvme"},
    },
    "activation_checkpointing": {"partition_activations": True},
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "tensor_parallel": {"autotp_size": 2},
}


def test_foreign_ds_config_is_mapped_and_the_rest_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = import_ds_config(FOREIGN)
    assert found.overrides == {
        "engine": "deepspeed",
        "parallel.micro_batch_size": 4,
        "parallel.gradient_accumulation_steps": 8,
        "parallel.tensor": 2,
        "parallel.data": 2,
        "engine.precision": "bf16",
        "engine.zero_stage": 2,
        "engine.overlap": True,
        "engine.offload_optimizer": True,
        "optim.clip": 1.0,
        "optim.lr": 3e-4,
        "optim.eps": 1e-8,
        "optim.weight_decay": 0.1,
        "optim.beta1": 0.9,
        "optim.beta2": 0.95,
        "optim.warmup_steps": 100,
        "train.steps": 1000,
        "optim.schedule": "wsd",
        "optim.min_lr": 0.0,
        "optim.decay_steps": 900,
        "metrics.interval": 10,
    }
    assert set(found.already) == {"wall_clock_breakdown", "zero_optimization.reduce_bucket_size"}
    assert set(found.unmapped) == {
        "zero_optimization.offload_param.device",
        "activation_checkpointing.partition_activations",
        "scheduler.params.warmup_type",
    }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(FOREIGN), encoding="utf-8")
    assert main(["ds-config", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "engine.zero_stage=2" in printed
    assert "only the optimizer's state can be offloaded" in printed


@pytest.mark.parametrize(
    ("config", "overrides", "unmapped"),
    [
        (
            {"train_batch_size": "auto", "zero_optimization": {"stage": 3}},
            {"engine.zero_stage": 3},
            {"train_batch_size"},
        ),
        ({"optimizer": {"type": "Lamb", "params": {"lr": 1.0}}}, {}, {"optimizer.type", "optimizer.params.lr"}),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, {"engine.precision": "fp16"}, {"fp16.loss_scale"}),
        (
            {
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 50, "cos_min_ratio": 0.1}},
            },
            {"optim.schedule": "cosine", "optim.min_lr": 1e-4, "train.steps": 50, "optim.warmup_steps": 1000},
            set(),
        ),
        ({"train_batch_size": 32}, {"parallel.global_batch_size": 32}, set()),
    ],
)
def test_parts_of_a_ds_config(config: dict[str, Any], overrides: dict[str, Any], unmapped: set[str]) -> None:
    found = import_ds_config(config)
    assert {key: found.overrides[key] for key in overrides} == pytest.approx(overrides)
    assert set(found.unmapped) == unmapped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object, got list"),
        (
            '{"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}',
            "no multiple",
        ),
        ('{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', "are both true"),
        ('{"gradient_clipping": "strong"}', "is no ds_config: ValueError"),
    ],
)
def test_what_is_no_ds_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_ds_config(file)
