"""Efficiency constants fitted to measured iterations: how much of its datasheet a machine really reaches."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from steerscale.errors import ConfigError
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.layouts import plan_one
from steerscale.planning.machine import Efficiency, Machine
from steerscale.planning.search import Task

ORDER = ("matmul", "network", "layer_seconds", "collective_seconds", "memory", "attention")
"""Constants in the order in which they are fitted: two runs a constant, so that the rest stay as they are."""
PRIOR = 1e-3
"""Weight of a constant's squared distance (logarithms) from where it started against the squared error of a run: what no
run says anything about stays where it was."""
SMALLEST_SECONDS = 1e-6
"""Where a fixed cost of zero starts: a search among logarithms cannot leave zero."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A run, and how long its iterations took."""

    name: str
    task: Task
    """Model, batch, ranks and engine; its machine is not looked at."""
    layout: ParallelLayout
    seconds: float
    """Measured, of one iteration."""
    memory_gib: float | None = None
    """Measured peak of the fullest rank; None: not recorded."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fitted machine, and how well it explains the runs."""

    machine: Machine
    fitted: list[str]
    """The constants that were changed."""
    errors: list[float]
    """Predicted over measured time - 1, of each run."""

    @property
    def mean_error(self) -> float:
        """Mean of the absolute errors."""
        return statistics.fmean(map(abs, self.errors))

    @property
    def largest_error(self) -> float:
        """The largest absolute error."""
        return max(map(abs, self.errors))


def calibrate(machine: Machine, runs: Sequence[Measurement], *, constants: Sequence[str] | None = None) -> Calibration:
    """Fit the efficiency of `machine` to measured runs: least squares of log(predicted / measured).

    Args:
        machine: where the search starts; its datasheet figures stay.
        runs: with different layouts and micro-batch sizes, or several constants cannot be told apart.
        constants: which to fit; None: as many of `ORDER` as half the runs, at least one.
    """
    if not runs:
        raise ConfigError("no run has a measured time: a run needs steps after its warm-up (metrics.warmup_steps)")
    names: list[str] = list(constants) if constants is not None else list(ORDER[: max(1, len(runs) // 2)])
    start = {name: max(getattr(machine.efficiency, name), SMALLEST_SECONDS) for name in names}

    def loss(values: dict[str, float]) -> float:
        errors = _errors(_with(machine, values), runs)
        distance = sum(math.log(values[name] / start[name]) ** 2 for name in names if not name.endswith("_seconds"))
        return sum(math.log1p(error) ** 2 for error in errors) + PRIOR * distance

    fitted = _with(machine, _search(start, loss))
    return Calibration(machine=fitted, fitted=names, errors=_errors(fitted, runs))


def predicted_seconds(machine: Machine, run: Measurement) -> float:
    """Time of an iteration of `run` on `machine`."""
    task = replace(run.task, machine=machine)
    return plan_one(task, run.layout, task.engine).time.total


def predicted_memory_gib(run: Measurement) -> float:
    """What the fullest rank of `run` is estimated to hold, without what its device keeps for itself."""
    return plan_one(run.task, run.layout, run.task.engine).fit.memory.total_gib


def _errors(machine: Machine, runs: Sequence[Measurement]) -> list[float]:
    return [predicted_seconds(machine, run) / run.seconds - 1 for run in runs]


def _with(machine: Machine, values: dict[str, float]) -> Machine:
    return replace(machine, efficiency=Efficiency(**{**vars(machine.efficiency), **values}))


def _search(values: dict[str, float], loss: Callable[[dict[str, float]], float]) -> dict[str, float]:
    """Pattern search: each value up and down by a factor, a smaller one when nothing helps any more."""
    factor, best = 4.0, loss(values)
    while factor > 1.0005:
        improved = False
        for name in values:
            for step in (factor, 1 / factor):
                tried = {**values, name: values[name] * step}
                if (result := loss(tried)) < best:
                    values, best, improved = tried, result, True
        if not improved:
            factor = math.sqrt(factor)
    return values
