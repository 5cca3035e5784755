"""`steerscale probe`: fit probes on a language model's activations; with --apply, change what the model says by one."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.cli.probe_apply import add_apply_arguments, apply
from steerscale.cli.sample import add_layout_arguments, layout_of
from steerscale.errors import ConfigError, DataError
from steerscale.metrics import format_duration

if TYPE_CHECKING:
    from steerscale.interp.probes.probe import Probe
    from steerscale.interp.probes.run import ProbeConfig, Progress

COLUMNS = ("accuracy", "balanced_accuracy", "ece", "control_accuracy", "selectivity", "seconds")
RESULTS = "results.json"


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "probe",
        help="what a model's activations tell: probes, and edits by them",
        description="Fit probes for part of speech, language or labels of your own at hook points, with held-out accuracy, "
        "calibration and control tasks; with --apply, edit activations by a fitted probe (docs/probes.md).",
    )
    parser.add_argument("model", type=Path, metavar="RUN|HF_DIRECTORY", help="run directory or Hugging Face model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", metavar="pos|language|FILE", help="labels: a task, or a .tsv or .jsonl file")
    what.add_argument("--apply", type=Path, metavar="DIR", help="edit by a probe of this directory instead of fitting")
    fitting = parser.add_argument_group("fitting (--task)")
    fitting.add_argument("--data", type=Path, metavar="FILE", help="text of the tasks pos and language")
    fitting.add_argument(
        "--classes", nargs="+", default=["en", "de", "cs"], metavar="NAME",
        help="language: the last columns of --data (default: en de cs)",
    )  # fmt: skip
    fitting.add_argument(
        "--tagset", choices=("universal", "as-written"), default="universal",
        help="pos: 12 classes from Brown's tags, or tags as they are (default: %(default)s)",
    )  # fmt: skip
    fitting.add_argument(
        "--hooks", nargs="+", default=["all"], metavar="HOOK",
        help="hook points, `all` (embedding and every block's output) or `every:N` (default: all)",
    )  # fmt: skip
    fitting.add_argument(
        "--kinds", nargs="+", default=["logistic"], metavar="KIND",
        help="of logistic, ridge, diff_means, mass_mean, mlp (default: logistic)",
    )  # fmt: skip
    fitting.add_argument(
        "--position", default="last", metavar="WHICH",
        help="token of a labelled word or text: last, first, mean or all (default: %(default)s)",
    )  # fmt: skip
    for name, default, text in (
        ("--train", 20_000, "vectors to fit on"),
        ("--test", 5_000, "held-out vectors"),
        ("--min-examples", 20, "leave out labels with fewer training vectors"),
        ("--drop-first", 1, "first tokens of a text that are not read"),
        ("--probe-seed", 0, "of the split and the control task"),
    ):
        fitting.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    for name, fraction, text in (
        ("--held-out", 0.2, "share of the examples kept for testing"),
        ("--l2", 100.0, "penalty of logistic and ridge on standardised activations (scikit-learn's 1 / C)"),
        ("--memory-gib", 4.0, "for activations at a time"),
    ):
        fitting.add_argument(name, type=float, default=fraction, metavar="X", help=f"{text} (default: %(default)s)")
    fitting.add_argument("--no-control", action="store_true", help="no control task (half the time)")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="one of the run's (default: the newest)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the model (default: its files')"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="fitting: directory for probes; applying: picture of the table",
    )
    add_apply_arguments(parser)
    add_layout_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fit or apply, and print."""
    if args.apply is not None:
        apply(args)
        return
    from steerscale.interp.probes.labels import read_examples
    from steerscale.interp.probes.run import expand_hooks, make_task, run_probes
    from steerscale.language_model import load_language_model
    from steerscale.models.hook_points import hook_point
    from steerscale.parallel.context import initialize

    config = _config(args)
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise ConfigError(f"-o {args.output} is no directory: probes are written to one")
    if args.output is not None and (args.output / RESULTS).exists():
        raise ConfigError(f"{args.output} holds probes already: name another directory with -o")
    examples = read_examples(args.task, path=args.data, classes=args.classes, tagset=args.tagset)
    with initialize(layout_of(args)) as context:
        lm = load_language_model(args.model, context, checkpoint=args.checkpoint, precision=args.precision)
        hooks = expand_hooks(args.hooks, lm)
        for hook in hooks:
            hook_point(hook, lm.model)
        task = make_task(lm, examples, config)
        meter = _Meter() if context.rank == 0 else None
        probes = run_probes(lm, task, hooks, config, on_progress=meter or (lambda progress: None))
        if context.rank == 0:
            about = task.about()
            print(
                f"{len(task.classes)} classes ({', '.join(task.classes[:14])}{', ...' if len(task.classes) > 14 else ''}), "
                f"{about['train_vectors']:,} vectors, {about['test_vectors']:,} held out; the most frequent class has "
                f"{about['majority']:.4f} of these\n{table(probes)}",
                flush=True,
            )
            if args.output is not None:
                _write(args, probes, config)


def _config(args: argparse.Namespace) -> "ProbeConfig":
    from steerscale.interp.probes.fit import FitConfig
    from steerscale.interp.probes.run import ProbeConfig

    return ProbeConfig(
        kinds=tuple(args.kinds),
        position=args.position,
        train=args.train,
        test=args.test,
        held_out=args.held_out,
        min_examples=args.min_examples,
        drop_first=args.drop_first,
        control=not args.no_control,
        memory_gib=args.memory_gib,
        seed=args.probe_seed,
        fit=FitConfig(l2=args.l2, seed=args.probe_seed),
    )


class _Meter:
    """Progress and the time that is left, on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self._what, self._begin, self._said = "", 0.0, 0.0

    def __call__(self, progress: "Progress") -> None:
        now = time.monotonic()
        if progress.what != self._what:
            self._what, self._begin, self._said = progress.what, now, now
            self._first = progress.done
        live, ended = sys.stderr.isatty(), progress.done >= progress.total
        if not ended and now - self._said < (0.2 if live else 20):
            return
        self._said = now
        done = progress.done - self._first
        left = progress.total - progress.done
        eta = format_duration((now - self._begin) / done * left) if done else "0s" if ended else "?"
        line = f"{progress.what}: {progress.done:,} of {progress.total:,}, ETA {eta}"
        print(f"\r{line}   " if live else line, end="\n" if ended or not live else "", file=sys.stderr, flush=True)


def table(probes: "list[Probe]") -> str:
    """A line a probe."""
    rows = [("hook", "kind", *(name.replace("_accuracy", "") for name in COLUMNS))]
    for probe in probes:
        found = [probe.about.get(name) for name in COLUMNS]
        rows.append((probe.hook, probe.kind, *("-" if value is None else f"{value:.4f}" for value in found)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            [cell.ljust(width) for cell, width in zip(row[:2], widths)]
            + [cell.rjust(width) for cell, width in zip(row[2:], widths[2:])]
        )
        for row in rows
    )


def _write(args: argparse.Namespace, probes: "list[Probe]", config: "ProbeConfig") -> None:
    from dataclasses import asdict

    from steerscale.interp.probes.plot import plot_probes
    from steerscale.interp.probes.probe import write_probe
    from steerscale.tokenizers.base import write_json

    try:
        for probe in probes:
            write_probe(probe, args.output)
        name = Path(args.task).name
        plot_probes(args.output / "probes.png", probes, title=f"{name}, {args.model.name}")
        rows = [{"hook": probe.hook, "kind": probe.kind, **probe.about} for probe in probes]
        values = {"model": str(args.model), "task": args.task, "config": asdict(config), "probes": rows}
        write_json(args.output / RESULTS, json.loads(json.dumps(values)))
    except OSError as error:
        raise DataError(f"probes cannot be written to {args.output}: {error}") from error
    print(f"written: {args.output}", file=sys.stderr)
