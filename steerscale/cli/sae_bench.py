"""`steerscale sae bench`: what SAEs are good for, side by side."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.cli.sample import add_layout_arguments, layout_of, make_directory
from steerscale.errors import ConfigError
from steerscale.metrics import format_duration

if TYPE_CHECKING:
    from steerscale.interp.sae_bench.matching import Matching
    from steerscale.interp.sae_bench.run import BenchConfig, BenchResult
    from steerscale.interp.sources import SAESource


def add_parser(commands: Any) -> None:
    """Register `bench` among the sub-commands of `steerscale sae`."""
    parser = commands.add_parser(
        "bench",
        help="what SAEs are good for, side by side",
        description="Sparse probing, feature absorption, removal of spurious correlations and matching of decoders, for one or "
        "several SAEs on the same text; results also in the layout of SAEBench's files (docs/probes.md).",
    )
    parser.add_argument(
        "source", type=Path, nargs="+", metavar="RUN|SAE", help="runs of SAEs, or SAEs in a public format"
    )
    parser.add_argument("--sae", nargs="+", metavar="NAME", help="which of one run's SAEs (default: all)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="language model (default: the run's own)")
    parser.add_argument("--hook", metavar="HOOK", help="where the SAEs belong (default: where they say)")
    parser.add_argument(
        "--task", metavar="pos|language|FILE", help="labels for sparse probing, as in `steerscale probe`"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="text of the tasks pos and language")
    parser.add_argument("--classes", nargs="+", default=["en", "de", "cs"], metavar="NAME", help="of the task language")
    parser.add_argument("--position", default="last", metavar="WHICH", help="last, first, mean or all (default: last)")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 5], metavar="K", help="latents (default: 1 2 5)")
    parser.add_argument("--train", type=int, default=8000, metavar="N", help="vectors (default: %(default)s)")
    parser.add_argument("--test", type=int, default=2000, metavar="N", help="held-out vectors (default: %(default)s)")
    parser.add_argument("--absorption", type=int, default=0, metavar="WORDS", help="words to read for absorption")
    parser.add_argument("--scr", type=Path, metavar="FILE", help='.jsonl of {"text", "label", "spurious"}')
    parser.add_argument(
        "--scr-texts", type=int, default=2000, metavar="N", help="of it, at most (default: %(default)s)"
    )
    parser.add_argument("--probe-seed", type=int, default=0, metavar="N", help="of the split (default: %(default)s)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the model")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="write bench.json and SAEBench's layout there")
    add_layout_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    from steerscale.interp.probes.labels import read_examples
    from steerscale.interp.probes.run import ProbeConfig
    from steerscale.interp.sae_bench.run import BenchConfig, compare, run_bench
    from steerscale.language_model import load_language_model
    from steerscale.parallel.context import initialize

    saes = _open(args)
    if args.task is None and not args.absorption and args.scr is None and len(saes) < 2:
        raise ConfigError("there is nothing to measure: give --task, --absorption, --scr or a second SAE")
    probe = ProbeConfig(position=args.position, train=args.train, test=args.test, seed=args.probe_seed)
    config = BenchConfig(probe=probe, ks=tuple(args.k), absorption_words=args.absorption, scr_texts=args.scr_texts)
    examples = read_examples(args.task, path=args.data, classes=args.classes) if args.task is not None else []
    scr = read_examples(str(args.scr)) if args.scr is not None else []
    first = next(iter(saes.values()))
    lm_path = args.model or first.lm
    if lm_path is None:
        raise ConfigError(f"{args.source[0]} does not bring its language model: name its directory with --model")
    if args.output is not None:
        make_directory(args.output)
    with initialize(layout_of(args)) as context:
        checkpoint = None if args.model is not None else first.checkpoint
        lm = load_language_model(lm_path, context, checkpoint=checkpoint, precision=args.precision)
        meter = _Meter()
        said = meter if context.rank == 0 else (lambda what, done, total: None)
        found = run_bench(lm, saes, config, examples=examples, scr=scr, on_progress=said)
        if context.rank == 0:
            matches = compare(saes)
            print(_report(found, matches, config), flush=True)
            if args.output is not None:
                _write(args, found, matches, saes, config, model=lm_path.name)


def _open(args: argparse.Namespace) -> "dict[str, SAESource]":
    """The SAEs by name; those of several sources by source and name."""
    from steerscale.interp.sources import open_sae
    from steerscale.load import newest_checkpoint
    from steerscale.rundir import CONFIG
    from steerscale.sae.trained import trained_names

    if args.sae is not None and len(args.source) > 1:
        raise ConfigError("--sae names SAEs of one run: give one source, or leave it out")
    found: dict[str, SAESource] = {}
    for path in args.source:
        is_run = (path / CONFIG).is_file()
        for name in (args.sae or trained_names(newest_checkpoint(path))) if is_run else [None]:
            label = path.name if name is None else name if len(args.source) == 1 else f"{path.name}:{name}"
            if label in found:
                raise ConfigError(f"two of the sources are called {label}: rename a directory")
            found[label] = open_sae(path, name=name, hook=args.hook)
    return found


class _Meter:
    """Progress with the time that is left, on a terminal."""

    def __init__(self) -> None:
        self._what, self._begin = "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        now = time.monotonic()
        if what != self._what:
            self._what, self._begin = what, now
        rest = format_duration((now - self._begin) / done * (total - done))
        end = "\n" if done >= total else ""
        print(f"\r{what}: {done:,} of {total:,}, ETA {rest}    ", end=end, file=sys.stderr, flush=True)


def _report(found: "dict[str, BenchResult]", matches: "dict[tuple[str, str], Matching]", config: "BenchConfig") -> str:
    rows: list[tuple[str, ...]]
    parts = []
    if any(one.probing for one in found.values()):
        rows = [("sparse probing", "dense", *(f"k={k}" for k in config.ks), *(f"coordinates k={k}" for k in config.ks))]
        for name, one in found.items():
            cells = [[record.dense for record in one.probing]]
            cells += [[record.sae[k] for record in one.probing] for k in config.ks]
            cells += [[record.coordinates[k] for record in one.probing] for k in config.ks]
            rows.append((name, *(f"{statistics.fmean(values):.4f}" for values in cells)))
        parts.append(_table(rows))
    if any(one.absorption for one in found.values()):
        rows = [("absorption", "letters", "probe F1", "latents F1", "split", "absorbed", "fraction")]
        for name, one in found.items():
            figures = zip(*((r.probe_f1, r.f1, len(r.main), r.rate, r.fraction) for r in one.absorption))
            rows.append((name, str(len(one.absorption)), *(f"{statistics.fmean(values):.4f}" for values in figures)))
        parts.append(_table(rows))
    if any(one.removal for one in found.values()):
        rows = [("removal", "label", "before", "oracle", *(f"score n={n}" for n in config.removed))]
        for name, one in found.items():
            for record in one.removal:
                scores = (f"{record.score[n]:.3f}" for n in config.removed)
                rows.append((name, record.label, f"{record.before:.4f}", f"{record.oracle:.4f}", *scores))
        parts.append(_table(rows))
    if matches:
        rows = [("first", "second", "mean max cosine", "found again", "mutual pairs")]
        for (first, second), one in matches.items():
            mean, again = (
                f"{one.mean_first:.3f} / {one.mean_second:.3f}",
                f"{one.found_first:.3f} / {one.found_second:.3f}",
            )
            rows.append((first, second, mean, again, f"{one.mutual:,}"))
        parts.append(_table(rows))
    return "\n\n".join(parts)


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def _write(
    args: argparse.Namespace,
    found: "dict[str, BenchResult]",
    matches: "dict[tuple[str, str], Matching]",
    saes: "dict[str, SAESource]",
    config: "BenchConfig",
    *,
    model: str,
) -> None:
    from dataclasses import asdict

    from steerscale.interp.sae_bench.export import write_saebench
    from steerscale.tokenizers.base import write_json

    values = {
        "model": model,
        "config": asdict(config),
        "saes": {name: one.values() for name, one in found.items()},
        "matching": [{"first": first, "second": second, **one.values()} for (first, second), one in matches.items()],
    }
    write_json(args.output / "bench.json", json.loads(json.dumps(values)))
    dataset = Path(args.data or args.task or args.scr or "words").name
    for name, one in found.items():
        write_saebench(args.output / "saebench", name, one, saes[name], config, model=model, dataset=dataset)
    print(f"written: {args.output}", file=sys.stderr)
