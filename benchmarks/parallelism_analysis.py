"""Figures of a sweep, from run directories: throughput by layout at fixed MBS and GAS, and over the micro-batch size.

    python benchmarks/parallelism_analysis.py runs/parallelism runs/gas_mbs -o figures [--mbs 2 --gas 128] [--format svg]

layouts      TFLOP/s of each layout at one micro-batch size and one number of accumulated micro-batches: exact model FLOPs, and
             beside them the figure of OpenGPT-X's tag. Layouts without a result say why: out of memory, predicted not to fit,
             impossible.
throughput   tokens/s of a GPU over the micro-batch size (or --over GAS, ranks), a line for each model, layout and the other of
             the two: how small models fill a GPU, or do not.

Rates are medians over the reports of a run, warm-up excluded (docs/throughput.md). Runs of several devices are not drawn
together. The last line is one JSON object.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a test imports this as well
    # The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.sweep_record import RECORD, read_record
from launch.sweep_table import SPOKEN
from steerscale.config import from_mapping
from steerscale.dashboard.runs import Run, run_layout, scan_runs
from steerscale.errors import SteerscaleError
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelLayout
from steerscale.rundir import read_status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL_COLOR, LEGACY_COLOR = "#0b72c4", "#b8c4cf"
STYLES = ("o-", "s--", "^:", "D-.", "v-", "P--")
MOST_LINES = 12
OVER: dict[str, tuple[str, Callable[[ParallelLayout], int]]] = {
    "MBS": ("micro-batch size", lambda layout: layout.micro_batch_size),
    "GAS": ("accumulated micro-batches", lambda layout: layout.gradient_accumulation_steps),
    "ranks": ("ranks", lambda layout: layout.world_size),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run, or a point of a sweep that has none."""

    model: str
    """Its size, for people; empty: unknown."""
    layout: ParallelLayout | None
    degrees: str
    """TP, PP, DP and recomputation."""
    device: str
    model_tflops: float | None = None
    legacy_tflops: float | None = None
    tokens_per_second: float | None = None
    trouble: str = ""
    """Why there is no result."""


def read_points(paths: Sequence[Path]) -> list[Point]:
    """All runs at and below `paths`. Raises SteerscaleError if there is none."""
    points = []
    for run in scan_runs(paths):
        if not isinstance(run, Run):
            print(f"not read: {run.path}: {run.reason}", file=sys.stderr)
        elif run.config.get("sae") is None:
            points.append(_point(run))
    return points


def _point(run: Run) -> Point:
    layout, tflops = run_layout(run.config), run.median("model_tflops_per_gpu")
    trouble = ""
    if tflops is None:
        trouble = "out of memory" if read_status(run.path).cause == "oom" else run.state
    return Point(
        model=_size(from_mapping(ModelConfig, run.config["model"])),
        layout=layout,
        degrees=f"{_degrees(layout)}{_recompute(run)}" if layout is not None else run.layout,
        device=run.device if run.device != "?" else "",
        model_tflops=tflops,
        legacy_tflops=run.median("legacy_tflops_per_gpu"),
        tokens_per_second=run.median("tokens_per_second_per_gpu"),
        trouble=trouble,
    )


def not_run(paths: Sequence[Path], *, mbs: int, gas: int) -> list[str]:
    """What sweeps say of points with this MBS and GAS that were not run: layout and reason in two words."""
    lines = []
    for path in paths:
        for file in [path / RECORD] if (path / RECORD).is_file() else sorted(path.rglob(RECORD)):
            entries = read_record(file.parent).points
            batch = f"MBS{mbs} GAS{gas}"
            lines += [
                f"{entry.layout.removesuffix(batch).strip()}: {SPOKEN[entry.verdict]}, {entry.predicted_gib:.1f} GiB"
                for entry in entries
                if entry.verdict == "predicted_oom" and entry.layout is not None and entry.layout.endswith(batch)
            ]
    return lines


def fixed_batch(points: Sequence[Point], *, mbs: int | None, gas: int | None) -> tuple[int, int]:
    """The micro-batch size and accumulation to compare layouts at: those given, else those with the most layouts.

    Raises SteerscaleError if there is no run of them.
    """
    found: dict[tuple[int, int], set[str]] = {}
    for point in points:
        if point.layout is not None:
            key = (point.layout.micro_batch_size, point.layout.gradient_accumulation_steps)
            if mbs in (None, key[0]) and gas in (None, key[1]):
                found.setdefault(key, set()).add(point.degrees)
    if not found:
        raise SteerscaleError(f"there is no run with --mbs {mbs} and --gas {gas}")
    return max(found, key=lambda key: (len(found[key]), key))


def draw_layouts(points: Sequence[Point], *, mbs: int, gas: int, left_out: Sequence[str], device: str) -> "Figure":
    """Bars of TFLOP/s a rank, the best first."""
    from matplotlib.figure import Figure

    chosen = [
        point
        for point in points
        if point.layout is not None
        and (point.layout.micro_batch_size, point.layout.gradient_accumulation_steps) == (mbs, gas)
    ]
    chosen.sort(key=lambda point: -(point.model_tflops or 0.0))
    several = len({point.model for point in chosen}) > 1
    names = [f"{point.model} {point.degrees}" if several else point.degrees for point in chosen]
    figure = Figure(figsize=(8.5, 1.9 + 0.42 * len(chosen) + 0.16 * len(left_out)), layout="constrained", dpi=120)
    axis = figure.subplots()
    places = list(range(len(chosen)))
    axis.barh(
        [p - 0.2 for p in places],
        [point.model_tflops or 0.0 for point in chosen],
        0.4,
        color=MODEL_COLOR,
        label="model FLOPs",
    )
    axis.barh(
        [p + 0.2 for p in places],
        [point.legacy_tflops or 0.0 for point in chosen],
        0.4,
        color=LEGACY_COLOR,
        label="legacy tag",
    )
    for place, point in zip(places, chosen):
        value = point.model_tflops
        text = f" {point.trouble}" if value is None else f" {value:.3g}"
        axis.text(value or 0.0, place - 0.2, text, va="center", fontsize=8, color="black" if value else "firebrick")
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xlabel("TFLOP/s a rank" + (f"\nnot run: {'; '.join(left_out)}" if left_out else ""), wrap=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    axis.set_title(f"Throughput by layout at MBS {mbs}, GAS {gas}\n{_title(chosen, device)}", fontsize=10)
    return figure


def draw_throughput(points: Sequence[Point], *, over: str, device: str) -> "Figure":
    """Tokens/s a rank over one of `OVER`; a line for each model, degrees and the rest of the batch."""
    from matplotlib.figure import Figure

    spoken, place = OVER[over]
    lines: dict[str, dict[int, float]] = {}
    members: dict[str, list[Point]] = {}
    for point in points:
        if point.layout is None or point.tokens_per_second is None:
            continue
        degrees = [] if over == "ranks" else [point.degrees]
        rest = [f"{name} {value(point.layout)}" for name, (_, value) in OVER.items() if name not in (over, "ranks")]
        key = " ".join([point.model, *degrees, *rest])
        members.setdefault(key, []).append(point)
        # Of several runs that differ in what is not shown, the best.
        there = lines.setdefault(key, {})
        there[place(point.layout)] = max(there.get(place(point.layout), 0.0), point.tokens_per_second)
    if any(len(values) > 1 for values in lines.values()):  # what was not varied says nothing here
        lines = {key: values for key, values in lines.items() if len(values) > 1}
    best = sorted(lines, key=lambda key: (-len(lines[key]), -max(lines[key].values())))[:MOST_LINES]
    figure = Figure(figsize=(8.5, 4.8), layout="constrained", dpi=120)
    axis = figure.subplots()
    for number, key in enumerate(best):
        values = sorted(lines[key].items())
        axis.plot(
            [x for x, _ in values], [y for _, y in values], STYLES[number % len(STYLES)], label=key, linewidth=1.4
        )
    axis.set_xscale("log", base=2)
    shown = sorted({x for key in best for x in lines[key]})
    axis.set_xticks(shown, [str(x) for x in shown])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel(spoken)
    axis.set_ylabel("tokens/s a rank")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if best:
        axis.legend(frameon=False, fontsize=8)
    drawn = [point for key in best for point in members[key]]
    more = f", {len(best)} of {len(lines)} lines" if len(lines) > len(best) else ""
    axis.set_title(f"Throughput over the {spoken}{more}\n{_title(drawn, device)}", fontsize=10)
    return figure


def one_device(points: Sequence[Point], wanted: str | None) -> tuple[list[Point], str]:
    """The points of a device, those without a result included, and its name. Raises SteerscaleError if there are several."""
    devices = Counter(point.device for point in points if point.device)
    if wanted is None and len(devices) > 1:
        listed = ", ".join(f"{name!r} ({number})" for name, number in devices.items())
        raise SteerscaleError(f"the runs were on several devices: choose one with --device: {listed}")
    name = wanted or next(iter(devices), "unknown device")
    return [point for point in points if point.device in ("", name)], name


def _title(points: Sequence[Point], device: str) -> str:
    models = ", ".join(dict.fromkeys(point.model for point in points))
    ranks = sorted({point.layout.world_size for point in points if point.layout is not None})
    span = " to ".join(str(number) for number in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else "no"
    note = "; says nothing about GPUs" if device.startswith("CPU") else ""
    return f"{models} parameters on {span} ranks, {device}{note}"


def _size(model: ModelConfig) -> str:
    number = model.num_parameters()
    return next(
        f"{number / scale:.3g}{letter}" for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if number >= scale
    )


def _degrees(layout: ParallelLayout) -> str:
    return str(layout).removesuffix(f" MBS{layout.micro_batch_size} GAS{layout.gradient_accumulation_steps}")


def _recompute(run: Run) -> str:
    mode = (run.config.get("engine") or {}).get("recompute", "none")
    return "" if mode == "none" else f" recompute {mode}"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw both figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="run directories, sweeps, or folders of them"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path(), help="folder for the figures (default: here)")
    parser.add_argument("--format", choices=["png", "svg"], default="png")
    parser.add_argument(
        "--mbs", type=int, help="micro-batch size of the figure by layout (default: that of the most layouts)"
    )
    parser.add_argument("--gas", type=int, help="accumulated micro-batches of the figure by layout (default: likewise)")
    parser.add_argument(
        "--over", choices=list(OVER), default="MBS", help="axis of the other figure (default: %(default)s)"
    )
    parser.add_argument("--device", help="draw runs on this device only")
    args = parser.parse_args(argv)
    try:
        points, device = one_device(read_points(args.runs), args.device)
        mbs, gas = fixed_batch(points, mbs=args.mbs, gas=args.gas)
        left_out = not_run(args.runs, mbs=mbs, gas=gas)
    except SteerscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    figures = {
        "layouts": draw_layouts(points, mbs=mbs, gas=gas, left_out=left_out, device=device),
        "throughput": draw_throughput(points, over=args.over, device=device),
    }
    written = []
    for name, figure in figures.items():
        path = args.output / f"{name}.{args.format}"
        figure.savefig(path, format=args.format)
        written.append(str(path))
    print(json.dumps({"runs": len(points), "device": device, "mbs": mbs, "gas": gas, "figures": written}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
