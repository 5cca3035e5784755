"""Curves over a run's steps, thinned until hundreds of them fit into one page. Torch-free."""

import math
from collections.abc import Sequence
from typing import Any

from steerscale.dashboard.figures import percentile
from steerscale.dashboard.runs import Run, step_seconds

CURVES = (
    "loss",
    "seconds_p50",
    "seconds_p95",
    "tokens_per_second_per_gpu",
    "model_tflops_per_gpu",
    "legacy_tflops_per_gpu",
    "mfu",
    "hfu",
    "memory_peak_gib_max",
    "bubble_fraction",
)
KEPT = ("loss", "seconds_p50", "seconds_p95")
"""Their extremes survive thinning; with them those of every rate, which is a constant over the seconds."""
SLOW_FACTOR = 1.5
"""A step is slow if it took this many times the median of its start."""
MOST_EVENTS = 100
"""Of one kind and run; the page says how many there were."""

Points = list[float | None]


def curves_of(run: Run, *, points: int) -> dict[str, Any]:
    """{"step": ..., "time": ..., curve: ...} of all starts: parallel lists of about `points` entries, or one number for all.

    `time` is seconds since the first record. None is a gap.
    """
    records = run.history
    full: dict[str, Points] = {name: [_finite(_value(record, name)) for record in records] for name in CURVES}
    kept = thin([full[name] for name in KEPT], points=points)
    begin = run.starts[0]["time"] if run.starts and "time" in run.starts[0] else None
    curves: dict[str, Any] = {
        "step": [records[index]["step"] for index in kept],
        "time": [_since(begin, records[index]) for index in kept],
    }
    for name, values in full.items():
        chosen = [_short(values[index]) for index in kept]
        curves[name] = chosen[0] if chosen and all(value == chosen[0] for value in chosen) else chosen
    return curves


def evaluations_of(run: Run, *, points: int) -> dict[str, Points]:
    """Step, time and loss of the evaluations, thinned in the same way."""
    begin = run.starts[0].get("time") if run.starts else None
    losses = [_finite(record.get("loss")) for record in run.evaluations]
    kept = thin([losses], points=points)
    return {
        "step": [run.evaluations[index]["step"] for index in kept],
        "time": [_since(begin, run.evaluations[index]) for index in kept],
        "loss": [_short(losses[index]) for index in kept],
    }


def events_of(run: Run) -> list[dict[str, Any]]:
    """Restarts, skipped steps, slow steps and ranks that were waited for: {"kind", "step", "time", "text"}.

    Of more than `MOST_EVENTS` of a kind the first are kept (of slow steps the slowest), and one says how many there were.
    """
    begin = run.starts[0].get("time") if run.starts else None

    def event(kind: str, record: dict[str, Any], text: str, step: int | None = None) -> dict[str, Any]:
        step = record["step"] if step is None else step
        return {"kind": kind, "step": step, "time": _since(begin, record), "text": text}

    restarts = [event("restart", record, f"start as {record.get('layout', '?')}") for record in run.starts[1:]]
    skips = [event("skip", record, _skip_text(record)) for record in run.skips]
    typical = percentile([seconds for record in run.history for seconds in step_seconds(record)], 0.5) or math.inf
    traced = _traced_steps(run)
    slow: list[tuple[float, dict[str, Any]]] = []
    waits: list[dict[str, Any]] = []
    for record in run.history:
        times = record.get("step_seconds") or []
        timed = (step for step in range(record["step"], 0, -1) if step not in traced)
        for step, seconds in zip(timed, reversed(times)):
            if seconds > SLOW_FACTOR * typical:
                text = f"{seconds:.3g} s, {seconds / typical:.1f} times the median"
                slow.append((seconds, event("slow", record, text, step)))
        wait = record.get("data_seconds_max")
        if wait is not None and wait > (SLOW_FACTOR - 1) * typical:
            text = f"rank {record.get('data_slowest_rank', '?')} waited {wait:.3g} s a step for its data"
            waits.append(event("straggler", record, text))
    slow.sort(key=lambda entry: -entry[0])
    kinds = (restarts, skips, [entry for _, entry in slow], waits)
    return [entry for events in kinds for entry in _limited(events)]


def thin(series: Sequence[Points], *, points: int) -> list[int]:
    """Indices of about `points` entries, in order: first and last, and in each stretch where a series is lowest and highest.

    All series have the same length; None is no extreme.
    """
    length = len(series[0]) if series else 0
    if length <= points:
        return list(range(length))
    stretches = max(1, points // (2 * len(series)))
    kept = {0, length - 1}
    for stretch in range(stretches):
        span = range(stretch * length // stretches, (stretch + 1) * length // stretches)
        for values in series:
            there = [(value, index) for index in span if (value := values[index]) is not None]
            if there:
                kept.update((min(there)[1], max(there)[1]))
    return sorted(kept)


def _value(record: dict[str, Any], name: str) -> float | None:
    if name in ("seconds_p50", "seconds_p95"):
        return percentile(step_seconds(record), 0.5 if name == "seconds_p50" else 0.95)
    return record.get(name)


def _traced_steps(run: Run) -> set[int]:
    """Steps that a profiler slowed down, whose times were left out."""
    profile = run.config.get("profile")
    steps = profile.get("steps") if isinstance(profile, dict) else None
    return {step for step in steps if isinstance(step, int)} if isinstance(steps, list) else set()


def _skip_text(record: dict[str, Any]) -> str:
    first, end = record.get("first_sample"), record.get("end_sample")
    return "not applied" if first is None or end is None else f"samples {first} to {end - 1} not applied"


def _limited(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(events) <= MOST_EVENTS:
        return events
    *rest, last = events[:MOST_EVENTS]
    return [*rest, {**last, "text": f"{last['text']} ({len(events) - MOST_EVENTS} more are not shown)"}]


def _since(begin: float | None, record: dict[str, Any]) -> float | None:
    time = record.get("time")
    return None if begin is None or time is None else round(time - begin, 1)


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _short(value: float | None) -> float | None:
    """Five digits: more than a screen shows, and half the bytes."""
    return None if value is None else float(f"{value:.5g}")
