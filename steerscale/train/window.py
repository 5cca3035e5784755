"""What the loop measures between two reports."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from steerscale.engines.base import StepResult
from steerscale.parallel.layout import ParallelLayout


class Window:
    """Measurements since the last report.

    Times are means over the steps that were timed: neither warm-up steps nor what happens between steps is in them.
    """

    layout: ParallelLayout
    """Layout of the last step, with the batch it had."""
    uniform: bool
    """Whether all steps had that batch: with several sizes there is no one throughput."""
    loss_scale = 1.0
    """Of the last step."""

    def __init__(self, *, skip: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """`skip` warm-up steps are not timed; `clock` gives seconds."""
        self._skip, self._clock = skip, clock
        self._started = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._loss_sum, self._tokens, self._grad_norm, self._lr, self._size = 0.0, 0, 0.0, 0.0, 0
        self._steps = 0
        self._seconds: list[float] = []
        self._within: dict[str, float] = defaultdict(float)
        self._between: dict[str, float] = defaultdict(float)
        self._metrics: dict[str, float] = defaultdict(float)
        self.uniform = True

    def skip_step(self) -> None:
        """Do not time the next step."""
        self._skip = max(self._skip, 1)

    def begin(self, layout: ParallelLayout) -> None:
        """A step begins, with the batch of `layout`."""
        if self._steps and layout != self.layout:
            self.uniform = False
        self.layout, self._started = layout, self._clock()

    def end(self, result: StepResult, *, lr: float, size: int) -> None:
        """The step is done."""
        if self._skip > 0:
            self._skip -= 1
        else:
            self._seconds.append(self._clock() - self._started)
        self._steps += 1
        for name, value in result.metrics.items():
            self._metrics[name] += value
        self._lr, self._size, self._grad_norm = lr, size, result.grad_norm
        self.loss_scale = result.loss_scale
        if result.applied:
            self._loss_sum, self._tokens = self._loss_sum + result.totals.loss_sum, self._tokens + result.totals.tokens

    @contextmanager
    def time(self, name: str, *, between_steps: bool = False) -> Iterator[None]:
        """Attribute the time in this context to a section of the step, or to something between steps."""
        started = self._clock()
        try:
            yield
        finally:
            if between_steps:
                self._between[name] += self._clock() - started
            elif self._skip == 0:
                self._within[name] += self._clock() - started

    def averages(self) -> dict[str, Any] | None:
        """Since the last report; None if there was no step.

        Loss over all tokens; gradient norm, learning rate and batch size of the last step; `seconds_per_step` and its
        sections in `seconds` over the `timed_steps`, the last ones, whose own times are `step_seconds`;
        `seconds_between_steps` in total.
        """
        if not self._steps:
            return None
        timed = len(self._seconds)
        return {
            "loss": self._loss_sum / self._tokens if self._tokens else float("nan"),
            "grad_norm": self._grad_norm,
            "lr": self._lr,
            "global_batch_size": self._size,
            "seconds_per_step": sum(self._seconds) / timed if timed else None,
            "timed_steps": timed,
            "step_seconds": [round(seconds, 6) for seconds in self._seconds],
            "seconds": {name: total / timed for name, total in self._within.items()} if timed else {},
            "seconds_between_steps": dict(self._between),
            **(
                {"metrics": {name: total / self._steps for name, total in self._metrics.items()}}
                if self._metrics
                else {}
            ),
        }
