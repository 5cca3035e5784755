"""A `ds_config.json` from elsewhere in our words: what maps becomes overrides, what does not is named. Torch-free."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerscale.errors import ConfigError

AUTO = "auto"
"""Hugging Face's word for "from the Trainer's arguments"."""

OURS_ALREADY = {
    "wall_clock_breakdown": "steps are always timed by section",
    "zero_allow_untested_optimizer": "set by steerscale",
    "zero_force_ds_cpu_optimizer": "set by steerscale",
    "zero_optimization.contiguous_gradients": "set by steerscale",
    "zero_optimization.reduce_scatter": "set by steerscale",
    "zero_optimization.allgather_partitions": "set by steerscale",
    "zero_optimization.reduce_bucket_size": "set by steerscale: 5e8, or the rank's parameters if these are fewer",
    "optimizer.params.torch_adam": "the optimizer is torch's AdamW",
    "optimizer.params.adam_w_mode": "weight decay is decoupled",
    "bf16.immediate_grad_update": "set by steerscale",
    "bf16.check_grad_overflow": "steps whose gradients are not finite are skipped",
}
HINTS = {
    "activation_checkpointing": "choose engine.recompute=full or selective",
    "flops_profiler": "FLOPs are counted by formula; traces: profile.steps",
    "zero_optimization.offload_param": "only the optimizer's state can be offloaded",
    "checkpoint": "checkpoints are written in steerscale's own form; see checkpoint.*",
    "fp16.loss_scale": "only dynamic loss scaling (0)",
    "csv_monitor": "metrics.jsonl has every record",
    "data_types": "gradients are accumulated in fp32",
    "communication_data_type": "gradients are reduced in fp32, those of fp16 in fp16",
    "scheduler.params.warmup_type": "the warm-up is linear",
    "scheduler.params.warmup_min_lr": "the warm-up begins at 0",
}


@dataclass
class Imported:
    """What was made of a ds_config."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Our settings by key."""
    already: dict[str, str] = field(default_factory=dict)
    """Keys that say what happens anyway, and why."""
    unmapped: dict[str, str] = field(default_factory=dict)
    """Keys without a counterpart, and what to do instead."""


def read_ds_config(path: Path) -> Imported:
    """Read a ds_config file. Raises ConfigError if it is no JSON mapping or a value is not what DeepSpeed means there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(content).__name__}")
    try:
        return import_ds_config(content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no ds_config: {type(error).__name__}: {error}") from error


def import_ds_config(config: Mapping[str, Any]) -> Imported:
    """Translate a ds_config."""
    values = dict(_flatten(config))
    found = Imported(overrides={"engine": "deepspeed"})
    for key in [key for key, value in values.items() if value == AUTO]:
        del values[key]
        found.unmapped[key] = "auto: to be given in steerscale's configuration"
    for section in (_batches, _precision, _zero, _optimizer, _scheduler, _monitoring):
        section(values.pop, values, found)
    for key, value in values.items():
        if value is False or value is None:
            found.already[key] = "off"
        elif key in OURS_ALREADY:
            found.already[key] = OURS_ALREADY[key]
        else:
            hint = next((HINTS[start] for start in _starts(key) if start in HINTS), "no counterpart")
            found.unmapped[key] = hint
    return found


Pop = Callable[..., Any]


def _batches(pop: Pop, values: dict[str, Any], found: Imported) -> None:
    micro, steps = pop("train_micro_batch_size_per_gpu", None), pop("gradient_accumulation_steps", None)
    total = pop("train_batch_size", None)
    if micro is not None:
        found.overrides["parallel.micro_batch_size"] = int(micro)
    if steps is not None:
        found.overrides["parallel.gradient_accumulation_steps"] = int(steps)
    if tensor := pop("tensor_parallel.autotp_size", None):
        found.overrides["parallel.tensor"] = int(tensor)
    if total is None:
        return
    if micro is None or steps is None:
        found.overrides["parallel.global_batch_size"] = int(total)
    elif int(total) % (int(micro) * int(steps)):
        raise ValueError(f"train_batch_size={total} is no multiple of {micro} x {steps}, MBS x GAS")
    else:
        found.overrides["parallel.data"] = int(total) // (int(micro) * int(steps))


def _precision(pop: Pop, values: dict[str, Any], found: Imported) -> None:
    bf16, fp16 = pop("bf16.enabled", False), pop("fp16.enabled", False)
    if bf16 and fp16:
        raise ValueError("bf16.enabled and fp16.enabled are both true")
    precision = "bf16" if bf16 else "fp16" if fp16 else "fp32"
    found.overrides["engine.precision"] = precision
    if values.get("fp16.loss_scale") == 0:
        pop("fp16.loss_scale")
    if values.get("data_types.grad_accum_dtype") in ("fp32", None):
        pop("data_types.grad_accum_dtype", None)
    if values.get("communication_data_type") == "fp32" and precision != "fp16":
        pop("communication_data_type")
    if precision != "fp16":
        for key in [key for key in values if key.startswith("fp16.")]:
            found.already[key] = "fp16 is off"
            pop(key)


def _zero(pop: Pop, values: dict[str, Any], found: Imported) -> None:
    found.overrides["engine.zero_stage"] = int(pop("zero_optimization.stage", 0))
    if (overlap := pop("zero_optimization.overlap_comm", None)) is not None:
        found.overrides["engine.overlap"] = bool(overlap)
    device = values.get("zero_optimization.offload_optimizer.device")
    if device in ("cpu", "none"):
        pop("zero_optimization.offload_optimizer.device")
        found.overrides["engine.offload_optimizer"] = device == "cpu"
        pop("zero_optimization.offload_optimizer.pin_memory", None)
    if values.get("zero_optimization.offload_param.device") == "none":
        pop("zero_optimization.offload_param.device")
    if values.get("pipeline.activation_checkpoint_interval"):
        pop("pipeline.activation_checkpoint_interval")
        found.overrides["engine.recompute"] = "full"


def _optimizer(pop: Pop, values: dict[str, Any], found: Imported) -> None:
    if (clip := pop("gradient_clipping", None)) is not None:
        found.overrides["optim.clip"] = float(clip)
    kind = values.get("optimizer.type")
    if kind is None:
        return
    decoupled = kind.lower() == "adamw" or (kind.lower() == "adam" and values.get("optimizer.params.adam_w_mode", True))
    if not decoupled:
        for key in [key for key in values if key.startswith("optimizer.")]:
            found.unmapped[key] = "the optimizer is AdamW"
            pop(key)
        return
    pop("optimizer.type")
    for theirs in ("lr", "eps", "weight_decay"):
        if (value := pop(f"optimizer.params.{theirs}", None)) is not None:
            found.overrides[f"optim.{theirs}"] = float(value)
    if (betas := pop("optimizer.params.betas", None)) is not None:
        found.overrides["optim.beta1"], found.overrides["optim.beta2"] = map(float, betas)


def _scheduler(pop: Pop, values: dict[str, Any], found: Imported) -> None:
    kind = values.get("scheduler.type")
    if kind not in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        return
    pop("scheduler.type")
    if values.get("scheduler.params.warmup_type") == "linear":
        pop("scheduler.params.warmup_type")
    elif kind != "WarmupCosineLR":
        values["scheduler.params.warmup_type"] = "log"  # DeepSpeed's default: to be named
    if values.get("scheduler.params.warmup_min_lr") == 0:
        pop("scheduler.params.warmup_min_lr")
    warmup, total = int(pop("scheduler.params.warmup_num_steps", 1000)), pop("scheduler.params.total_num_steps", None)
    found.overrides["optim.warmup_steps"] = warmup
    if (peak := pop("scheduler.params.warmup_max_lr", None)) is not None:
        found.overrides["optim.lr"] = float(peak)
    if total is not None:
        found.overrides["train.steps"] = int(total)
    if kind == "WarmupLR":
        found.overrides.update({"optim.schedule": "constant", "optim.min_lr": 0.0})
    elif kind == "WarmupDecayLR":  # linear to 0 over all that follows the warm-up
        found.overrides.update({"optim.schedule": "wsd", "optim.min_lr": 0.0})
        if total is not None:
            found.overrides["optim.decay_steps"] = int(total) - warmup
    else:
        ratio = float(pop("scheduler.params.cos_min_ratio", 0.0001))
        found.overrides["optim.schedule"] = "cosine"
        if "optim.lr" in found.overrides:
            found.overrides["optim.min_lr"] = ratio * found.overrides["optim.lr"]


def _monitoring(pop: Pop, values: dict[str, Any], found: Imported) -> None:
    if (interval := pop("steps_per_print", None)) is not None:
        found.overrides["metrics.interval"] = int(interval)
    if (enabled := pop("tensorboard.enabled", None)) is not None:
        found.overrides["metrics.tensorboard"] = bool(enabled)
    if pop("wandb.enabled", False):
        found.overrides["metrics.wandb_project"] = pop("wandb.project", "deepspeed")


def _flatten(config: Mapping[str, Any], at: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in config.items():
        name = f"{at}.{key}" if at else str(key)
        pairs += _flatten(value, name) if isinstance(value, Mapping) else [(name, value)]
    return pairs


def _starts(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
