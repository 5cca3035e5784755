"""Hydra in one place: YAML groups and overrides -> a plain mapping; sweeps -> a list of override lists.

The defaults come from the dataclasses, so that every key can be overridden without `+` and is documented once.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steerscale.config import unknown_key
from steerscale.errors import ConfigError
from steerscale.train.config import RunConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULTS = "defaults_of_the_code"
"""Name under which the dataclasses' defaults stand in Hydra; configs/train.yaml begins with it."""


def compose_config(overrides: Sequence[str], *, config_name: str = "train") -> dict[str, Any]:
    """The resolved configuration as a plain mapping. Raises ConfigError for anything Hydra or OmegaConf refuses."""
    parsed = parse_overrides(overrides)
    defaults = defaults_of(RunConfig)
    for override in parsed:
        _check_key(override, defaults)
    _register(defaults)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose(config_name, overrides=list(overrides))
        missing = OmegaConf.missing_keys(config)
        if missing:
            raise ConfigError(f"{', '.join(sorted(missing))} must be set: no config file and no override gives a value")
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    finally:
        GlobalHydra.instance().clear()


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the sweeps in `overrides` (a=1,2 b=range(3)), Hydra's grammar, later keys varying fastest."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    (batch,) = BasicSweeper.split_arguments(parse_overrides(overrides), max_batch_size=None)
    return [list(job) for job in batch]


def sweeps(override: Override) -> bool:
    """Whether an override stands for several values."""
    return override.is_sweep_override()


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's reading of overrides. Raises ConfigError naming the one that cannot be read."""
    parsed = []
    for text in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException as error:
            raise ConfigError(f"override {text!r} cannot be read, expected key=value: {_explain(error)}") from error
    return parsed


def defaults_of(cls: type) -> dict[str, Any]:
    """A config dataclass' defaults as a nested mapping; "???" marks what has none (OmegaConf's word for missing)."""
    hints = typing.get_type_hints(cls)
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        nested = next(
            (hint for hint in (hints[field.name], *typing.get_args(hints[field.name])) if _is_config(hint)), None
        )
        # An optional section without which no run is possible (data) is spelled out; others (ramp_up) stay null.
        if nested is not None and (field.default is not None or field.name == "data"):
            defaults[field.name] = defaults_of(nested)
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
        else:
            defaults[field.name] = "???"
    return defaults


def groups() -> list[str]:
    """Config groups, the directories of configs/."""
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


def _is_config(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _register(defaults: Mapping[str, Any]) -> None:
    ConfigStore.instance().store(name=DEFAULTS, node=OmegaConf.create(dict(defaults)))


def _check_key(override: Override, defaults: Mapping[str, Any]) -> None:
    """Refuse an unknown key with a suggestion; Hydra's own text is about structs."""
    key = override.key_or_group.split("@")[0]
    if "/" in key or key in groups() or override.package is not None:
        return
    node: Any = defaults
    for depth, part in enumerate(path := key.split(".")):
        if not isinstance(node, Mapping):
            return  # inside a value that is a free mapping or null by default: the strict loader checks it
        if part not in node:
            known = [*node, *groups()] if depth == 0 else list(node)
            raise ConfigError(unknown_key(".".join(path[: depth + 1]), part, known))
        node = node[part]


def _explain(error: Exception) -> str:
    """A Hydra error's text without its internals."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    noise = (
        "Set the environment variable",
        "See https",
        "full_key:",
        "object_type=",
        "Config search path",
        "provider=",
    )
    kept = [line for line in lines if not line.startswith(noise)]
    cause = error.__cause__
    if cause is not None and str(cause) and str(cause).splitlines()[0] not in " ".join(kept):
        kept.append(str(cause).splitlines()[0])
    return " ".join(kept)
