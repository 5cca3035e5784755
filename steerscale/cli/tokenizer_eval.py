"""`steerscale tokenizer eval`: several tokenizers side by side, as tables and, with -o, as JSON and a plot."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerscale.tokenizers.morph_eval import TextScores
    from steerscale.tokenizers.morph_metrics import MorphScores

TEXT_COLUMNS = {
    "fertility": "tokens/word",
    "bytes_per_token": "bytes/token",
    "coverage": "coverage",
    "renyi_efficiency": "Renyi eff.",
    "used": "used",
    "mb_per_second": "MB/s",
}
MORPH_COLUMNS = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "parts": "parts/word",
    "edit_distance": "edit dist.",
    "consistency_f1": "consist. F1",
    "stem_consistency": "stems",
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register `steerscale tokenizer eval`."""
    from steerscale.cli.tokenizer import add_reading_arguments

    parser = commands.add_parser("eval", help="compare tokenizers on texts and against gold morphemes")
    parser.add_argument(
        "tokenizers", nargs="+", metavar="TOK", help="tokenizer directory, ours or of a Hugging Face model"
    )
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="texts; a row of the table for each")
    parser.add_argument("--gold", type=Path, metavar="FILE.tsv", help="a word, a tab and its morphemes a line")
    parser.add_argument(
        "--segmentation",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.tsv",
        help="segmentations to score against gold as well; a word that is not in one is whole",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="write eval.json and eval.png there")
    add_reading_arguments(parser)
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from steerscale.errors import ConfigError
    from steerscale.tokenizers.morph_eval import overlaps, spellings_of
    from steerscale.tokenizers.registry import load_tokenizer

    if not args.text and args.gold is None:
        raise ConfigError("there is nothing to evaluate on: give --text FILE, --gold FILE.tsv or both")
    if args.segmentation and args.gold is None:
        raise ConfigError("--segmentation is scored against gold morphemes: give --gold FILE.tsv as well")
    names = _names(args.tokenizers)
    spellings = spellings_of({name: load_tokenizer(path) for name, path in names.items()})
    sizes = {name: spelling.tokenizer.vocab_size for name, spelling in spellings.items()}
    texts = _score_texts(args, spellings)
    gold = _score_gold(args, spellings)
    shared = overlaps(spellings)
    if texts:
        _print_texts(texts, sizes)
    if gold:
        first = next(iter(gold.values()))
        print(f"\n{args.gold}: {first.words:,} words, {first.morphemes:.2f} morphemes a word")
        _print_table("", list(MORPH_COLUMNS.values()), {name: _cells(s, MORPH_COLUMNS) for name, s in gold.items()})
    if len(shared) > 1:
        print("\nshare of vocabulary in common")
        _print_table("", list(shared), {n: [f"{v:.3f}" for v in row.values()] for n, row in shared.items()})
    if args.output is not None:
        from steerscale.tokenizers.base import write_json
        from steerscale.tokenizers.morph_plot import plot_comparison

        args.output.mkdir(parents=True, exist_ok=True)
        found = {
            "vocab_size": sizes,
            "texts": {text: {name: asdict(s) for name, s in rows.items()} for text, rows in texts.items()},
            "gold": {name: asdict(s) for name, s in gold.items()},
            "overlap": shared,
        }
        write_json(args.output / "eval.json", found)
        plot_comparison(args.output / "eval.png", found)


def _score_texts(args: argparse.Namespace, spellings: Mapping[str, Any]) -> "dict[str, dict[str, TextScores]]":
    from steerscale.data.blocks import Reading, read_texts
    from steerscale.data.sources import find_sources
    from steerscale.tokenizers.morph_eval import score_text

    reading = Reading(documents=args.documents, text_key=args.text_key)
    rows: dict[str, dict[str, TextScores]] = {}
    for text in args.text:
        sources = find_sources([text], format=args.format)
        rows[text] = {name: score_text(s, read_texts(sources, reading)) for name, s in spellings.items()}
    return rows


def _score_gold(args: argparse.Namespace, spellings: Mapping[str, Any]) -> "dict[str, MorphScores]":
    from steerscale.tokenizers.morph_lexicon import read_gold, read_segmentations
    from steerscale.tokenizers.morph_metrics import score_words
    from steerscale.tokenizers.morph_segment import cut_by

    if args.gold is None:
        return {}
    gold = read_gold(args.gold)
    cuts = {path.name: cut_by(read_segmentations(path)) for path in args.segmentation}
    cuts |= {name: spelling.word for name, spelling in spellings.items()}
    return {name: score_words(cut, gold) for name, cut in cuts.items()}


def _names(paths: list[str]) -> dict[str, str]:
    """Short names: directories' own, or the paths where those would not tell them apart."""
    short = [Path(path).name for path in paths]
    return dict(zip(short if len(set(short)) == len(paths) else paths, paths))


def _print_texts(texts: "dict[str, dict[str, TextScores]]", sizes: Mapping[str, int]) -> None:
    for text, rows in texts.items():
        print(f"\n{text}")
        cells = {name: [f"{sizes[name]:,}", *_cells(scores, TEXT_COLUMNS)] for name, scores in rows.items()}
        _print_table("", ["vocabulary", *TEXT_COLUMNS.values()], cells)


def _cells(scores: Any, columns: Mapping[str, str]) -> list[str]:
    return [f"{getattr(scores, key):.3f}" for key in columns]


def _print_table(corner: str, columns: list[str], rows: Mapping[str, list[str]]) -> None:
    first = max(map(len, [corner, *rows]))
    widths = [max(len(text) for text in (title, *(row[i] for row in rows.values()))) for i, title in enumerate(columns)]
    print("  ".join([corner.ljust(first), *(title.rjust(width) for title, width in zip(columns, widths))]))
    for name, row in rows.items():
        print("  ".join([name.ljust(first), *(text.rjust(width) for text, width in zip(row, widths))]))
