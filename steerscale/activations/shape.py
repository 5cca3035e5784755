"""What can be known of a stream's language model without loading it. Torch-free: launchers check by it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from steerscale.activations.config import StreamConfig
from steerscale.config import from_mapping
from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig
from steerscale.models.hf.families import FAMILIES, config_from_hf
from steerscale.rundir import CONFIG, read_config

HF_CONFIG = "config.json"
Kind = Literal["run", "family", "transformers"]
"""A run of ours; a Hugging Face model that our GPT can be; any other one."""


def find_kind(config: StreamConfig) -> Kind:
    """What `stream.lm` is, without loading anything. Raises ConfigError if it is no model, or not of `stream.lm_kind`."""
    directory = Path(config.lm)
    if (directory / CONFIG).is_file():
        if config.lm_kind == "transformers":
            raise ConfigError(
                f"stream.lm={config.lm} is a run directory, stream.lm_kind=transformers needs a Hugging Face model: use gpt"
            )
        return "run"
    if not (directory / HF_CONFIG).is_file():
        raise ConfigError(
            f"stream.lm={config.lm} is neither a run directory (no {CONFIG}) nor a Hugging Face model (no {HF_CONFIG})"
        )
    if config.checkpoint is not None:
        raise ConfigError(
            "stream.checkpoint chooses among a run's checkpoints; stream.lm is a Hugging Face model: leave it out"
        )
    if config.lm_kind == "transformers":
        return "transformers"
    known = hf_settings(directory).get("model_type") in FAMILIES
    if config.lm_kind == "gpt" and not known:
        raise ConfigError(
            f"stream.lm={config.lm} is of model_type {hf_settings(directory).get('model_type')!r}, which stream.lm_kind=gpt "
            f"cannot be; it can be {', '.join(FAMILIES)}: use stream.lm_kind=transformers"
        )
    return "family" if known else "transformers"


def language_model(stream: StreamConfig) -> ModelConfig:
    """Shape of the model that `stream.lm` names, with `seq_len` as it will be read. Raises ConfigError if there is none.

    Of a model that only transformers knows: layers, widths and vocabulary, by the names most configurations use.
    """
    directory = Path(stream.lm)
    if (directory / CONFIG).is_file():
        model = from_mapping(ModelConfig, read_config(directory)["model"], at=f"{directory / CONFIG}: model")
    elif (directory / "config.json").is_file():
        model = _from_hf(directory)
    else:
        raise ConfigError(
            f"stream.lm={stream.lm} is neither a run directory (it has no {CONFIG}) nor a Hugging Face model (no config.json)"
        )
    return model if stream.seq_len is None else replace(model, seq_len=stream.seq_len)


def model_precision(stream: StreamConfig) -> Literal["fp32", "bf16"]:
    """What the model is run in."""
    directory = Path(stream.lm)
    if stream.precision == "auto" and (directory / CONFIG).is_file():
        trained_in = read_config(directory).get("engine", {}).get("precision", "fp32")
        return "fp32" if trained_in == "fp32" else "bf16"
    return hf_precision(stream)


def data_of(stream: StreamConfig) -> dict[str, Any] | None:
    """The data section of the run that `stream.lm` names: what its model learned on. None if it is no run."""
    directory = Path(stream.lm)
    return read_config(directory).get("data") if (directory / CONFIG).is_file() else None


def hf_settings(directory: Path) -> dict[str, Any]:
    """A Hugging Face model's config.json. Raises ConfigError if it cannot be read."""
    try:
        settings = json.loads((directory / HF_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory / HF_CONFIG} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{directory / HF_CONFIG} must hold a JSON object, got {type(settings).__name__}")
    return settings


def hf_precision(config: StreamConfig) -> Literal["fp32", "bf16"]:
    """What a Hugging Face model is run in: what was asked for, or what its files are in."""
    if config.precision != "auto":
        return config.precision
    settings = hf_settings(Path(config.lm))
    stored = settings.get("dtype", settings.get("torch_dtype"))
    return "bf16" if stored in ("bfloat16", "float16") else "fp32"


def _from_hf(directory: Path) -> ModelConfig:
    values = hf_settings(directory)
    if values.get("model_type") in FAMILIES:
        return config_from_hf(directory)
    values = values.get("text_config", values)
    try:
        return ModelConfig(
            num_layers=values["num_hidden_layers"],
            d_model=values["hidden_size"],
            num_heads=values["num_attention_heads"],
            num_kv_groups=values.get("num_key_value_heads"),
            seq_len=values["max_position_embeddings"],
            vocab_size=values["vocab_size"],
        )
    except KeyError as error:
        raise ConfigError(
            f"{directory / 'config.json'} does not say {error}: models without it cannot be streamed"
        ) from None
