"""Hydra in one place: YAML groups and overrides -> a plain mapping; sweeps -> a list of override lists.

The defaults come from the dataclasses, so that every key can be overridden without `+` and is documented once. Overrides
are read and checked here before Hydra sees them: its own errors are about structs and defaults lists.
"""

import dataclasses
import difflib
import itertools
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from steerscale.config import load_yaml, unknown_key
from steerscale.errors import ConfigError
from steerscale.train.config import RunConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULTS = "defaults_of_the_code"
"""Name under which the dataclasses' defaults stand in Hydra; configs/train.yaml begins with it."""
FROM_FILE = "configuration_from_a_file"
"""Name under which a file given as --config-name stands in Hydra."""


def compose_config(
    overrides: Sequence[str], *, config_name: str = "train", partial: bool = False, schema: type = RunConfig
) -> dict[str, Any]:
    """The resolved configuration as a plain mapping.

    Args:
        overrides: group=option and key=value, in Hydra's grammar.
        config_name: a file of configs/ without its suffix, or the path of a whole configuration ending in .yaml, e.g.
            the config.yaml of a run directory.
        partial: leave "???" where a value is missing instead of refusing.
        schema: the dataclass whose keys there are; for another than a run's, `config_name` is the path of a file.

    Raises ConfigError for anything that cannot be read, is unknown or is missing.
    """
    whole_file = _is_file(config_name)
    lines = [_checked(override, whole_file=whole_file, schema=schema) for override in parse_overrides(overrides)]
    store = ConfigStore.instance()
    store.store(name=DEFAULTS, node=OmegaConf.create(defaults_of(RunConfig)))
    name = _primary(config_name, schema)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose(name, overrides=lines)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing and not partial:
            raise ConfigError(f"{', '.join(missing)} must be set: give {missing[0]}=VALUE, or set it in a config file")
        mapping: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    except yaml.YAMLError as error:
        raise ConfigError(f"a file of {CONFIGS} is not valid YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    finally:
        GlobalHydra.instance().clear()
    if "experiment" in mapping:
        raise ConfigError(
            "the keys of the chosen experiment ended up under 'experiment': its file must begin with the line "
            "'# @package _global_'"
        )
    return mapping


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the sweeps in `overrides` (a=1,2 b=range(3) model=glob(*)), later keys varying fastest."""
    return [list(job) for job in itertools.product(*map(_values, parse_overrides(overrides)))]


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]  # as typed: Hydra's own spelling escapes ${...} and so would end it
    value = override.value()
    if isinstance(value, Glob):
        if override.key_or_group not in groups():
            raise ConfigError(
                f"{override.input_line}: glob(...) stands for files of a config group: {_listed(groups())}"
            )
        values = value.filter(options(override.key_or_group))
    elif override.is_interval_sweep():
        raise ConfigError(f"{override.input_line}: an interval has no end of values; list some, or use range(...)")
    else:
        values = list(override.sweep_string_iterator())
    if not values:
        raise ConfigError(f"{override.input_line} stands for no value at all")
    return [f"{override.key_or_group}={value}" for value in values]


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's reading of overrides. Raises ConfigError naming the one that cannot be read."""
    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(
                f"{text!r} is no override: write key=value, e.g. train.steps=100, or group=option, e.g. model=demo"
            )
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except HydraException as error:
            mapping = "; keys inside {} stand without quotes" if "{'" in text or '{"' in text else ""
            raise ConfigError(
                f"{text!r} cannot be read as key=value: close what is opened, and put a value with blanks, other letters "
                "than a to z, or any of ~ , = : { } [ ] ( ) in quotes that the shell passes on, like \"name='a (b)'\""
                f"{mapping}"
            ) from error
    return parsed


def defaults_of(cls: type) -> dict[str, Any]:
    """A config dataclass' defaults as a nested mapping; "???" marks what has none (OmegaConf's word for missing)."""
    hints = typing.get_type_hints(cls)
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        nested = section(hints[field.name])
        # An optional section without which no run is possible (data) is spelled out; others (ramp_up) stay null.
        named = _holds(hints[field.name], dict)  # sections under names of the user's
        if nested is not None and not named and (field.default is not None or field.name == "data"):
            defaults[field.name] = defaults_of(nested)
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
        else:
            defaults[field.name] = "???"
    return defaults


def section(hint: Any) -> type | None:
    """The dataclass in a field's annotation, if it is one or an optional one."""
    return next(
        (h for h in (hint, *typing.get_args(hint)) if isinstance(h, type) and dataclasses.is_dataclass(h)), None
    )


def groups() -> list[str]:
    """Config groups: the directories of configs/ with a file in them."""
    return sorted({path.parent.name for path in CONFIGS.glob("*/*.yaml")})


def options(group: str) -> list[str]:
    """Choices of a group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _is_file(config_name: str) -> bool:
    return config_name.endswith((".yaml", ".yml")) and Path(config_name).is_file()


def _primary(config_name: str, schema: type) -> str:
    if not _is_file(config_name):
        known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
        name = config_name.removesuffix(".yaml")
        if name not in known:
            raise ConfigError(
                f"--config-name {config_name}: there is no such file, and none in {CONFIGS}, which has {_listed(known)}; the "
                "path of a configuration must end in .yaml"
            )
        return name
    # Defaults first, so that a file from an older version gets the keys that came later.
    node = OmegaConf.merge(OmegaConf.create(defaults_of(schema)), OmegaConf.create(load_yaml(Path(config_name))))
    ConfigStore.instance().store(name=FROM_FILE, node=node)
    return FROM_FILE


def _checked(override: Override, *, whole_file: bool, schema: type) -> str:
    """The override as Hydra shall read it. Refuses unknown groups, options and keys with a suggestion."""
    text, key = str(override.input_line), override.key_or_group
    if override.is_delete():
        raise ConfigError(f"{text}: keys cannot be deleted, only set: write {key}=VALUE without the ~")
    if key.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(f"{text}: Hydra's own settings have no effect here; the run's directory is run_dir=...")
    if "/" in key or override.package is not None:
        raise ConfigError(f"{text}: there is no such config group; groups are {_listed(groups())}")
    plain = text.lstrip("+")
    if key in groups() and schema is RunConfig:
        if whole_file:
            raise ConfigError(
                f"{text}: a whole configuration was given as --config-name, without groups: set single keys"
            )
        _check_option(plain, key, override.value())
        return plain
    # Whether a key is there already makes no difference to users, e.g. inside train.ramp_up, which is null at first.
    return f"++{_check_key(plain, key, override.value(), schema)}"


def _check_option(text: str, group: str, value: Any) -> None:
    known = options(group)
    if not isinstance(value, (str, int, float)):
        raise ConfigError(f"{text}: choose one of {_listed(known)}, or leave {group} out for the default")
    if value not in known:
        close = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {group}={close[0]}?" if close else ""
        raise ConfigError(f"{text}: there is no configs/{group}/{value}.yaml, only {_listed(known)}{hint}")


def _check_key(text: str, key: str, value: Any, schema: type) -> str:
    """The override `text`, quoted where its key takes text and Hydra would read a number: name=2024_05 is no 202405."""
    hint: Any = schema
    path = key.split(".")
    for depth, part in enumerate(path):
        cls = section(hint)
        if cls is None:
            if _holds(hint, dict):  # names inside a mapping are free
                return _as_text(text, value) if str in typing.get_args(hint)[1:] else text
            above = ".".join(path[:depth])
            raise ConfigError(f"unknown key {key!r}: {above} is a value without keys of its own, write {above}=VALUE")
        if _holds(hint, dict):
            hint = cls
            continue
        hints = typing.get_type_hints(cls)
        if part not in hints:
            known = [*hints, *groups()] if depth == 0 and schema is RunConfig else list(hints)
            raise ConfigError(unknown_key(".".join(path[: depth + 1]), part, dict.fromkeys(known)))
        hint = hints[part]
    cls = section(hint)
    if cls is not None and not isinstance(value, dict) and value is not None and not _holds(hint, list):
        names = [field.name for field in dataclasses.fields(cls)]
        raise ConfigError(
            f"{text}: {key} is a section, and there are no files to choose from; set its keys, e.g. {key}.{names[0]}=... "
            f"(it has {_listed(names)})"
        )
    return _as_text(text, value) if _holds(hint, str) else text


def _as_text(text: str, value: Any) -> str:
    """The override `text`, quoted if Hydra would read a number."""
    key, _, written = text.partition("=")
    return f"{key}='{written.strip()}'" if isinstance(value, (int, float)) else text


def _holds(hint: Any, kind: type) -> bool:
    """Whether an annotation is `kind` or an optional one."""
    return any(h is kind or typing.get_origin(h) is kind for h in (hint, *typing.get_args(hint)))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _explain(error: Exception) -> str:
    """A Hydra error's text without its internals."""
    if isinstance(error, InterpolationKeyError):
        key = getattr(error, "full_key", None) or getattr(error, "key", "")
        asked = re.search(r"'(.*)'", str(error))
        what = f"${{{asked[1]}}}, a key that does not exist" if asked else "a key that does not exist"
        return f"{key} refers to {what}: keys are written in full, like ${{parallel.tensor}}"
    noise = (
        "Set the environment variable",
        "See https",
        "full_key:",
        "object_type=",
        "Config search path",
        "provider=",
    )
    kept = [line for line in map(str.strip, str(error).splitlines()) if line and not line.startswith(noise)]
    cause = error.__cause__
    if cause is not None and str(cause) and _first_line(cause) not in " ".join(kept):
        kept.append(_first_line(cause))
    return " ".join(kept)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
