"""Everything that can be checked before a rank starts is checked here, with the user's own words in the error."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from steerscale.config import from_mapping
from steerscale.data.dataset import inspect_data
from steerscale.errors import ConfigError, DataError
from steerscale.train.config import RunConfig, check_ramp_up, with_vocabulary


def check_config(mapping: Mapping[str, Any]) -> RunConfig:
    """The checked configuration, with absolute paths and the dataset's vocabulary.

    Raises SteerscaleErrors; reads datasets' manifests and, if the run directory exists, its newest checkpoint's state.
    """
    mapping = dict(mapping)
    if mapping.get("data") is not None and not (mapping["data"].get("path") or mapping["data"].get("blend")):
        mapping["data"] = None
    config = _absolute(from_mapping(RunConfig, mapping))
    dry = config.launcher.name == "dry_run"
    if config.data is not None and not (dry and config.model.vocab_size is not None):
        config = _check_data(config)
    elif config.data is None and not dry:
        raise ConfigError("data.path or data.blend must be given: a dataset made with `steerscale data prepare`")
    elif config.model.vocab_size is None:
        raise ConfigError("a dry run without data needs model.vocab_size, e.g. model.vocab_size=51200")
    layout = config.layout()
    check_ramp_up(config.train.ramp_up, layout)
    _check_wandb(config)
    if not dry:
        _check_run_dir(config)
        _check_init_from(config)
    for rank in config.launcher.ranks:
        layout.coordinates(rank)
    return config


def _absolute(config: RunConfig) -> RunConfig:
    """Ranks may start elsewhere: relative paths mean those of whoever typed them."""
    data = config.data
    if data is not None and data.path is not None:
        data = replace(data, path=str(Path(data.path).absolute()))
    elif data is not None:
        data = replace(data, blend={str(Path(path).absolute()): share for path, share in (data.blend or {}).items()})
    train = config.train
    if train.init_from is not None:
        train = replace(train, init_from=str(Path(train.init_from).absolute()))
    return replace(config, run_dir=str(Path(config.run_dir).absolute()), data=data, train=train)


def _check_data(config: RunConfig) -> RunConfig:
    assert config.data is not None
    manifests = list(inspect_data(config.data, seq_len=config.model.seq_len).values())
    for manifest in manifests:
        if (
            config.train.eval_interval
            and "valid" in manifest.splits
            and manifest.splits["valid"].tokens <= config.model.seq_len
        ):
            raise DataError(
                f"the split 'valid' has {manifest.splits['valid'].tokens} tokens, fewer than one sequence of "
                f"model.seq_len={config.model.seq_len}: prepare the data with a larger --split, or set train.eval_interval=0"
            )
    return with_vocabulary(config, manifests[0].tokenizer.vocab_size)


def _check_wandb(config: RunConfig) -> None:
    if config.metrics.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("metrics.wandb_project is set but wandb is not installed: pip install 'steerscale[wandb]'")


def _check_run_dir(config: RunConfig) -> None:
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"run_dir={run_dir} exists and is no run directory: choose another with run_dir=... or name=..."
        )
    parent = next(path for path in run_dir.parents if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"run_dir={run_dir} cannot be made: {parent} is a file")
    states = sorted((run_dir / "checkpoints").glob("step_*/state.json"))
    if not states:
        return
    try:
        there = json.loads(states[-1].read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError):
        return  # a damaged checkpoint: the workers name it and use the one before
    now = asdict(config.model)
    differing = [f"model.{key} was {value}, is {now.get(key)}" for key, value in there.items() if now.get(key) != value]
    differing = [
        text
        for text in differing
        if not text.startswith(("model.dropout", "model.attention_dropout", "model.init_std"))
    ]
    if differing:
        raise ConfigError(
            f"run_dir={run_dir} holds a run of another model ({'; '.join(differing)}): choose another run_dir or name"
        )


def _check_init_from(config: RunConfig) -> None:
    start = config.train.init_from
    if start is not None and not (Path(start) / "config.json").is_file():
        raise ConfigError(f"train.init_from={start} is no Hugging Face model directory: it has no config.json")
