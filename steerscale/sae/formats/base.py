"""What the formats share: a format's description, its configuration file, and files of tensors read by ranges of latents."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from steerscale.errors import CheckpointError, ConfigError
from steerscale.sae.weights import SAEWeights

T = TypeVar("T", int, float, bool, str, dict)

_MISSING: Any = object()
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A public form of an SAE: a directory with certain files."""

    files: tuple[str, ...]
    """What its directories hold; of each one alternative, separated by |."""
    read: Callable[[Path, slice | None], SAEWeights]
    """From a directory, the latents asked for. Raises CheckpointError or ConfigError."""
    write: Callable[[SAEWeights, Path], None]
    """A whole SAE, scales folded, into an empty directory. Raises ConfigError if the format cannot hold it."""

    def matches(self, directory: Path) -> bool:
        """Whether a directory holds all the files."""
        return all(any((directory / name).is_file() for name in names.split("|")) for names in self.files)


class Tensors(Protocol):
    """The tensors of one open file."""

    path: Path

    @property
    def names(self) -> set[str]:
        """Every tensor's name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that is there."""
        ...

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Indices [start, stop) of an axis, all of the others."""
        ...


class LatentReader:
    """Tensors of an SAE in float32; those with an axis of latents cut to the latents asked for."""

    def __init__(self, tensors: Tensors, latents: slice | None, *, name: str, axis: int) -> None:
        """`name`: a tensor whose `axis` counts the latents. Raises CheckpointError without it, ConfigError for bad ranges."""
        self._tensors = tensors
        self.names = tensors.names
        shape = self.shape(name)
        if len(shape) <= axis:
            raise CheckpointError(f"{tensors.path}: {name} must be a matrix, got shape {list(shape)}")
        self.total = shape[axis]
        self.start, self.stop, step = (latents or slice(None)).indices(self.total)
        asked_past = latents is not None and max(latents.start or 0, latents.stop or 0) > self.total
        if step != 1 or self.start >= self.stop or asked_past:
            raise ConfigError(f"{tensors.path} has latents 0 to {self.total}: {latents} is no range of them")

    @property
    def position(self) -> dict[str, Any]:
        """SAEWeights' fields that say which latents these are."""
        part = self.stop - self.start < self.total
        return {"first_latent": self.start, "total_latents": self.total} if part else {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in the file. Raises CheckpointError if it holds no such tensor."""
        if name not in self.names:
            raise CheckpointError(f"{self._tensors.path} has no tensor {name!r}, only {', '.join(sorted(self.names))}")
        return self._tensors.shape(name)

    def whole(self, name: str) -> torch.Tensor:
        """All of a tensor."""
        return self._read(name, 0, 0, (*self.shape(name), 1)[0])

    def latents(self, name: str, axis: int = 0) -> torch.Tensor:
        """The latents asked for. Raises CheckpointError if `axis` has not one index a latent."""
        shape = self.shape(name)
        if len(shape) <= axis or shape[axis] != self.total:
            raise CheckpointError(
                f"{self._tensors.path}: {name} must have {self.total} latents in axis {axis}, got shape {list(shape)}"
            )
        return self._read(name, axis, self.start, self.stop)

    def _read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return self._tensors.read(name, axis, start, stop).float()


class _Safetensors:
    """A safetensors file, mapped into memory: only what is asked for is read."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self._file = file
        self.names = set(file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        tensor = self._file.get_slice(name)
        if tensor.get_dtype() not in _FLOATS:
            raise CheckpointError(f"{self.path}: {name} is of type {tensor.get_dtype()}, expected a float type")
        if not tensor.get_shape():
            return self._file.get_tensor(name)
        return tensor[(slice(None),) * axis + (slice(start, stop),)]


@contextmanager
def open_safetensors(path: Path) -> Iterator[Tensors]:
    """The tensors of a safetensors file. Raises CheckpointError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield _Safetensors(path, file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def write_safetensors(tensors: Mapping[str, torch.Tensor | None], path: Path) -> None:
    """Write the tensors that are there as float32."""
    there = {name: tensor.detach().float().contiguous().cpu() for name, tensor in tensors.items() if tensor is not None}
    path.touch()
    mode = path.stat().st_mode
    save_file(there, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors makes files private


class Fields:
    """The fields of a JSON file, taken by type."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file holds no JSON object."""
        self.path = path
        try:
            self.values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(self.values, dict):
            raise CheckpointError(f"{path} must hold a JSON object, got {type(self.values).__name__}")

    def take(self, key: str, kind: type[T], default: T | None = _MISSING) -> T:
        """The value of `key`; null and absent mean `default`. Raises CheckpointError naming file and field."""
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise CheckpointError(f"{self.path}: the field {key!r} is missing")
            return default  # type: ignore[return-value]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.path}: the field {key!r} must be of type {kind.__name__}, got {value!r}")
        return value

    def refuse(self, key: str, value: Any, hint: str) -> CheckpointError:
        """The error for a value that is not understood."""
        return CheckpointError(f"{self.path}: {key}={value!r} is not supported; {hint}")


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write an object."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def cannot_hold(name: str, weights: SAEWeights, why: str) -> ConfigError:
    """The error for an SAE that a format has no way to express."""
    return ConfigError(f"the {name} format cannot hold this {weights.architecture} SAE: {why}; saelens may")
