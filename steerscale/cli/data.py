"""`steerscale data prepare | show`."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from steerscale.cli.tokenizer import add_reading_arguments
from steerscale.errors import ConfigError

if TYPE_CHECKING:
    from steerscale.data.manifest import DatasetManifest
    from steerscale.data.prepare import Progress


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register `steerscale data`."""
    parser = subparsers.add_parser("data", help="tokenize text into a dataset, or look at one")
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    prepare = commands.add_parser("prepare", help="tokenize text into a dataset directory")
    prepare.add_argument("inputs", nargs="+", metavar="INPUT", help="text file (also compressed), or sample:german")
    prepare.add_argument("--tokenizer", type=Path, required=True, help="directory of a tokenizer or Hugging Face model")
    prepare.add_argument("-o", "--output", type=Path, required=True, help="new directory for the dataset")
    add_reading_arguments(prepare)
    prepare.add_argument(
        "--split", type=_shares, default=[0.98, 0.01, 0.01], help="train,valid,test (default: 0.98,0.01,0.01)"
    )
    prepare.add_argument("--seed", type=int, default=0, help="decides which document goes where (default: %(default)s)")
    prepare.add_argument("--workers", type=int, help="processes that tokenize (default: one a core)")
    prepare.add_argument("--force", action="store_true", help="replace an existing dataset")
    prepare.set_defaults(run=_prepare)
    show = commands.add_parser("show", help="check a dataset and say what is in it")
    show.add_argument("path", type=Path, help="dataset directory")
    show.set_defaults(run=_show)


def _shares(text: str) -> list[float]:
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 0.98,0.01,0.01, got {text!r}") from None


def _prepare(args: argparse.Namespace) -> None:
    from steerscale.config import from_mapping
    from steerscale.data.prepare import PrepareConfig, prepare_dataset

    keys = ("format", "documents", "text_key", "split", "seed")
    config = from_mapping(PrepareConfig, {key: getattr(args, key) for key in keys})
    workers = args.workers if args.workers is not None else len(os.sched_getaffinity(0))
    if workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")
    manifest = prepare_dataset(
        args.inputs,
        tokenizer=args.tokenizer,
        output=args.output,
        config=config,
        workers=workers,
        force=args.force,
        report=_progress_line(),
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    _describe(args.output, manifest)


def _show(args: argparse.Namespace) -> None:
    from steerscale.data.manifest import inspect_dataset

    _describe(args.path, inspect_dataset(args.path))


def _describe(path: Path, manifest: "DatasetManifest") -> None:
    tokenizer = manifest.tokenizer
    print(f"{path}: {tokenizer.type} tokenizer, {tokenizer.vocab_size} tokens, hash {tokenizer.hash[:12]}")
    print(f"{'split':<8}{'documents':>12}{'tokens':>16}{'bytes':>16}{'bytes/token':>14}")
    for name, info in manifest.splits.items():
        print(f"{name:<8}{info.documents:>12,}{info.tokens:>16,}{info.bytes:>16,}{info.bytes_per_token:>14.3f}")


def _progress_line() -> "Callable[[Progress], None]":
    """A callback that rewrites one line of a terminal, or adds one now and then to a log file."""
    terminal = sys.stderr.isatty()
    interval, begin, end = (0.2, "\r", "") if terminal else (30.0, "", "\n")
    last = time.perf_counter()

    def report(progress: "Progress") -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= interval or (terminal and progress.fraction == 1):
            last = now
            print(begin + _spoken(progress).ljust(96), end=end, file=sys.stderr, flush=True)

    return report


def _spoken(progress: "Progress") -> str:
    seconds = max(progress.seconds, 1e-9)
    left = progress.seconds_left
    eta = "unknown" if left is None else f"{left // 60:.0f}:{left % 60:02.0f}"
    return (
        f"{progress.documents:,} documents, {progress.tokens / seconds / 1e6:.2f} M tokens/s, "
        f"{progress.text_bytes / seconds / 1e6:.1f} MB/s, ETA {eta}"
    )
