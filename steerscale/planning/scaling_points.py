"""Trained models as points of a scaling law: parameters, tokens, loss. Read from a csv file, checked before any fit."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steerscale.errors import DataError
from steerscale.planning.scaling_laws import FLOPS_PER_PARAMETER_AND_TOKEN

COLUMNS: dict[str, tuple[str, ...]] = {
    "parameters": ("parameters", "params", "n", "model size"),
    "tokens": ("tokens", "d"),
    "flops": ("flops", "flop", "c", "training flop", "training flops"),
    "loss": ("loss",),
    "name": ("name", "run"),
    "tokenizer": ("tokenizer",),
    "data": ("data", "dataset"),
}
"""Names of a column, in any case. Of parameters, tokens and flops two are enough: C = 6 N D."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One trained model, or one model at one moment of its training."""

    parameters: float
    tokens: float
    loss: float
    """Nats a token, on held-out text."""
    name: str = ""
    tokenizer: str | None = None
    """What tells tokenizers apart; None: not known."""
    data: str | None = None
    """What tells the texts apart that it was trained and evaluated on; None: not known."""

    @property
    def flops(self) -> float:
        """6 N D."""
        return FLOPS_PER_PARAMETER_AND_TOKEN * self.parameters * self.tokens


def read_points(path: Path) -> list[Point]:
    """The points of a csv file with a header. Raises DataError naming line and column for anything that is no point."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(line for line in file if not line.startswith("#"))
            columns = _columns(path, reader.fieldnames or [])
            return [_point(path, number, row, columns) for number, row in enumerate(reader, start=1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as csv: {error}") from error


def _columns(path: Path, header: Sequence[str]) -> dict[str, str]:
    found = {}
    for key, names in COLUMNS.items():
        matching = [name for name in header if name.strip().lower() in names]
        if len(matching) > 1:
            raise DataError(f"{path} has several columns for {key}: {', '.join(matching)}; keep one")
        if matching:
            found[key] = matching[0]
    if "loss" not in found or len({"parameters", "tokens", "flops"} & set(found)) < 2:
        raise DataError(
            f"{path} needs a column loss and two of parameters, tokens and flops; its header is "
            f"{', '.join(header) or 'empty'}"
        )
    return found


def _point(path: Path, number: int, row: dict[str, str], columns: dict[str, str]) -> Point:
    values: dict[str, float] = {}
    for key in ("parameters", "tokens", "flops", "loss"):
        if key not in columns:
            continue
        text = row[columns[key]]
        try:
            value = float(text)
        except (TypeError, ValueError):
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise DataError(
                f"{path}, row {number}: {columns[key]} must be a positive number, got {text!r}; leave out what diverged"
            )
        values[key] = value
    if "tokens" not in values:
        values["tokens"] = values["flops"] / (FLOPS_PER_PARAMETER_AND_TOKEN * values["parameters"])
    elif "parameters" not in values:
        values["parameters"] = values["flops"] / (FLOPS_PER_PARAMETER_AND_TOKEN * values["tokens"])
    return Point(
        parameters=values["parameters"],
        tokens=values["tokens"],
        loss=values["loss"],
        name=row[columns["name"]] if "name" in columns else f"row {number}",
        tokenizer=(row[columns["tokenizer"]] if "tokenizer" in columns else None) or None,
        data=(row[columns["data"]] if "data" in columns else None) or None,
    )


def check_points(points: Sequence[Point], *, needed: int, purpose: str) -> None:
    """Whether a fit of `needed` points or more makes sense. Raises DataError saying what is wrong."""
    for point in points:
        for key in ("parameters", "tokens", "loss", "flops"):
            value = getattr(point, key)
            if not (math.isfinite(value) and value > 0):
                raise DataError(f"{point.name}: {key} must be a positive number, got {value}; leave out what diverged")
    for key, what in (("tokenizer", "tokenizers"), ("data", "datasets")):
        first = {value: point.name for point in reversed(points) if (value := getattr(point, key)) is not None}
        if len(first) > 1:
            listed = ", ".join(f"{name} ({value[:12]})" for value, name in reversed(first.items()))
            raise DataError(
                f"losses in nats a token of different {what} cannot be compared: {listed}; fit the runs of one {what[:-1]}"
            )
    if len(points) < needed:
        raise DataError(f"{purpose} needs at least {needed} points, got {len(points)}")


def without_highest(points: Sequence[Point], count: int) -> list[Point]:
    """All but the `count` points of highest loss, in their order: outliers early in training, as Besiroglu et al. leave out."""
    if not 0 <= count < max(len(points), 1):
        raise DataError(f"--drop-highest must be between 0 and {len(points) - 1} for {len(points)} points, got {count}")
    dropped = sorted(range(len(points)), key=lambda index: -points[index].loss)[:count]
    return [point for index, point in enumerate(points) if index not in set(dropped)]
