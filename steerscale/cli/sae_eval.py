"""`steerscale sae eval`: how good the SAEs of a run are, on held-out text, as a table, JSON and pictures."""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.errors import ConfigError
from steerscale.metrics import format_duration

if TYPE_CHECKING:
    from steerscale.interp.sae_eval import Evaluation
    from steerscale.sae.base import SparseAutoencoder

COLUMNS = ("l0", "fvu", "cosine", "norm_ratio", "dead", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "ce_recovered")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "eval",
        help="reconstruction, sparsity and the language model's loss with SAEs in place",
        description="Evaluate the SAEs of a run on held-out text, in one process. What the columns mean: docs/sae.md.",
    )
    parser.add_argument("run_dir", type=Path, help="run directory of SAEs")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="one of its checkpoints (default: the newest)")
    parser.add_argument(
        "--samples", type=int, default=64, metavar="N", help="held-out sequences to read (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="also write figures.json and a picture of each SAE there"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print."""
    from steerscale.activations.loading import load_source
    from steerscale.config import from_mapping
    from steerscale.interp.sae_eval import evaluate_saes, held_out
    from steerscale.load import load_saes, newest_checkpoint
    from steerscale.parallel.context import initialize
    from steerscale.parallel.layout import ParallelLayout
    from steerscale.rundir import read_config
    from steerscale.train.config import RunConfig

    if args.samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {args.samples}")
    config = from_mapping(RunConfig, read_config(args.run_dir))
    if config.sae is None or config.stream is None or config.data is None:
        raise ConfigError(f"{args.run_dir} is no run of SAEs: train some with --config-name train_sae")
    checkpoint = args.checkpoint or newest_checkpoint(args.run_dir)
    with initialize(ParallelLayout()) as context:
        source = load_source(config.stream, config.sae.all_hooks, context)
        saes = load_saes(args.run_dir, source.widths, context, checkpoint=checkpoint)
        text = held_out(config.stream, config.data, source, samples=args.samples)
        if text is None:
            raise ConfigError(
                f"the dataset of {args.run_dir} has no split 'valid': prepare one with --split 0.99,0.01,0, and train on it"
            )
        begin = time.monotonic()
        found = evaluate_saes(
            [sae.spec for sae in saes],
            {sae.spec.name: sae for sae in saes},
            source,
            text,
            context,
            on_progress=None if args.json else lambda done, total: _show_progress(done, total, begin),
        )
    figures = {name: one.values for name, one in found.items()}
    if args.output is not None:
        _write(args.output, found, saes, figures, step=checkpoint.name)
    print(json.dumps(figures, indent=1) if args.json else _table(figures))


def _show_progress(done: int, total: int, begin: float) -> None:
    if sys.stderr.isatty():
        rest = (time.monotonic() - begin) / done * (total - done)
        end = "\r" if done < total else "\n"
        print(f"\r{done} of {total} sequences, ETA {format_duration(rest)}   ", end=end, file=sys.stderr, flush=True)


def _table(figures: dict[str, dict[str, float]]) -> str:
    rows: list[tuple[str, ...]] = [("SAE", *COLUMNS)]
    for name, values in figures.items():
        rows.append((name, *(f"{values[key]:.4g}" if key in values else "-" for key in COLUMNS)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def _write(
    output: Path,
    found: "dict[str, Evaluation]",
    saes: "list[SparseAutoencoder]",
    figures: dict[str, dict[str, float]],
    *,
    step: str,
) -> None:
    from steerscale.interp.sae_plots import plot_sae

    output.mkdir(parents=True, exist_ok=True)
    plain: dict[str, dict[str, Any]] = {
        name: {key: value if math.isfinite(value) else None for key, value in values.items()}
        for name, values in figures.items()
    }
    (output / "figures.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    for sae in saes:
        frequency = found[sae.spec.name].frequency_N
        assert frequency is not None
        path = output / f"{sae.spec.name.replace('/', '_')}.png"
        plot_sae(path, sae, frequency, figures[sae.spec.name], title=f"{sae.spec.name}, {step}")
        print(f"written: {path}", file=sys.stderr)
