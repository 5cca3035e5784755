"""`steerscale data prepare` against bare sentencepiece on the same text and the same number of processes.

    python benchmarks/tokenize.py [--workers 2] [--repeats 5] [--type unigram] [--vocab-size 16384]

- ours: the whole command as a child process: start Python, read and decompress, tokenize, sort into splits, write, fsync,
  hash the source.
- reference, the faster of two, also a whole process: read and decompress the same lines, encode them with
  `SentencePieceProcessor.encode` (a) in forked processes that each take a part, (b) in one process with `num_threads`;
  nothing is written, the ids are thrown away.

Runs alternate; figures are medians. On a shared machine, --max-others discards the rounds in which others computed. The
last line is one JSON object; `ratio` is ours / reference in tokens per second, `cpu_ratio` in tokens per CPU second, which
a busy machine disturbs less.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where this script hides Python's module of its name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import lzma
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT.parent / "shared" / "data" / "corpora" / "de.txt.xz"
REPEATS_OF_SAMPLE = 8
BATCH = 10_000
PAUSE_SECONDS = 5
GOAL = 0.9
"""Of bare sentencepiece's tokens per second."""


class Run(NamedTuple):
    """One measured run."""

    wall: float
    """Seconds."""
    cpu: float
    """CPU seconds of all its processes together."""
    others: float
    """Cores that other programs used meanwhile."""


def main() -> None:
    """Measure and print."""
    args = _arguments()
    if args.reference:
        _reference(args.reference, args.model, args.text, args.workers)
        return
    from benchmarks._common import print_environment  # not in the reference's processes, whose start is timed

    environment = print_environment("sentencepiece")
    with tempfile.TemporaryDirectory(prefix="tokenize-") as name:
        directory = Path(name)
        text = _text(directory)
        tokenizer = directory / "tokenizer"
        _run("steerscale", "tokenizer", "train", text, "-o", tokenizer, "--type", args.type,
             "--vocab-size", args.vocab_size, "--input-sentence-size", 50000)  # fmt: skip
        runs: dict[str, list[Run]] = {"ours": [], "processes": [], "threads": []}
        for name in runs:
            _measure(name, directory, text, tokenizer, args.workers)  # warms the page cache
        discarded, begin = 0, time.monotonic()
        while min(map(len, runs.values())) < args.repeats and time.monotonic() - begin < args.patience:
            rounds = {name: _measure(name, directory, text, tokenizer, args.workers) for name in runs}
            if max(run.others for run in rounds.values()) > args.max_others:
                discarded += 1
                time.sleep(PAUSE_SECONDS)
                continue
            for name, run in rounds.items():
                runs[name].append(run)
        if not runs["ours"]:
            sys.exit(f"the machine was never quiet enough for --max-others {args.max_others}: nothing was measured")
        manifest = json.loads((directory / "dataset" / "manifest.json").read_text())
        _report(runs, manifest, text, args, discarded, environment)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-others", type=float, default=float("inf"), metavar="CORES",
                        help="discard rounds in which other programs used more than this (default: none)")  # fmt: skip
    parser.add_argument("--patience", type=float, default=900, metavar="SECONDS", help="give up after this long")
    parser.add_argument("--type", default="unigram")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--reference", choices=["processes", "threads"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _text(directory: Path) -> Path:
    if CORPUS.is_file():
        return CORPUS
    from steerscale.data.sample import sample_corpus

    text = directory / "sample.txt.xz"
    content = b"".join(lzma.decompress(path.read_bytes()) for path in sample_corpus())
    text.write_bytes(lzma.compress(content * REPEATS_OF_SAMPLE))
    return text


def _measure(name: str, directory: Path, text: Path, tokenizer: Path, workers: int) -> Run:
    output = directory / "dataset"
    if name == "ours":
        shutil.rmtree(output, ignore_errors=True)
    start, cpu, busy = time.perf_counter(), _cpu_seconds(), _busy_seconds()
    if name == "ours":
        _run("steerscale", "data", "prepare", text, "--tokenizer", tokenizer, "-o", output, "--workers", workers)
    else:
        _run(__file__, "--reference", name, "--model", tokenizer / "tokenizer.model", "--text", text,
             "--workers", workers)  # fmt: skip
    wall, cpu, busy = time.perf_counter() - start, _cpu_seconds() - cpu, _busy_seconds() - busy
    return Run(wall, cpu, max(0.0, busy - cpu) / wall)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _busy_seconds() -> float:
    """CPU seconds of everything on the machine since it started (Linux)."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split(maxsplit=8)[1:8])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _run(program: str, *arguments: object) -> None:
    start = ["-c", "import sys; from steerscale.cli import main; sys.exit(main())"]
    command = [sys.executable, *(start if program == "steerscale" else [program]), *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def _reference(how: str, model: str, text: Path, workers: int) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    with lzma.open(text, "rt", encoding="utf-8", newline="\n") as file:
        lines = file.read().split("\n")

    def encode(part: list[str], num_threads: int = 1) -> None:
        # In batches, because holding all the lists of ids at once would only slow it down.
        for begin in range(0, len(part), BATCH):
            processor.encode(part[begin : begin + BATCH], num_threads=num_threads)

    if how == "threads":
        encode(lines, workers)
        return

    fork = multiprocessing.get_context("fork")
    size = -(-len(lines) // workers)
    parts = [fork.Process(target=encode, args=(lines[k * size : (k + 1) * size],)) for k in range(workers)]
    for process in parts:
        process.start()
    for process in parts:
        process.join()


def _report(runs: dict[str, list[Run]], manifest: dict, text: Path, args: argparse.Namespace, discarded: int,
            environment: dict) -> None:  # fmt: skip
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    text_bytes = sum(split["bytes"] for split in manifest["splits"].values())
    medians = {name: statistics.median(run.wall for run in mine) for name, mine in runs.items()}
    cpu = {name: statistics.median(run.cpu for run in mine) for name, mine in runs.items()}
    others = statistics.median(run.others for mine in runs.values() for run in mine)
    reference = min(("processes", "threads"), key=medians.__getitem__)
    print(f"{text.name}: {text_bytes / 1e6:.1f} MB of text, {tokens / 1e6:.2f} M tokens; {args.type}, "
          f"{args.vocab_size} tokens; {args.workers} workers; {len(runs['ours'])} alternating rounds, "
          f"{discarded} discarded; other programs used {others:.2f} cores")  # fmt: skip
    print(f"{'':<24}{'median s':>10}{'min s':>8}{'max s':>8}{'CPU s':>8}{'M tokens/s':>12}{'MB/s':>8}")
    labels = {"ours": "data prepare", "processes": "sentencepiece, processes", "threads": "sentencepiece, threads"}
    for name, label in labels.items():
        median, values = medians[name], [run.wall for run in runs[name]]
        print(f"{label:<24}{median:>10.2f}{min(values):>8.2f}{max(values):>8.2f}{cpu[name]:>8.2f}"
              f"{tokens / median / 1e6:>12.2f}{text_bytes / median / 1e6:>8.1f}")  # fmt: skip
    from benchmarks._common import against

    ratio = round(medians[reference] / medians["ours"], 3)
    print(f"ours / {reference}: {against(ratio, GOAL)}")
    print(json.dumps({
        "benchmark": "tokenize",
        "type": args.type,
        "vocab_size": args.vocab_size,
        "workers": args.workers,
        "text_mb": round(text_bytes / 1e6, 1),
        "tokens": tokens,
        "ours_tokens_per_s": round(tokens / medians["ours"]),
        "reference_tokens_per_s": round(tokens / medians[reference]),
        "reference": reference,
        "other_cores": round(others, 2),
        "cpu_ratio": round(cpu[reference] / cpu["ours"], 3),
        "ratio": ratio,
        "environment": environment,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
