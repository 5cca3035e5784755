"""Fields of a JSON object, each taken once with its type and range checked; what nobody took is an error."""

import json
from typing import Any, TypeVar

from steerscale.serve.errors import RequestError

Number = TypeVar("Number", float, None)


class Fields:
    """The object of a request. Null stands for a field that is not there."""

    def __init__(self, body: bytes) -> None:
        """Raises RequestError unless `body` is a JSON object."""
        try:
            # NaN and Infinity are no JSON, though Python reads them.
            values = json.loads(body, parse_constant=_refuse)
            # JSON can write halves of characters, which no text consists of.
            json.dumps(values, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body must be a JSON object: {error}", code="invalid_json") from error
        if not isinstance(values, dict):
            raise RequestError(f"the body must be a JSON object, it is {_kind(values)}", code="invalid_json")
        self._values: dict[str, Any] = values

    def take(self, name: str) -> Any:
        """Whatever is there; None if nothing."""
        return self._values.pop(name, None)

    def number(self, name: str, default: Number, *, least: float, most: float) -> float | Number:
        """A finite number from `least` to `most`."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(name, "a number", value)
        if not least <= value <= most:
            raise RequestError(f"{name} must be from {least:g} to {most:g}, got {_shown(value)}", param=name)
        return float(value)

    def integer(self, name: str, *, least: int, most: int) -> int | None:
        """An integer from `least` to `most`, or None."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(name, "an integer", value)
        if not least <= value <= most:
            raise RequestError(f"{name} must be from {least} to {most}, got {_shown(value)}", param=name)
        return value

    def boolean(self, name: str) -> bool:
        """True or false, false if it is not there."""
        value = self.take(name)
        if not isinstance(value, bool | None):
            raise wrong_type(name, "true or false", value)
        return bool(value)

    def text(self, name: str) -> str | None:
        """A string, or None."""
        value = self.take(name)
        if not isinstance(value, str | None):
            raise wrong_type(name, "a string", value)
        return value

    def unsupported(self, name: str, *neutral: Any) -> None:
        """A field that only values without effect are taken for."""
        value = self.take(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
            raise RequestError(
                f"{name} is not supported here: leave it out, got {_shown(value)}",
                param=name,
                code="unsupported_parameter",
            )

    def end(self) -> None:
        """Raises RequestError if a field is left."""
        if self._values:
            name = next(iter(self._values))
            raise RequestError(f"unknown field {_shown(name)}", param=name[:100], code="unknown_parameter")


def wrong_type(name: str, expected: str, value: Any) -> RequestError:
    """The error for a value of another type."""
    return RequestError(f"{name} must be {expected}, it is {_kind(value)}", param=name, code="invalid_type")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:  # an integer with thousands of digits
        return "a number too long to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
