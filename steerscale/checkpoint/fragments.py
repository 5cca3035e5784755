"""The format: every rank writes the fragments of whole parameters that it owns, any layout reads what any layout wrote.

A checkpoint holds, for each parameter of the whole model, float32 tensors of several *kinds* ("weight", "exp_avg",
"exp_avg_sq"). A rank owns a `Box` of a parameter (tensor parallelism) and of that, flattened, a range (the distributed
optimizer). Such a *fragment* is one flat tensor in the rank's safetensors file; `index.json` says where each lies. Reading
asks for a range of a box and gets it assembled from whatever fragments overlap it.

Why not Megatron-Core's `dist_checkpointing`: its files hold pickles, each save starts processes, and an optimizer's state can
be read only by an optimizer of the same kind. This form is data alone, is the same for every engine, and survives upgrades.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from steerscale.checkpoint.integrity import INDEX
from steerscale.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A flat piece of one whole parameter's tensor of one kind."""

    kind: str
    """"weight", "exp_avg" or "exp_avg_sq"."""
    name: str
    """Global name of the parameter."""
    whole_shape: tuple[int, ...]
    """Shape of the whole parameter."""
    offset: tuple[int, ...]
    """Where the box begins in the whole parameter."""
    shape: tuple[int, ...]
    """Shape of the box."""
    start: int
    """First element in the flattened box."""
    data: torch.Tensor
    """The elements, float32 [n]."""


class _Place(NamedTuple):
    """Where a fragment was written."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int
    file: str
    key: str


def write_fragments(fragments: Iterable[Fragment], path: Path) -> list[dict[str, Any]]:
    """Write one rank's fragments to `path`; returns their index entries."""
    tensors, entries = {}, []
    for number, fragment in enumerate(fragments):
        key = f"{fragment.kind}/{fragment.name}/{number}"
        tensors[key] = fragment.data.detach().contiguous()
        entries.append(
            {
                "kind": fragment.kind,
                "name": fragment.name,
                "whole_shape": fragment.whole_shape,
                "offset": fragment.offset,
                "shape": fragment.shape,
                "start": fragment.start,
                "stop": fragment.start + fragment.data.numel(),
                "file": path.name,
                "key": key,
            }
        )
    save_file(tensors, path)
    return entries


def write_index(entries: Iterable[dict[str, Any]], directory: Path) -> None:
    """Write the index of all ranks' entries."""
    (directory / INDEX).write_text(json.dumps(list(entries)), encoding="utf-8")


class FragmentReader:
    """Reads ranges of boxes from a checkpoint directory; opens only the files it needs."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError if the index is unreadable."""
        self.directory = directory
        self._places: dict[tuple[str, str], list[_Place]] = defaultdict(list)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        try:
            entries = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            for entry in entries:
                offset, shape = tuple(entry["offset"]), tuple(entry["shape"])
                # A bare name: an index from elsewhere must not reach outside the checkpoint.
                file = Path(entry["file"]).name
                place = _Place(offset, shape, entry["start"], entry["stop"], file, entry["key"])
                self._places[entry["kind"], entry["name"]].append(place)
                self.shapes[entry["name"]] = tuple(entry["whole_shape"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory / INDEX} cannot be read: {error}") from error

    @property
    def names(self) -> list[tuple[str, str]]:
        """(kind, parameter) of everything that is there."""
        return list(self._places)

    def read(
        self,
        kind: str,
        name: str,
        *,
        offset: Sequence[int],
        shape: Sequence[int],
        start: int = 0,
        stop: int | None = None,
        whole_shape: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Elements [start, stop) of the flattened box at `offset` of parameter `name`: float32 [stop - start].

        Raises CheckpointError if the checkpoint does not hold all of them, or the parameter is not of `whole_shape`.
        """
        offset, shape = tuple(offset), tuple(shape)
        stop = prod(shape) if stop is None else stop
        places = self._places.get((kind, name))
        if not places:
            raise CheckpointError(f"{self.directory} holds no {kind} of parameter {name!r}: it is of another model")
        if whole_shape is not None and tuple(whole_shape) != self.shapes[name]:
            raise CheckpointError(
                f"{self.directory} holds {name!r} with shape {list(self.shapes[name])}, "
                f"the model has {list(whole_shape)}: it is of another model"
            )
        same_box = [place for place in places if (place.offset, place.shape) == (offset, shape)]
        if same_box:
            return self._assemble(same_box, start, stop, what=f"{kind} of {name}")
        return self._intersect(places, offset, shape, what=f"{kind} of {name}").reshape(-1)[start:stop]

    def _assemble(self, places: list[_Place], start: int, stop: int, *, what: str) -> torch.Tensor:
        """A range of one saved box from its fragments, which tile it."""
        out = torch.empty(stop - start, dtype=torch.float32)
        filled = 0
        for place in places:
            low, high = max(start, place.start), min(stop, place.stop)
            if low < high:
                data = self._open(place.file).get_slice(place.key)
                out[low - start : high - start] = data[low - place.start : high - place.start]
                filled += high - low
        if filled != stop - start:
            raise CheckpointError(f"{self.directory} is incomplete: {filled} of {stop - start} elements of {what}")
        return out

    def _intersect(
        self, places: list[_Place], offset: tuple[int, ...], shape: tuple[int, ...], *, what: str
    ) -> torch.Tensor:
        """A box put together from all saved boxes that overlap it: what happens when the layout has changed."""
        out = torch.empty(shape, dtype=torch.float32)
        boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[_Place]] = defaultdict(list)
        for place in places:
            boxes[place.offset, place.shape].append(place)
        filled = 0
        for (saved_offset, saved_shape), parts in boxes.items():
            low = [max(a, b) for a, b in zip(offset, saved_offset)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, saved_offset, saved_shape)]
            if any(a >= b for a, b in zip(low, high)):
                continue
            saved = self._assemble(parts, 0, prod(saved_shape), what=what).reshape(saved_shape)
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, saved_offset))
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset))
            out[target] = saved[source]
            filled += prod(b - a for a, b in zip(low, high))
        if filled != prod(shape):
            raise CheckpointError(
                f"{self.directory} holds {filled} of {prod(shape)} elements of {what} at {offset}: another model's shape?"
            )
        return out

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.directory / file, framework="pt")
            except Exception as error:
                raise CheckpointError(f"{self.directory / file} cannot be read: {error}") from error
        return self._files[file]
