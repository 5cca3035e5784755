"""`steerscale profile`: where the time of traced steps went, against the device's peak."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from steerscale.dashboard.runs import Run
    from steerscale.train.profile_trace import StepTrace


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "profile",
        help="where the time of traced steps went",
        description="Seconds of a step by matrix products, attention, optimizer, other compute, communication and the rest, "
        "from the traces of a run with profile.steps=[...]. What counts as what: docs/profiling.md.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--peak-tflops", type=float, metavar="X", help="of one device, where it is not known, 1e12 FLOP/s"
    )
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="longest operations shown (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print a table of the steps, or JSON."""
    from steerscale.dashboard.runs import read_run
    from steerscale.train.profile_trace import find_traces, read_trace

    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise ConfigError(f"--peak-tflops must be positive, got {args.peak_tflops:g}")
    of_run = read_run(args.run_dir)
    steps = [read_trace(path) for path in find_traces(args.run_dir)]
    peak = args.peak_tflops if args.peak_tflops is not None else of_run.last("peak_tflops")
    flops = model_flops_of_steps(of_run, [step.step for step in steps])
    if args.json:
        traces = [
            {**dataclasses.asdict(step), "longest": step.longest[: args.top], "model_flops": own}
            for step, own in zip(steps, flops or [None] * len(steps))
        ]
        answer = {"run": of_run.name, "device": of_run.device, "layout": of_run.layout, "peak_tflops": peak}
        print(json.dumps({**answer, "steps": traces}, indent=1))
        return
    print(f"{of_run.name}: {of_run.layout} on {of_run.device}")
    print("\n".join([*_table(steps), *_bounds(steps, flops=flops, peak=peak), *_longest(steps[-1], args.top)]))


def model_flops_of_steps(of_run: "Run", steps: Sequence[int]) -> list[float] | None:
    """Model FLOPs of one rank in each of these steps, with the batch they had; None of an SAE run."""
    from steerscale.config import from_mapping
    from steerscale.planning.flops import model_flops_per_token
    from steerscale.train.config import RunConfig, total_samples

    config = from_mapping(RunConfig, of_run.config)
    if config.sae is not None:
        return None
    layout = config.layout()
    per_sequence = model_flops_per_token(config.model) * config.model.seq_len / layout.world_size
    batches = [
        total_samples(config.train.ramp_up, layout, step) - total_samples(config.train.ramp_up, layout, step - 1)
        for step in steps
    ]
    return [per_sequence * batch for batch in batches]


def _table(steps: "Sequence[StepTrace]") -> list[str]:
    from steerscale.cli.scaling_text import table
    from steerscale.train.profile_trace import CATEGORIES

    cuda = any(step.on_cuda for step in steps)
    titles = [*CATEGORIES[:-1], "idle" if cuda else "Python, waiting"]
    rows = [("step", "rank", "ms", *titles, *(["hidden comm.", "syncs"] if cuda else []))]
    rows += [
        (
            *(str(step.step), str(step.rank), f"{step.seconds * 1e3:,.1f}"),
            *(_share(step.parts[category], step) for category in CATEGORIES),
            *([_share(step.hidden_communication, step), str(sum(step.synchronisations.values()))] if cuda else []),
        )
        for step in steps
    ]
    if len(steps) > 1:
        middle = [f"{median(step.parts[category] / step.seconds for step in steps):.1%}" for category in CATEGORIES]
        seconds = f"{median(step.seconds for step in steps) * 1e3:,.1f}"
        rows.append(("median", "", seconds, *middle, *(["", ""] if cuda else [])))
    return table(rows)


def _share(seconds: float, step: "StepTrace") -> str:
    return f"{seconds / step.seconds:.1%}"


def _bounds(steps: "Sequence[StepTrace]", *, flops: list[float] | None, peak: float | None) -> list[str]:
    """What the matrix products and the whole step reach, and the peak's share of it: medians over the steps."""
    lines = []
    products = [(step.gemm_flops, step.parts["GEMM"]) for step in steps if step.gemm_flops and step.parts["GEMM"]]
    if products:
        done = median(amount for amount, _ in products)
        rate = median(amount / spent for amount, spent in products) / 1e12
        lines.append(f"GEMM       {done:.4g} FLOPs at {rate:.4g} TFLOP/s{_of_peak(rate, peak)}")
    if flops is not None:
        rate = median(own / step.seconds for own, step in zip(flops, steps)) / 1e12
        lines.append(f"step       {median(flops):.4g} model FLOPs at {rate:.4g} TFLOP/s{_of_peak(rate, peak)}")
    if peak is not None and flops is not None:
        least = [own / peak / 1e12 for own in flops]
        factor = median(step.seconds / own for step, own in zip(steps, least))
        lines.append(
            f"roofline   {median(least) * 1e3:,.2f} ms at {peak:g} TFLOP/s; a step took {factor:.2f} times that"
        )
    if peak is None:
        lines.append("roofline   the device's peak is not known: give --peak-tflops")
    return lines


def _of_peak(rate: float, peak: float | None) -> str:
    return "" if peak is None else f", {rate / peak:.1%} of the peak"


def _longest(step: "StepTrace", count: int) -> list[str]:
    from steerscale.cli.scaling_text import table

    rows = [(f"longest of step {step.step}, rank {step.rank}", "", "ms", "share")]
    rows += [
        (name[:80], category, f"{seconds * 1e3:,.2f}", _share(seconds, step))
        for category, name, seconds in step.longest[:count]
    ]
    lines = table(rows, left=(0, 1)) if count > 0 else []
    if step.synchronisations:
        counted = ", ".join(f"{count} {name}" for name, count in step.synchronisations.items())
        lines.append(f"waits of the host for the device, or numbers read from it: {counted}")
    return lines
