"""Plain mappings (YAML) <-> frozen dataclasses, strictly.

Hydra composes YAML; workers read the resolved `config.yaml` of a run directory. Both come through `from_mapping`, the
one place that decides what a valid configuration looks like: unknown keys are refused with a suggestion, values are
checked against the field's annotation, and each dataclass checks its own values in `__post_init__`.

Supported annotations: bool, int, float, str, `Literal[...]`, `X | None`, `list[X]`, `dict[str, X]` and dataclasses.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from steerscale.errors import ConfigError

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], *, at: str = "") -> T:
    """Build the dataclass `cls` from a nested mapping; `at` is the dotted key of `values` itself, for error texts.

    Raises ConfigError for unknown keys, missing keys and values of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{at or 'the configuration'} must be a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(unknown_key(_join(at, str(key)), str(key), fields))
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], _join(at, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(at, name)} is missing: set it in a config file or as {_join(at, name)}=VALUE")
    return cls(**arguments)


def to_mapping(config: Any) -> dict[str, Any]:
    """The nested plain mapping of a config dataclass; `from_mapping` reads it back."""
    return dataclasses.asdict(config)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises ConfigError if it cannot be read or is not a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a YAML mapping, got {type(content).__name__}")
    return content


def dump_yaml(config: Any) -> str:
    """YAML text of a config dataclass, keys in the order of their definition."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)


def unknown_key(where: str, key: str, known: typing.Iterable[str]) -> str:
    """Text for an unknown key, with the nearest known one as a suggestion."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key {where!r}: {hint}"


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless `condition` holds: for the checks in `__post_init__`."""
    if not condition:
        raise ConfigError(message)


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def _convert(hint: Any, value: Any, at: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (option,) = (option for option in typing.get_args(hint) if option is not type(None))
        return _convert(option, value, at)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            listed = " | ".join(map(str, choices))
            raise ConfigError(f"{at} must be one of {listed}, got {value!r}")
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{at} must be a list, got {value!r}")
        (item,) = typing.get_args(hint)
        return [_convert(item, entry, f"{at}[{index}]") for index, entry in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{at} must be a mapping, got {value!r}")
        _, item = typing.get_args(hint)
        return {str(key): _convert(item, entry, _join(at, str(key))) for key, entry in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, at=at)  # type: ignore[arg-type]
    return _scalar(hint, value, at)


def _scalar(hint: Any, value: Any, at: str) -> Any:
    # YAML 1.1 reads 1e-4 as a string (no dot), and people write it; bool is an int in Python, and nobody means that.
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except ValueError:
            pass
        except OverflowError:
            raise ConfigError(f"{at} must be a finite number, got {value!r}") from None
        else:
            # No setting of ours means anything at infinity, and comparisons with nan would let it through checks.
            if math.isfinite(number):
                return number
            raise ConfigError(f"{at} must be a finite number, got {value!r}")
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{at} must be {_spoken(hint)}, got {value!r}")


def _spoken(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))
