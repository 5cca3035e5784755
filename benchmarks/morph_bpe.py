"""`steerscale tokenizer train --type morph_bpe` against sentencepiece's BPE trainer on the same text, one after the other.

    python benchmarks/morph_bpe.py [--corpus FILE] [--megabytes 14] [--vocab-size 16384] [--repeats 3]

- ours: texts -> words -> merges -> tokenizer.json, by `train_tokenizer`; with bias 0 (plain BPE), and with bias 0.9 and a
  segmentation from a table, which is how it is trained once morphemes are known (Morfessor's own learning is not our code and
  takes minutes; its seconds are not in here).
- reference: sentencepiece's BPE with the same lines and number of tokens, by the settings of `--type bpe`, which allow it
  16 threads. The trainer of `tokenizers` is timed as well.

All run in this process; runs alternate, figures are medians. The last line is one JSON object; `ratio` is sentencepiece's
seconds / ours (the slower of the two), so above 0.5 is within the promise; `cpu_ratio` is in CPU seconds, which a busy
machine disturbs less.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import lzma
import os
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for everyone

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from benchmarks._common import against, print_environment
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.morph_bpe import letter_words
from steerscale.tokenizers.morph_segment import write_segmentation
from steerscale.tokenizers.morph_words import count_words, pre_tokenizer
from steerscale.tokenizers.registry import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT.parent / "shared" / "data" / "corpora" / "cs.txt.xz"
GOAL = 0.5
"""At most twice the seconds of sentencepiece."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument(
        "--megabytes", type=float, default=14.0, help="of text, from the beginning (default: %(default)s)"
    )
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    environment = print_environment("sentencepiece", "tokenizers")
    with lzma.open(args.corpus, "rt", encoding="utf-8") as file:
        lines = file.read(int(args.megabytes * 1e6)).split("\n")
    size = sum(len(line.encode()) for line in lines)
    with tempfile.TemporaryDirectory() as directory:
        table = Path(directory) / "thirds.tsv"
        write_segmentation(table, letter_words(count_words(lines)), _thirds)
        runs = _runs(lines, args.vocab_size, str(table))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        cpu: dict[str, list[float]] = {name: [] for name in runs}
        runs["ours, bias 0.9"]()  # compiles the trainer
        for number in range(args.repeats):
            for name, run in runs.items():
                begin, cpu_begin = time.perf_counter(), time.process_time()
                run()
                seconds[name].append(time.perf_counter() - begin)
                cpu[name].append(time.process_time() - cpu_begin)
                print(f"[{number + 1}/{args.repeats}] {name:<16}{seconds[name][-1]:8.2f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu.items()}
    print(f"{size / 1e6:.1f} MB, {args.vocab_size:,} tokens")
    for name, median in medians.items():
        span = f"from {min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(f"{name:<16}{median:8.2f} s  ({span}), {cpu_medians[name]:.2f} CPU seconds")
    print(f"sentencepiece's seconds / ours: {against(_ratio(medians), GOAL)}; CPU {against(_ratio(cpu_medians), GOAL)}")
    result = {
        "benchmark": "morph_bpe",
        "environment": environment,
        "bytes": size,
        "vocab_size": args.vocab_size,
        "seconds": medians,
        "cpu": cpu_medians,
    }
    print(json.dumps({**result, "ratio": _ratio(medians), "cpu_ratio": _ratio(cpu_medians)}))


def _ratio(medians: dict[str, float]) -> float:
    return medians["sentencepiece"] / max(medians["ours, bias 0"], medians["ours, bias 0.9"])


def _runs(lines: list[str], vocab_size: int, table: str) -> dict[str, Callable[[], object]]:
    def ours(bias: float, segmentation: str | None) -> object:
        config = TokenizerConfig(type="morph_bpe", vocab_size=vocab_size, bias=bias, segmentation=segmentation)
        return train_tokenizer(config, lines)

    def reference() -> object:
        return train_tokenizer(TokenizerConfig(type="bpe", vocab_size=vocab_size), lines)

    def huggingface() -> object:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizer()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(lines, trainer)
        return backend

    return {
        "ours, bias 0": lambda: ours(0.0, None),
        "ours, bias 0.9": lambda: ours(0.9, table),
        "sentencepiece": reference,
        "tokenizers": huggingface,
    }


def _thirds(word: str) -> list[int]:
    """Some borders, about as many as morphemes have."""
    return list(range(3, len(word) - 1, 3))


if __name__ == "__main__":
    main()
