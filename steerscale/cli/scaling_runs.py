"""Run directories as points of a scaling law, and as measurements of MFU."""

import math
from collections.abc import Sequence
from pathlib import Path

from steerscale.config import from_mapping
from steerscale.dashboard.runs import BrokenRun, Run, scan_runs
from steerscale.data.manifest import inspect_dataset
from steerscale.errors import DataError, SteerscaleError
from steerscale.optim import learning_rate
from steerscale.planning.scaling_points import Point
from steerscale.train.config import RunConfig, total_samples

DECAYED = 0.5
"""Share of the peak above which a final learning rate counts as not decayed."""


def points_of_runs(paths: Sequence[Path], *, moments: bool = False) -> tuple[list[Point], list[str]]:
    """The finished language models at and below `paths`, by their last evaluation; and sentences about what was left out.

    Args:
        paths: run directories, or directories of them.
        moments: every evaluation of a run instead of its last one, for an envelope.

    Raises SteerscaleError if a path holds no run.
    """
    points: list[Point] = []
    warnings: list[str] = []
    for run in scan_runs(paths):
        if isinstance(run, BrokenRun):
            warnings.append(f"{run.path.name} is left out: {run.reason}")
            continue
        try:
            points += _points(run, warnings, moments=moments)
        except SteerscaleError as error:
            warnings.append(f"{run.name} is left out: {error}")
    return points, warnings


def _points(run: Run, warnings: list[str], *, moments: bool) -> list[Point]:
    config = from_mapping(RunConfig, run.config)
    if config.sae is not None:
        raise DataError("it trained sparse autoencoders")
    if run.state != "finished":
        raise DataError(f"it is {run.state} at step {run.step:,} of {config.train.steps:,}, not finished")
    evaluations = run.evaluations if moments else run.evaluations[-1:]
    if not evaluations:
        raise DataError("it has no evaluation: its dataset needs a split 'valid'")
    if run.evaluations[-1]["step"] != config.train.steps:
        raise DataError(f"its last evaluation is of step {run.evaluations[-1]['step']:,}, not of the end")
    losses = [record.get("loss") for record in evaluations]
    if losses[-1] is None or not math.isfinite(losses[-1]):
        raise DataError("the loss of its last evaluation is not a number: it diverged")
    last = learning_rate(config.optim, config.train.steps - 1, config.train.steps)
    if last > DECAYED * config.optim.lr:
        warnings.append(
            f"{run.name}: the learning rate ended at {last / config.optim.lr:.0%} of its peak; a decayed one gives a lower loss"
        )
    tokenizer = _tokenizer(config)
    if tokenizer is None:
        warnings.append(
            f"{run.name}: its dataset is not there any more, so its tokenizer is not compared with the others'"
        )
    layout = config.layout()
    return [
        Point(
            parameters=config.model.num_parameters(),
            tokens=total_samples(config.train.ramp_up, layout, record["step"]) * config.model.seq_len,
            loss=loss,
            name=run.name,
            tokenizer=tokenizer,
        )
        for record, loss in zip(evaluations, losses)
        if loss is not None and record["step"] > config.optim.warmup_steps
    ]


def _tokenizer(config: RunConfig) -> str | None:
    if config.data is None:
        return None
    try:
        return inspect_dataset(next(iter(config.data.weights))).tokenizer.hash
    except DataError:
        return None


def measured_mfu(paths: Sequence[Path], *, peak_tflops: float) -> tuple[float, list[str]]:
    """MFU of the fastest run at and below `paths`, the median of its steps, and sentences about it.

    Raises DataError if no run has one: runs on devices of unknown peak have none.
    """
    runs = [run for run in scan_runs(paths) if isinstance(run, Run)]
    measured = [(mfu, run) for run in runs if (mfu := run.median("mfu")) is not None]
    if not measured:
        raise DataError(
            f"none of {len(runs)} runs has an MFU: a run needs steps after its warm-up on a GPU whose peak is known, or "
            "metrics.peak_tflops; else give --mfu"
        )
    mfu, fastest = max(measured, key=lambda pair: pair[0])
    notes = [
        f"an MFU of {mfu:.1%}, the best of {len(measured)} runs: {fastest.name} ({fastest.layout} on {fastest.device}); it "
        "counts exact model FLOPs, the laws 6 N D"
    ]
    peak = fastest.last("peak_tflops")
    if peak is not None and not math.isclose(peak, peak_tflops, rel_tol=0.01):
        notes.append(f"that this MFU, measured against {peak:g} TFLOP/s, holds for a GPU of {peak_tflops:g} as well")
    return mfu, notes
