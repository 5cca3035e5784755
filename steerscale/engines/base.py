"""What every engine can do, and what it reports: the loop and the tasks know no more of an engine than this."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from steerscale.checkpoint.fragments import Fragment, FragmentReader
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.shards import Shard

Forward = Callable[[Any, torch.nn.Module], tuple[torch.Tensor, Callable]]
"""(micro-batch, model chunk) -> (output, loss function of the output), as Megatron-Core's schedules want it.

The loss function returns (sum of losses, number of tokens, tensor to report).
"""


Timer = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Totals:
    """Sums over a whole global batch; on every rank alike."""

    loss_sum: float
    tokens: int
    reported: tuple[float, ...] = ()
    """What the loss function reported beside these two."""
    extra: tuple[float, ...] = ()
    """The caller's own numbers, summed over all ranks."""

    @property
    def loss(self) -> float:
        """Mean loss a token, in nats."""
        return self.loss_sum / self.tokens if self.tokens else math.nan


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    totals: Totals
    grad_norm: float
    applied: bool
    """False when a loss or gradient was not finite: parameters and optimizer state are as before."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The task's own measurements of this step."""
    loss_scale: float = 1.0
    """What losses were multiplied with (fp16)."""


class Engine(Protocol):
    """Forward and backward over micro-batches, clipping, AdamW, and their state. All ranks call every method together."""

    context: ParallelContext

    @property
    def shards(self) -> Sequence[tuple[Shard, torch.nn.Parameter]]:
        """Every parameter of this rank with its place in the whole model."""
        ...

    @property
    def unwrapped(self) -> Sequence[torch.nn.Module]:
        """This rank's part of the model, as it was given."""
        ...

    def train_step(
        self,
        micro_batches: Sequence[Any],
        forward: Forward,
        *,
        lr: float,
        extra: tuple[float, ...] = (),
        timer: Timer = ...,
    ) -> StepResult:
        """One optimizer step over this replica's `micro_batches`; `extra` is summed over all ranks into the totals."""
        ...

    def evaluate(self, micro_batches: Sequence[Any], forward: Forward) -> Totals:
        """Losses over this replica's `micro_batches`, summed over all replicas; nothing is changed."""
        ...

    def seed_dropout(self, seed: int) -> None:
        """Seed this step's dropout."""
        ...

    def fragments(self) -> list[Fragment]:
        """This rank's part of the state, for a checkpoint."""
        ...

    def load(self, reader: FragmentReader, *, optimizer_steps: int) -> None:
        """Take over the state of a checkpoint, whatever layout or engine wrote it."""
        ...

    def state(self) -> dict[str, Any]:
        """What else a resume by the same engine needs, as JSON; the same on every rank."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take that over; of another engine's there is nothing to take."""
        ...

    def adopt_weights(self) -> None:
        """Take over parameters that were changed from outside, where the optimizer has a copy of its own (fp32 only)."""
        ...

    def whole(self) -> AbstractContextManager[Any]:
        """A context in which every parameter of this rank is there in its local shape (ZeRO-3 keeps but a part of each)."""
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...


def add_up(
    reports: Sequence[torch.Tensor], extra: tuple[float, ...], *, context: ParallelContext, num_reported: int
) -> Totals:
    """Sum micro-batches' reports and the caller's own numbers over all ranks: a world all-reduce of that many doubles.

    Args:
        reports: by micro-batch, [sum of losses, tokens, *reported]; empty but on the last stage.
    """
    # Doubles: token counts and hash parts of a thousand ranks stay exact.
    own = 2 + num_reported
    sums = torch.zeros(own + len(extra), dtype=torch.float64, device=context.device)
    if reports and context.counts_once:
        sums[:own] = torch.stack(list(reports)).double().sum(dim=0)
    if extra:
        sums[own:] = torch.tensor(extra, dtype=torch.float64)
    dist.all_reduce(sums, group=context.world)
    loss_sum, tokens, *rest = sums.tolist()
    return Totals(
        loss_sum=loss_sum,
        tokens=int(tokens) if math.isfinite(tokens) else 0,
        reported=tuple(rest[:num_reported]),
        extra=tuple(rest[num_reported:]),
    )
