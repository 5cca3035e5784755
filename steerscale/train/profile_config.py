"""What a user writes under `profile:`. Torch-free."""

from dataclasses import dataclass, field

from steerscale.config import require


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Traces of single optimizer steps, for TensorBoard and `steerscale profile` (docs/profiling.md)."""

    steps: list[int] = field(default_factory=list)
    """Optimizer steps to trace, counted from 1; empty: none. A traced step is slower, and its time does not count."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Global ranks that write traces."""
    shapes: bool = True
    """Write down the operands' shapes: what the FLOP/s of matrix products are computed from."""
    stacks: bool = False
    """Write down Python's call stacks as well: large files, and Python looks slower than it is."""
    memory: bool = False
    """On CUDA, also write a page with every allocation of the step; on CPU, the trace counts memory."""

    def __post_init__(self) -> None:
        require(
            all(step >= 1 for step in self.steps),
            f"profile.steps count from 1, got {self.steps}: leave out what is below",
        )
        require(all(rank >= 0 for rank in self.ranks), f"profile.ranks must not be negative, got {self.ranks}")
        require(
            not self.steps or bool(self.ranks), "profile.ranks must not be empty where profile.steps has steps to trace"
        )

    def check(self, *, steps: int, ranks: int) -> None:
        """Whether a run of so many steps and ranks has what is to be traced. Raises ConfigError if not."""
        late = [step for step in self.steps if step > steps]
        require(not late, f"profile.steps={late} will never come: the run ends at train.steps={steps}")
        absent = [rank for rank in self.ranks if rank >= ranks]
        require(not (self.steps and absent), f"profile.ranks={absent}: there are ranks 0 to {ranks - 1} in this layout")
