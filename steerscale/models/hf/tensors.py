"""Slices of the tensors in a Hugging Face directory: safetensors in one file or several, nothing pickled."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from steerscale.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}


class TensorFiles:
    """Tensors by name. Files are memory-mapped when first needed; only what is asked for is read."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self._files: dict[str, Any] = {}
        if (directory / SINGLE).is_file():
            self._where = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        elif (directory / INDEX).is_file():
            self._where = _read_index(directory / INDEX)
        elif pickles := sorted(path.name for path in directory.glob("*.bin")):
            raise CheckpointError(
                f"{directory} holds pickled weights only ({pickles[0]}), which can run code when loaded: load and save "
                f"them once with transformers' save_pretrained, which writes {SINGLE}"
            )
        else:
            raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}")

    @property
    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, *slices: slice) -> torch.Tensor:
        """Part of a tensor, on the CPU in the file's type. Raises CheckpointError if that is no floating-point type."""
        tensor = self._slice(name)
        if tensor.get_dtype() not in _FLOATS:
            raise CheckpointError(f"{self.directory}: {name} is of type {tensor.get_dtype()}, expected a float type")
        return tensor[slices]

    def _slice(self, name: str) -> Any:
        try:
            return self._open(self._where[name]).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.directory / self._where[name]} does not hold {name}: {error}") from error

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = self._stack.enter_context(safe_open(self.directory / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.directory / file} cannot be read: {error}") from error
        return self._files[file]


@contextmanager
def open_tensors(directory: Path) -> Iterator[TensorFiles]:
    """The tensors of a directory. Raises CheckpointError if it has no safetensors."""
    with ExitStack() as stack:
        yield TensorFiles(directory, stack)


def _read_index(path: Path) -> dict[str, str]:
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(Path(file).name == file for file in where.values()):
            raise ValueError("weight_map must name files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return where
