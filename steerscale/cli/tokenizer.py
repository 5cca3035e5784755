"""`steerscale tokenizer train | segment | eval | show`."""

import argparse
from pathlib import Path

from steerscale.cli import tokenizer_eval


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register `steerscale tokenizer`."""
    parser = subparsers.add_parser("tokenizer", help="train a tokenizer, or look at one")
    commands = parser.add_subparsers(dest="tokenizer_command", metavar="COMMAND", required=True)
    train = commands.add_parser("train", help="learn a vocabulary from text files")
    train.add_argument("inputs", nargs="+", metavar="INPUT", help="text file (also compressed), or sample:german")
    train.add_argument("-o", "--output", type=Path, required=True, help="new directory for the tokenizer")
    train.add_argument("--type", default="unigram", help="unigram (default), bpe or morph_bpe")
    train.add_argument("--vocab-size", type=int, default=16384, help="tokens in all (default: %(default)s)")
    train.add_argument("--character-coverage", type=float, default=0.9995, help="rest in bytes (default: %(default)s)")
    train.add_argument(
        "--bias", type=float, help="morph_bpe: 0 plain BPE .. 1 no merge across morphemes (default: 0.9)"
    )
    train.add_argument(
        "--segmentation",
        metavar="FROM",
        help="morph_bpe: morfessor (default), lexicon:FILE (SIGMORPHON or MorphyNet .tsv, hunspell .dic), or your FILE.tsv",
    )
    train.add_argument("--special", action="append", default=[], metavar="TEXT", help="always one token; repeatable")
    train.add_argument("--input-sentence-size", type=int, default=0, help="learn from so many random lines (0: all)")
    train.add_argument("--seed", type=int, default=0, help="chooses those lines (default: %(default)s)")
    add_reading_arguments(train)
    train.add_argument("--force", action="store_true", help="replace an existing tokenizer")
    train.set_defaults(run=_train)
    segment = commands.add_parser("segment", help="write the morphemes of a corpus' words to a table")
    segment.add_argument("inputs", nargs="+", metavar="INPUT", help="text file (also compressed), or sample:german")
    segment.add_argument(
        "-o", "--output", type=Path, required=True, help="new .tsv: a word, a tab and its morphemes a line"
    )
    segment.add_argument(
        "--segmentation", default="morfessor", metavar="FROM", help="as for train (default: morfessor)"
    )
    segment.add_argument(
        "--also", type=Path, metavar="FILE.tsv", help="cut this table's words too, but do not learn from them"
    )
    add_reading_arguments(segment)
    segment.set_defaults(run=_segment)
    tokenizer_eval.add_parser(commands)
    show = commands.add_parser("show", help="what a tokenizer is, and how it cuts a text")
    show.add_argument("tokenizer", type=Path, help="tokenizer directory, ours or of a Hugging Face model")
    show.add_argument("text", nargs="?", help="a text to tokenize")
    show.set_defaults(run=_show)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say how text inputs are understood."""
    parser.add_argument("--format", default="auto", help="auto (default), txt, jsonl, parquet or hf (`datasets`)")
    parser.add_argument(
        "--documents",
        choices=("line", "blank-line"),
        default="line",
        help="what ends a document in a txt (default: line)",
    )
    parser.add_argument("--text-key", default="text", help="field or column of the text (default: %(default)s)")


def _train(args: argparse.Namespace) -> None:
    from steerscale.data.blocks import Reading, read_texts
    from steerscale.data.sources import describe_sources, find_sources
    from steerscale.tokenizers.config import TokenizerConfig
    from steerscale.tokenizers.directory import new_directory
    from steerscale.tokenizers.registry import train_tokenizer

    config = TokenizerConfig(
        type=args.type,
        vocab_size=args.vocab_size,
        character_coverage=args.character_coverage,
        bias=args.bias,
        segmentation=args.segmentation,
        special=args.special,
        input_sentence_size=args.input_sentence_size,
        seed=args.seed,
    )
    sources = find_sources(args.inputs, format=args.format)
    texts = read_texts(sources, Reading(documents=args.documents, text_key=args.text_key))
    with new_directory(args.output, force=args.force) as directory:
        tokenizer = train_tokenizer(config, texts, sources=describe_sources(sources))
        tokenizer.save(directory)
    print(f"{args.output}: {tokenizer.type} tokenizer, {tokenizer.vocab_size} tokens, hash {tokenizer.hash[:12]}")


def _segment(args: argparse.Namespace) -> None:
    from steerscale.data.blocks import Reading, read_texts
    from steerscale.data.sources import find_sources
    from steerscale.errors import DataError
    from steerscale.tokenizers.morph_bpe import letter_words
    from steerscale.tokenizers.morph_lexicon import read_gold
    from steerscale.tokenizers.morph_segment import find_segmentation, write_segmentation
    from steerscale.tokenizers.morph_words import count_words

    if args.output.exists():
        raise DataError(f"{args.output} exists already: choose another output file")
    texts = read_texts(find_sources(args.inputs, format=args.format), Reading(args.documents, args.text_key))
    counted = letter_words(count_words(texts))
    words = {*counted, *(read_gold(args.also) if args.also else ())}
    cut = write_segmentation(args.output, words, find_segmentation(args.segmentation, counted))
    print(f"{args.output}: {cut:,} of {len(words):,} different words have several morphemes")


def _show(args: argparse.Namespace) -> None:
    from steerscale.tokenizers.registry import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    print(f"type {tokenizer.type}, {tokenizer.vocab_size} tokens, eos {tokenizer.eos_id}, hash {tokenizer.hash}")
    if args.text is not None:
        ids = tokenizer.encode(args.text)
        print(f"{len(ids)} tokens, {len(args.text.encode())} bytes")
        for token in ids:
            print(f"{token:>8}  {tokenizer.piece(token)}")
