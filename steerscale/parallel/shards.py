"""How a rank's parameter relates to the whole one, independent of any model.

The *whole* form of a parameter is that of a single process: its global name and its full shape. Tensor parallelism cuts along
one dimension; a gated MLP's first matrix is cut in both of its halves, [gate; up], so that a rank holds [gate_r; up_r].
Everything that crosses layouts (initial weights, checkpoints, other formats, comparisons) goes through this form.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangular region of a whole parameter, and where it lies in the flattened local one."""

    offset: tuple[int, ...]
    """First index in the whole parameter, by dimension."""
    shape: tuple[int, ...]
    """Extent by dimension."""
    start: int
    """First element in the flattened local parameter; the box is contiguous there."""

    @property
    def stop(self) -> int:
        """One past its last element in the flattened local parameter."""
        return self.start + prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """How one local parameter relates to the whole one."""

    name: str
    """Global name."""
    dim: int | None
    """Dimension that tensor parallelism cuts; None: every tensor rank holds the whole."""
    halves: int = 1
    """1, or 2 for a gated MLP's [gate; up]."""
    duplicate: bool = False
    """A further copy of a parameter that another stage owns (the head's copy of a tied embedding)."""

    def whole_shape(self, local: Sequence[int], *, size: int) -> tuple[int, ...]:
        """Shape of the whole from the local one."""
        return tuple(extent * size if axis == self.dim else extent for axis, extent in enumerate(local))

    def take(self, whole: torch.Tensor, *, rank: int, size: int) -> torch.Tensor:
        """The part of tensor rank `rank` of `size` (a view where possible)."""
        if self.dim is None or size == 1:
            return whole
        parts = [half.chunk(size, dim=self.dim)[rank] for half in whole.chunk(self.halves, dim=self.dim)]
        return parts[0] if self.halves == 1 else torch.cat(parts, dim=self.dim)

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole from the parts of all tensor ranks, in rank order."""
        if self.dim is None or len(parts) == 1:
            return parts[0]
        halves = [part.chunk(self.halves, dim=self.dim) for part in parts]
        return torch.cat([half[index] for index in range(self.halves) for half in halves], dim=self.dim)

    def boxes(self, local: Sequence[int], *, rank: int, size: int) -> Iterator[Box]:
        """The regions of the whole that tensor rank `rank` of `size` holds, in the order of its flattened parameter."""
        if self.dim is None or size == 1:
            yield Box(offset=(0,) * len(local), shape=tuple(local), start=0)
            return
        extent = local[self.dim] // self.halves
        shape = tuple(extent if axis == self.dim else length for axis, length in enumerate(local))
        for half in range(self.halves):
            # Halves exist along dimension 0 only, so each is contiguous in the flattened parameter.
            offset = [0] * len(local)
            offset[self.dim] = (half * size + rank) * extent
            yield Box(offset=tuple(offset), shape=shape, start=half * prod(shape))


def seed_of(seed: int, name: str) -> int:
    """Seed of a whole parameter's initial values: of the run's seed and the parameter's name, whatever the layout."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # generators take 63 bits
