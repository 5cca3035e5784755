"""Where our parameters lie in a Hugging Face directory: one table for import and export.

A whole parameter of ours (see `parallel.shards`) is rows of file tensors, one after the other: Megatron-Core's fused QKV
matrix is, for each key/value group, the group's query heads, its key head and its value head; a gated MLP's first matrix is
[gate; up]; the embedding ends in padding that no file holds. Import reads the rows that a rank needs, export puts them back.
Torch-free.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steerscale.models.config import ModelConfig
from steerscale.models.hf.fields import ConfigFields


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file tensor."""

    source: str | None
    """Name of the file tensor; None: padding, zeros that are in no file."""
    start: int
    """First row in the file tensor."""
    rows: int
    """Number of rows."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole parameter as pieces, in the order of its rows."""

    pieces: tuple[Piece, ...]
    columns: int | None = None
    """Extent of dimension 1; None for vectors."""
    transposed: bool = False
    """The file keeps matrices as [in, out] (GPT-2's Conv1D): rows of ours are columns there."""
    longer: bool = False
    """The file tensor may have more rows than are used (a position table)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        rows = sum(piece.rows for piece in self.pieces)
        return (rows,) if self.columns is None else (rows, self.columns)

    def source_rows(self) -> dict[str, int]:
        """Rows of each file tensor that are used; they begin at 0."""
        rows: dict[str, int] = {}
        for piece in self.pieces:
            if piece.source is not None:
                rows[piece.source] = max(rows.get(piece.source, 0), piece.start + piece.rows)
        return rows

    def renamed(self, rename: Callable[[str], str]) -> "Recipe":
        """The same with other names of file tensors."""
        pieces = tuple(
            piece if piece.source is None else dataclasses.replace(piece, source=rename(piece.source))
            for piece in self.pieces
        )
        return dataclasses.replace(self, pieces=pieces)


def plain(source: str, rows: int, columns: int | None = None, *, transposed: bool = False) -> Recipe:
    """A parameter that is one file tensor."""
    return Recipe(pieces=(Piece(source, 0, rows),), columns=columns, transposed=transposed)


def vocabulary(source: str, model: ModelConfig) -> Recipe:
    """Token embedding or head: a row for each token, then padding."""
    padding = Piece(None, 0, model.padded_vocab - model.tokens)
    pieces = (Piece(source, 0, model.tokens), *([padding] if padding.rows else []))
    return Recipe(pieces=pieces, columns=model.d_model)


def fused_qkv(
    model: ModelConfig,
    query: tuple[str, int],
    key: tuple[str, int],
    value: tuple[str, int],
    *,
    columns: int | None = None,
    transposed: bool = False,
) -> Recipe:
    """Megatron-Core's QKV from the (file tensor, first row) of the queries, keys and values of all heads."""
    width, per_group = model.head_width, model.num_heads // model.kv_groups
    pieces: list[Piece] = []
    for group in range(model.kv_groups):
        pieces.append(Piece(query[0], query[1] + group * per_group * width, per_group * width))
        pieces.extend(Piece(source, start + group * width, width) for source, start in (key, value))
    return Recipe(pieces=tuple(pieces), columns=columns, transposed=transposed)


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of Hugging Face transformers that our GPT can be."""

    architecture: str
    """The class that loads it, as in config.json's `architectures`."""
    prefix: str
    """Prefix of the base model's tensors; files of the base model alone lack it."""
    ignored: re.Pattern[str]
    """Tensors in files that hold no parameters: masks and tables that old versions saved."""
    read_config: Callable[[ConfigFields], ModelConfig]
    """ModelConfig of a config.json. Raises ConfigError for what we cannot be."""
    write_config: Callable[[ModelConfig], dict[str, Any]]
    """config.json of a model that meets every requirement."""
    requirements: Callable[[ModelConfig], dict[str, bool]]
    """What the family demands of a model, in words -> whether it is met."""
    recipes: Callable[[ModelConfig], dict[str, Recipe]]
    """Every whole parameter by its global name, in the order in which they are written."""
