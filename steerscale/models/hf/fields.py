"""Reading a config.json so that nothing in it goes unnoticed."""

import json
from pathlib import Path
from typing import Any, TypeVar

from steerscale.errors import ConfigError

T = TypeVar("T", int, float, bool, str)

_MISSING: Any = object()

_HARMLESS = {
    "_attn_implementation_autoset",
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_llama_config",
    "label2id",
    "n_ctx",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}
"""Where a model comes from, how to run it, special tokens, other tasks: nothing that changes the logits."""


class ConfigFields:
    """The fields of a config.json, each taken by whoever understands it; `finish` refuses those that nobody took."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file cannot be read."""
        self.path = path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; is this a Hugging Face model directory?") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a JSON object, got {type(values).__name__}")
        self._values: dict[str, Any] = values
        self._taken: set[str] = {"model_type", *_HARMLESS}

    def raw(self, key: str) -> Any:
        """The value as it is, or None; counts as understood."""
        self._taken.add(key)
        return self._values.get(key)

    def take(self, key: str, kind: type[T], default: T | None = _MISSING) -> T:
        """The value of `key`, of type `kind`; null and absent mean `default`. Raises ConfigError naming the field."""
        value = self.raw(key)
        if value is None:
            if default is _MISSING:
                raise ConfigError(f"{self.path}: the field {key!r} is missing")
            return default  # type: ignore[return-value]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.path}: the field {key!r} must be of type {kind.__name__}, got {value!r}")
        return value

    def expect(self, key: str, value: T) -> None:
        """Refuse any other value of `key` than `value`; absent is as good."""
        got = self.take(key, type(value), value)
        if got != value:
            raise self.unsupported(key, got, f"only {value!r} is")

    def unsupported(self, key: str, value: Any, hint: str) -> ConfigError:
        """The error for a field whose value we do not have."""
        return ConfigError(f"{self.path}: {key}={value!r} is not supported; {hint}")

    def finish(self) -> None:
        """Refuse fields that nobody took and that are not off (null, false, 0, empty): they could change the model."""
        for key, value in self._values.items():
            if key not in self._taken and value:
                raise self.unsupported(key, value, "this field is not understood (only null or false would be ignored)")
