"""What can be known of a stream's language model without loading it. Torch-free: launchers check by it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerscale.activations.config import StreamConfig
from steerscale.config import from_mapping
from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig
from steerscale.models.hf.families import FAMILIES, config_from_hf
from steerscale.rundir import CONFIG, read_config


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


def data_of(stream: StreamConfig) -> dict[str, Any] | None:
    """The data section of the run that `stream.lm` names: what its model learned on. None if it is no run."""
    directory = Path(stream.lm)
    return read_config(directory).get("data") if (directory / CONFIG).is_file() else None


def _from_hf(directory: Path) -> ModelConfig:
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
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
