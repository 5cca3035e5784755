"""What a user writes under `data:`."""

from dataclasses import dataclass, field

from steerscale.config import require
from steerscale.data.blend import PATTERN

LAST_POSITION = 2**62
"""Positions of samples are int64, and what is left out is added to them."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prepared datasets to train on and how to read them. Give exactly one of `path` and `blend`."""

    path: str | None = None
    """Dataset directory written by `steerscale data prepare`."""
    blend: dict[str, float] | None = None
    """Dataset directory -> weight: its share of the samples, after normalisation. The order of the keys counts."""
    reset_at_document_end: bool = False
    """Restart positions and attention after each document end, so that no token sees the document before its own."""
    mask_document_end: bool = False
    """Leave the first token of each document out of the loss: after a document end it cannot be predicted."""
    random_offset: bool = True
    """Cut the corpus at another offset in every epoch; false: at multiples of model.seq_len, for documents of just that
    length, which then are never cut."""
    skip: list[list[int]] = field(default_factory=list)
    """[start, end) ranges of global sample positions to leave out of training, e.g. around a loss spike."""
    num_prefetch: int = 2
    """Optimizer steps whose micro-batches a background thread prepares ahead; 0: prepare them when they are needed."""

    def __post_init__(self) -> None:
        given = [name for name in ("path", "blend") if getattr(self, name) is not None]
        require(
            len(given) == 1,
            f"exactly one of data.path and data.blend must be given, got {' and '.join(given) or 'neither'}",
        )
        require(self.blend != {}, "data.blend is empty: name at least one dataset directory with its weight")
        for path, weight in (self.blend or {}).items():
            require(0 < weight < float("inf"), f"data.blend[{path!r}] must be positive, got {weight}")
        for path, weight in self.weights.items():
            require(
                weight * PATTERN >= 1,
                f"data.blend[{path!r}] is {weight:.2g} of all weights, below the resolution of 1/{PATTERN}: raise it "
                "or leave the dataset out",
            )
        for index, bounds in enumerate(self.skip):
            require(
                len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= LAST_POSITION,
                f"data.skip[{index}] must be [start, end) with 0 <= start < end <= 2^62, got {bounds}",
            )
        require(self.num_prefetch >= 0, f"data.num_prefetch must be at least 0, got {self.num_prefetch}")

    @property
    def weights(self) -> dict[str, float]:
        """Dataset directory -> share of the samples; the shares sum to 1."""
        weights = self.blend if self.blend is not None else {str(self.path): 1.0}
        total = sum(weights.values())
        return {path: weight / total for path, weight in weights.items()}
