"""What the training loop needs to know of what it trains: a GPT, or SAEs on its activations the same way."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from steerscale.checkpoint.fragments import Fragment, FragmentReader
from steerscale.engines.base import StepResult, Timer
from steerscale.errors import CheckpointError
from steerscale.parallel.layout import ParallelLayout


class Task(Protocol):
    """A model, its optimizer and its data, ready to train. All ranks call every method together."""

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """What takes long before the first step of a start. `should_stop` is asked as often on all ranks; True ends it."""
        ...

    def micro_batches(self, consumed_samples: int, num_micro_batches: int) -> Sequence[Any]:
        """This replica's part of the step that begins after `consumed_samples` samples."""
        ...

    def train_step(
        self, micro_batches: Sequence[Any], *, step: int, lr: float, extra: tuple[float, ...], timer: Timer
    ) -> StepResult:
        """Optimizer step number `step`, counted from 0; see `engines.megatron.MegatronEngine.train_step`."""
        ...

    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        """Measurements on held-out data, on every rank alike; empty where there is none or a stop was asked for."""
        ...

    def throughput(self, seconds: float, layout: ParallelLayout) -> dict[str, float | None]:
        """What one iteration of `seconds` on `layout` (with the batch it really had) achieved."""
        ...

    def describe(self) -> str:
        """What is trained, in a line."""
        ...

    def consumed(self) -> int:
        """This rank's part of the hash of all samples consumed so far; the ranks' parts are added."""
        ...

    def fragments(self) -> list[Fragment]:
        """This rank's part of the tensors of a checkpoint."""
        ...

    def state(self) -> dict[str, Any]:
        """The rest of a checkpoint, as JSON: what is trained under "model", and whatever else a resume needs."""
        ...

    def resume(self, state: dict[str, Any], reader: FragmentReader, *, applied_steps: int, consumed_hash: int) -> None:
        """Go on from a checkpoint of any layout. Raises CheckpointError if it is of something else."""
        ...

    def close(self) -> None:
        """Stop background work and let go of the model."""
        ...


def check_same(there: Mapping[str, Any], here: Mapping[str, Any], *, at: str, free: Collection[str] = ()) -> None:
    """Raise CheckpointError if a checkpoint's description of what it holds differs from what is trained here.

    `at` is the dotted key of both. Keys in `free` may differ, and keys
    that a later version added are not held against an older checkpoint.
    """
    differing = [key for key, value in there.items() if here.get(key) != value and key not in free]
    if differing:
        listed = ", ".join(f"{at}.{key}: {there[key]} there, {here.get(key)} here" for key in differing)
        raise CheckpointError(f"the checkpoint is of another model ({listed}): choose another run_dir or name")
