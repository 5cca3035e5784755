"""Run directories as points of a scaling law, and as measurements of MFU."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
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

    Raises SteerscaleError if a path holds no run, DataError if the runs' vocabularies differ.
    """
    points: list[Point] = []
    warnings: list[str] = []
    vocabularies: dict[int, str] = {}
    lengths: set[int] = set()
    for run in scan_runs(paths):
        if isinstance(run, BrokenRun):
            warnings.append(f"{run.path.name} is left out: {run.reason}")
            continue
        try:
            config = from_mapping(RunConfig, run.config)
            points += _points(run, config, warnings, moments=moments)
        except SteerscaleError as error:
            warnings.append(f"{run.name} is left out: {error}")
            continue
        vocabularies[config.model.tokens] = run.name
        lengths.add(config.model.seq_len)
    if len(vocabularies) > 1:
        listed = ", ".join(f"{name} ({vocabulary:,} tokens)" for vocabulary, name in vocabularies.items())
        raise DataError(f"losses in nats a token of different vocabularies cannot be compared: {listed}")
    if len(lengths) > 1:
        warnings.append(
            f"the runs have sequences of {min(lengths):,} to {max(lengths):,} tokens: more context lowers the loss, and the "
            "law takes it for something else"
        )
    return points, warnings


def _points(run: Run, config: RunConfig, warnings: list[str], *, moments: bool) -> list[Point]:
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
    if losses[-1] >= (guessing := math.log(config.model.tokens)):
        raise DataError(
            f"its last loss of {losses[-1]:.3f} is no better than guessing ({guessing:.3f} among {config.model.tokens:,})"
        )
    if run.skips:
        warnings.append(
            f"{run.name}: {len(run.skips):,} of {config.train.steps:,} steps were skipped for a loss or gradient that was not "
            "finite, so it saw less than it is counted with"
        )
    last = learning_rate(config.optim, config.train.steps - 1, config.train.steps)
    if last > DECAYED * config.optim.lr:
        warnings.append(
            f"{run.name}: the learning rate ended at {last / config.optim.lr:.0%} of its peak; a decayed one gives a lower loss"
        )
    tokenizer, data = _data(config)
    if tokenizer is None:
        warnings.append(
            f"{run.name}: its dataset is not there any more, so its tokenizer and text are not compared with the others'"
        )
    layout = config.layout()
    return [
        Point(
            parameters=config.model.num_parameters(),
            tokens=total_samples(config.train.ramp_up, layout, record["step"]) * config.model.seq_len,
            loss=loss,
            name=run.name,
            tokenizer=tokenizer,
            data=data,
        )
        for record, loss in zip(evaluations, losses)
        if loss is not None and record["step"] > config.optim.warmup_steps
    ]


def _data(config: RunConfig) -> tuple[str | None, str | None]:
    """What tells the run's tokenizer and its text apart from others'; None where its datasets are gone."""
    if config.data is None:
        return None, None
    try:
        manifests = {path: inspect_dataset(path) for path in config.data.weights}
    except DataError:
        return None, None
    text = [
        (share, manifest.seed, manifest.fractions, [asdict(source) for source in manifest.sources])
        for (path, manifest), share in zip(manifests.items(), config.data.weights.values())
    ]
    tokenizer = next(iter(manifests.values())).tokenizer.hash
    return tokenizer, hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()


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
