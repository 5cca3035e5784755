"""What the training loop needs to know of what it trains: a GPT now, an SAE on its activations the same way."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from steerscale.engines.megatron import MegatronEngine
from steerscale.parallel.layout import ParallelLayout


class Task(Protocol):
    """A model and its data, ready to train."""

    engine: MegatronEngine

    def micro_batches(self, consumed_samples: int, num_micro_batches: int) -> Sequence[Any]:
        """This replica's part of the step that begins after `consumed_samples` samples."""
        ...

    def forward(self, micro_batch: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        """Run a micro-batch through a model chunk; see `engines.megatron.Forward`."""
        ...

    def evaluate(self, should_stop: Callable[[], bool]) -> dict[str, float]:
        """Measurements on held-out data, on every rank alike; empty where there is none or a stop was asked for."""
        ...

    def throughput(self, seconds: float, layout: ParallelLayout) -> dict[str, float | None]:
        """What one iteration of `seconds` on `layout` (with the batch it really had) achieved."""
        ...

    def consumed(self) -> int:
        """This rank's part of the hash of all samples consumed so far; the ranks' parts are added."""
        ...

    def resume(self, consumed_hash: int) -> None:
        """Continue the hash of a checkpoint."""
        ...

    def close(self) -> None:
        """Stop background work."""
        ...
