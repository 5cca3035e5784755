"""The language model of an SAE run: what follows from it, and what can be said of its stream before a rank starts."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from steerscale.activations.config import StreamConfig
from steerscale.activations.cost import DTYPE_BYTES
from steerscale.activations.order import block_sequences
from steerscale.activations.shape import data_of, find_kind, language_model, model_precision
from steerscale.checkpoint.integrity import find_damage, newest_checkpoint
from steerscale.config import from_mapping
from steerscale.errors import CheckpointError, ConfigError, LayoutError
from steerscale.models.config import ModelConfig
from steerscale.rundir import CONFIG, read_config
from steerscale.train.config import RunConfig


def with_language_model(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """An SAE run's mapping with what follows from its stream.lm: model, kind, checkpoint, and unless it is given the text."""
    mapping = dict(mapping)
    if mapping.get("stream") is None or mapping.get("sae") is None:
        return mapping
    stream = from_mapping(StreamConfig, mapping["stream"], at="stream")
    mapping["stream"] = {**mapping["stream"], "lm": usable_path(stream.lm, "stream.lm")}
    for key in ("checkpoint", "cache"):
        if getattr(stream, key) is not None:
            mapping["stream"][key] = usable_path(getattr(stream, key), f"stream.{key}")
    there = asdict(language_model(from_mapping(StreamConfig, mapping["stream"], at="stream")))
    given = mapping.get("model") or {}
    differing = [key for key, value in given.items() if value not in (None, "???", there.get(key)) and key in there]
    if (
        given.get("num_layers", "???") == "???"
    ):  # no model was chosen, and only what has no default is the user's own word
        needed = {field.name for field in fields(ModelConfig) if field.default is MISSING}
        differing = [key for key in differing if given[key] != "???" and key in needed]
    if differing:
        listed = ", ".join(f"model.{key}={given[key]} is not {there[key]}" for key in differing)
        raise ConfigError(
            f"stream.lm={stream.lm} is another model ({listed}): leave model out of an SAE run, it follows"
        )
    mapping["model"] = there
    mapping["stream"] |= _pinned(from_mapping(StreamConfig, mapping["stream"], at="stream"), mapping.get("run_dir"))
    data = mapping.get("data") or {}
    if not (data.get("path") or data.get("blend")):
        mapping["data"] = data_of(stream)
    return mapping


def usable_path(text: str, key: str) -> str:
    """The absolute path that `key` names. Raises ConfigError if it cannot even be asked for."""
    try:
        path = Path(text).expanduser().absolute()  # no shell expands the ~ of key=~/there
        path.exists()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).lower().rstrip(".")
        raise ConfigError(f"{key}={text} is no usable path: {reason}") from error
    return str(path)


def check_stream(config: RunConfig) -> None:
    """What ranks would otherwise find. Raises ConfigError or LayoutError naming the key."""
    stream, sae, model = config.stream, config.sae, config.model
    assert stream is not None
    assert sae is not None
    placement = config.placement()
    layout, key = (config.layout(), "parallel") if placement is None else (placement.producers, "stream.producers")
    if find_kind(stream) == "transformers":
        if layout.pipeline > 1:
            raise LayoutError(
                f"{key}.pipeline must be 1 for a model that only transformers can load, which every rank holds whole; it is "
                f"{layout.pipeline}"
            )
        return  # widths are known once it is loaded
    learned = language_model(replace(stream, seq_len=None)).seq_len
    if model.position == "learned" and model.seq_len > learned:
        raise ConfigError(f"stream.seq_len={model.seq_len} is longer than the model's {learned} learned positions")
    dtype = model_precision(stream) if stream.buffer_dtype == "auto" else stream.buffer_dtype
    bytes_per_vector = len(sae.all_hooks) * model.d_model * DTYPE_BYTES[dtype]
    block_sequences(stream, seq_len=model.seq_len, bytes_per_vector=bytes_per_vector)


def _pinned(stream: StreamConfig, run_dir: Any) -> dict[str, Any]:
    """What a later start has to find as it is now: the checkpoint of a run, which may go on; and the kind of the model."""
    kind = find_kind(stream)
    if kind != "run":
        return {"lm_kind": "transformers" if kind == "transformers" else "gpt"}
    if stream.checkpoint is None:
        before = _begun_on(stream, run_dir)
        if before is None:
            return {"checkpoint": str(newest_checkpoint(Path(stream.lm)))}
        if not Path(before).is_dir():
            raise CheckpointError(
                f"run_dir={run_dir} was begun on the activations of {before}, which is no longer there: put it back, or choose "
                "another run_dir"
            )
        return {"checkpoint": before}
    if (damage := find_damage(Path(stream.checkpoint), verify=False)) is not None:
        raise CheckpointError(f"stream.checkpoint={stream.checkpoint} is no whole checkpoint: {damage}")
    return {}


def _begun_on(stream: StreamConfig, run_dir: Any) -> str | None:
    """The checkpoint that an earlier start in this run directory read, if it has left one of its own."""
    directory = Path(usable_path(str(run_dir), "run_dir"))
    if not (directory / CONFIG).is_file() or not any((directory / "checkpoints").glob("step_*")):
        return None
    before = read_config(directory).get("stream") or {}
    return before.get("checkpoint") if before.get("lm") == stream.lm else None
