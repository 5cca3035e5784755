"""Everything that can be checked before a rank starts is checked here, with the user's own words in the error."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.check_stream import check_stream, usable_path, with_language_model
from launch.resume import check_same_model
from launch.slurm import check_job
from steerscale.config import from_mapping
from steerscale.data.dataset import inspect_data
from steerscale.errors import ConfigError, DataError, LayoutError
from steerscale.rundir import CONFIG
from steerscale.train.config import RunConfig, check_ramp_up, with_vocabulary

MOST_LOCAL_RANKS_PER_CORE = 8
"""More are refused; 64 are always allowed."""


def check_config(mapping: Mapping[str, Any]) -> RunConfig:
    """The checked configuration, with absolute paths and the dataset's vocabulary.

    Raises SteerscaleErrors; reads datasets' manifests and, if the run directory exists, its newest checkpoint's state.
    """
    mapping = with_language_model(mapping)
    data = mapping.get("data")
    if isinstance(data, Mapping) and not (data.get("path") or data.get("blend")):
        mapping["data"] = None
    config = _absolute(from_mapping(RunConfig, mapping))
    dry = config.launcher.name == "dry_run"
    layout = config.layout()
    check_ramp_up(config.train.ramp_up, layout, lanes=1 if config.stream is None else config.stream.lanes)
    if config.stream is not None:
        check_stream(config)
    _check_ranks(config)
    if data_is_there(config):
        config = _check_data(config)
        config.layout()  # once more, with the vocabulary
    elif not dry:
        raise ConfigError(
            "data.path (or data.blend) must be given: data.path=DIRECTORY of a dataset made with `steerscale data prepare`"
        )
    elif config.model.vocab_size is None:
        raise ConfigError("a dry run without data needs model.vocab_size, e.g. model.vocab_size=51200")
    _check_wandb(config)
    if not dry:
        _check_deepspeed(config)
    _check_init_from(config)
    if not dry:
        _check_run_dir(config)
    if config.launcher.name == "slurm":
        check_job(config)
    return config


def data_is_there(config: RunConfig) -> bool:
    """Whether the datasets are to be read: always, but for a dry run that can do without the ones that are elsewhere."""
    if config.data is None:
        return False
    if config.launcher.name == "dry_run" and config.model.vocab_size is not None:
        return all(Path(path).is_dir() for path in config.data.weights)
    return True


def _absolute(config: RunConfig) -> RunConfig:
    """Ranks may start elsewhere: relative paths mean those of whoever typed them."""
    data = config.data
    if data is not None and data.path is not None:
        data = replace(data, path=usable_path(data.path, "data.path"))
    elif data is not None:
        data = replace(
            data, blend={usable_path(path, "data.blend"): share for path, share in (data.blend or {}).items()}
        )
    train = config.train
    if train.init_from is not None:
        train = replace(train, init_from=usable_path(train.init_from, "train.init_from"))
    return replace(config, run_dir=usable_path(config.run_dir, "run_dir"), data=data, train=train)


def _check_ranks(config: RunConfig) -> None:
    cores, ranks, layout = os.cpu_count() or 1, config.num_ranks(), config.layout()
    if config.launcher.name == "local" and ranks > max(64, MOST_LOCAL_RANKS_PER_CORE * cores):
        raise LayoutError(
            f"launcher=local would start all {ranks:,} ranks ({layout}) on this machine with its {cores} cores: use "
            "launcher=dry_run to look at this layout, or smaller parallel.tensor, .pipeline or .data"
        )
    for rank in config.launcher.ranks:
        if not 0 <= rank < ranks:
            raise LayoutError(
                f"launcher.ranks={config.launcher.ranks}: there is no rank {rank}, {layout} has ranks 0 to {ranks - 1}"
            )


def _check_data(config: RunConfig) -> RunConfig:
    assert config.data is not None
    key = "data.path" if config.data.path is not None else "data.blend"
    try:
        manifests = inspect_data(config.data, seq_len=config.model.seq_len)
    except DataError as error:
        raise DataError(str(error) if str(error).startswith("data.") else f"{key}: {error}") from error
    # Held-out text is read where every dataset has some.
    if all("valid" in manifest.splits for manifest in manifests.values()):
        try:
            for path, manifest in manifests.items():
                manifest.require_split("valid", seq_len=config.model.seq_len, path=path)
        except DataError as error:
            raise DataError(f"{key}: {error}; or do without held-out text: prepare with --split 1,0,0") from error
    (first, *_) = manifests.values()
    return with_vocabulary(config, first.tokenizer.vocab_size)


def _check_wandb(config: RunConfig) -> None:
    if config.metrics.wandb_project is None:
        return
    found = importlib.util.find_spec("wandb")
    # W&B leaves a folder of its name where it ran, which Python takes for a package without contents.
    if found is None or found.origin is None:
        raise ConfigError(
            f"metrics.wandb_project={config.metrics.wandb_project} is set but wandb is not installed: pip install "
            "'steerscale[wandb]', or leave it null"
        )


def _check_deepspeed(config: RunConfig) -> None:
    if config.engine.name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "engine.name=deepspeed needs the package deepspeed, which is not installed: DS_BUILD_OPS=0 pip install "
            "'steerscale[deepspeed]', or use engine=megatron"
        )


def _check_run_dir(config: RunConfig) -> None:
    run_dir = Path(config.run_dir)
    if (run_dir.exists() or run_dir.is_symlink()) and not (run_dir / CONFIG).is_file():
        what = "a dangling link" if not run_dir.exists() else "a file" if run_dir.is_file() else "no run directory"
        raise ConfigError(f"run_dir={run_dir} exists and is {what}: choose another with run_dir=... or name=...")
    parent = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"run_dir={run_dir} cannot be made: {parent} is a file; choose another with run_dir=...")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={run_dir} cannot be written: {parent} is not writable here; choose another")
    check_same_model(config)


def _check_init_from(config: RunConfig) -> None:
    start = config.train.init_from
    if start is not None and not (Path(start) / "config.json").is_file():
        what = "has no config.json" if Path(start).is_dir() else "does not exist"
        raise ConfigError(
            f"train.init_from={start} is no Hugging Face model directory: it {what}; name a downloaded model's directory, "
            "or leave it null for random weights"
        )
