"""The figures of a run: what each is called, how it is computed and written. One list for every form of output. Torch-free."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steerscale.dashboard.runs import Run, predicted_memory_gib, run_engine, run_layout
from steerscale.planning.throughput import FORMULAS

Value = float | int | str | None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a run."""

    key: str
    title: str
    form: str
    """How Python's `format` writes it; "": text. "s": seconds with a sensible unit."""
    value: Callable[[Run], Value]
    note: str
    """What it is: formula, unit, how many values went into it."""
    better: Literal["high", "low", ""] = ""
    """Which of two values is the better one, if either is."""
    shown: bool = True
    """Whether a table shows it unasked."""
    differs: bool = False
    """Whether it is shown only among runs that differ in it."""


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` (0 to 1) of the values lie, linear between two of them; None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def figures_of(run: Run) -> dict[str, Value]:
    """All figures of a run by key; None is unknown."""
    return {figure.key: figure.value(run) for figure in FIGURES}


def worth_showing(figures: Iterable[Figure], runs: Sequence[Mapping[str, Value]]) -> list[Figure]:
    """Those of `figures` that a table of these runs shows; given the runs' figures."""
    return [figure for figure in figures if not figure.differs or len({run[figure.key] for run in runs}) > 1]


def write(figure: Figure, value: Value) -> str:
    """A figure for people; "-" if unknown."""
    if value is None:
        return "-"
    if isinstance(value, str) or not figure.form:
        return str(value)
    if figure.form == "s":
        return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
    if figure.form.endswith("g"):  # digits that count, but no exponent: 1020, not 1.02e+03
        return f"{float(format(value, figure.form)):g}"
    return format(value, figure.form)


def peak_of(run: Run) -> float | None:
    """The peak that MFU and HFU are fractions of, in 1e12 FLOP/s."""
    return run.last("peak_tflops")


def _median(key: str) -> Callable[[Run], Value]:
    return lambda run: run.median(key)


def _last(key: str) -> Callable[[Run], Value]:
    return lambda run: run.last(key)


def _engine(run: Run) -> Value:
    return None if (engine := run_engine(run.config)) is None else engine.title


def _degree(name: str) -> Callable[[Run], Value]:
    return lambda run: None if (layout := run_layout(run.config)) is None else getattr(layout, name)


def _throughput(key: str, title: str, form: str, *, shown: bool = True) -> Figure:
    note = f"{FORMULAS[key]}; median over the reports since the last start, warm-up excluded"
    return Figure(key=key, title=title, form=form, value=_median(key), note=note, better="high", shown=shown)


def _layout(key: str, title: str, name: str, note: str) -> Figure:
    return Figure(key=key, title=title, form=",d", value=_degree(name), note=note, shown=False)


FIGURES: tuple[Figure, ...] = (
    Figure(key="run", title="run", form="", value=lambda run: run.name, note="name in the configuration"),
    Figure(key="layout", title="layout", form="", value=lambda run: run.layout, note="of the last start"),
    Figure(
        key="engine", title="engine", form="", value=_engine, differs=True,
        note="Megatron-Core, or DeepSpeed with its ZeRO stage; a column where runs differ in it",
    ),
    Figure(key="state", title="state", form="", value=lambda run: run.state, note="status.json"),
    Figure(key="step", title="step", form=",d", value=lambda run: run.step, note="last step reported"),
    _throughput("tokens_per_second_per_gpu", "tok/s/GPU", ",.0f"),
    _throughput("model_tflops_per_gpu", "model TFLOP/s", ".3g"),
    _throughput("legacy_tflops_per_gpu", "legacy TFLOP/s", ".3g"),
    _throughput("hardware_tflops_per_gpu", "hardware TFLOP/s", ".3g", shown=False),
    _throughput("mfu", "MFU", ".1%"),
    _throughput("hfu", "HFU", ".1%"),
    Figure(
        key="seconds_per_step", title="s/step", form="s", value=_median("seconds_per_step"),
        note="mean over each report, median over reports", better="low", shown=False,
    ),
    Figure(
        key="seconds_p50", title="step p50", form="s", value=lambda run: percentile(run.step_seconds(), 0.5),
        note="median seconds of a step since the last start, warm-up excluded", better="low",
    ),
    Figure(
        key="seconds_p95", title="step p95", form="s", value=lambda run: percentile(run.step_seconds(), 0.95),
        note="seconds that 95% of the steps stay below", better="low",
    ),
    Figure(
        key="bubble_fraction", title="bubble", form=".1%", value=_last("bubble_fraction"), better="low",
        note="(p-1)/(v m) of the ideal time: by formula, not measured",
    ),
    Figure(
        key="memory_peak_gib_max", title="GiB peak", form=".2f", value=_last("memory_peak_gib_max"), better="low",
        note="fullest rank, measured: what torch reserved on CUDA, the process's resident memory on a CPU",
    ),
    Figure(
        key="memory_predicted_gib", title="GiB predicted", form=".2f",
        value=lambda run: predicted_memory_gib(run.config),
        note="planning.memory.estimate_memory for the fullest stage; no Python, no CUDA context, no libraries",
    ),
    Figure(
        key="loss", title="loss", form=".3f", value=_last("loss"), note="training loss, nats a token, last report",
        better="low",
    ),
    Figure(
        key="valid_loss", title="held-out", form=".3f", value=lambda run: run.last_evaluation("loss"),
        note="loss on held-out text, nats a token, last evaluation", better="low",
    ),
    Figure(
        key="bits_per_byte", title="bits/byte", form=".3f", value=lambda run: run.last_evaluation("bits_per_byte"),
        note="held-out loss over the bytes of text: comparable between tokenizers", better="low", shown=False,
    ),
    Figure(
        key="restarts", title="restarts", form=",d", value=lambda run: max(len(run.starts) - 1, 0), better="low",
        note="starts after the first one",
    ),
    Figure(
        key="skipped", title="skipped", form=",d", value=lambda run: len(run.skips), better="low",
        note="steps not applied: loss or gradient was not finite",
    ),
    Figure(key="device", title="device", form="", value=lambda run: run.device, note="of rank 0", shown=False),
    Figure(
        key="peak_tflops", title="peak TFLOP/s", form=".4g", value=peak_of, shown=False,
        note="dense bf16 peak that MFU and HFU are fractions of; unknown: they are too",
    ),
    _layout("tp", "TP", "tensor", "tensor-parallel ranks"),
    _layout("pp", "PP", "pipeline", "pipeline stages"),
    _layout("dp", "DP", "data", "data-parallel replicas"),
    _layout("mbs", "MBS", "micro_batch_size", "micro-batch size, sequences"),
    _layout("gas", "GAS", "gradient_accumulation_steps", "micro-batches a replica accumulates in a step"),
    _layout("gbs", "GBS", "global_batch_size", "global batch size, sequences"),
    _layout("gpus", "GPUs", "world_size", "ranks: tensor x pipeline x data"),
)  # fmt: skip

BY_KEY: dict[str, Figure] = {figure.key: figure for figure in FIGURES}


def device_peaks(runs: Sequence[dict[str, Any]]) -> list[tuple[str, float | None]]:
    """Each device that ran, and its peak in 1e12 FLOP/s; given the runs' figures."""
    seen: dict[tuple[str, float | None], None] = {}
    for figures in runs:
        seen.setdefault((figures["device"], figures["peak_tflops"]))
    return sorted(seen, key=lambda entry: (entry[0], entry[1] or 0))
