"""What a user writes under `checkpoint:`. Torch-free."""

from dataclasses import dataclass

from steerscale.config import require


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to write checkpoints and how many to keep."""

    interval: int = 1000
    """Steps between checkpoints; the end of a run and a stop signal write one as well."""
    at_end: bool = True
    """Write a checkpoint after the last step; false: where only throughput is measured."""
    keep: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: int | None = None
    """Also keep, for good, those whose step is a multiple of this."""
    asynchronous: bool = False
    """Copy the state aside and write it on a thread while training goes on; needs host memory for one copy."""
    verify: bool = True
    """Check SHA-256 sums before a checkpoint is used (sizes are always checked)."""

    def __post_init__(self) -> None:
        require(self.interval > 0, f"checkpoint.interval must be positive, got {self.interval}")
        require(self.keep >= 0, f"checkpoint.keep must not be negative, got {self.keep}")
        require(
            self.keep_every is None or self.keep_every > 0,
            f"checkpoint.keep_every must be positive or null, got {self.keep_every}",
        )
