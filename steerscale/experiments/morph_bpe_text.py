"""The texts of the experiment, the tokenizers learned from them, and both as datasets."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from steerscale.data.blocks import Reading, read_texts
from steerscale.data.prepare import PrepareConfig, prepare_dataset
from steerscale.data.sources import find_sources
from steerscale.errors import DataError
from steerscale.experiments.morph_bpe_config import LanguageConfig, MorphBPEConfig
from steerscale.experiments.stages import Bench, Results
from steerscale.rundir import write_text
from steerscale.tokenizers.directory import new_directory
from steerscale.tokenizers.morph_bpe import letter_words
from steerscale.tokenizers.morph_eval import score_text
from steerscale.tokenizers.morph_lexicon import read_gold
from steerscale.tokenizers.morph_metrics import score_words
from steerscale.tokenizers.morph_segment import MORFESSOR, find_segmentation, write_segmentation
from steerscale.tokenizers.morph_spelling import Spelling
from steerscale.tokenizers.morph_words import count_words
from steerscale.tokenizers.registry import load_tokenizer, train_tokenizer

TRAIN, IN_DOMAIN, OUT_OF_DOMAIN = "train", "in_domain", "out_of_domain"
SEGMENTATION = "morfessor.tsv"


def choose_texts(config: MorphBPEConfig, bench: Bench) -> Results:
    """Draw the lines to train on and those held out, for each language."""
    return {
        name: _choose(language, config, bench.directory / name, seed=config.seed)
        for name, language in config.languages.items()
    }


def train_tokenizers(config: MorphBPEConfig, bench: Bench) -> Results:
    """Every tokenizer for each language, and how it cuts."""
    found: Results = {}
    for name in config.languages:
        bench.part(f"{name}.{SEGMENTATION}", partial(_segment, config, bench, name))
        found[name] = {
            kind: bench.part(f"{name}.{kind}", partial(_train_one, config, bench, name, kind))
            for kind in config.tokenizers
        }
    return found


def _train_one(config: MorphBPEConfig, bench: Bench, name: str, kind: str) -> Results:
    """One of them; what an earlier start left in its place may be of other settings, and goes."""
    settings, gold = config.tokenizers[kind], config.languages[name].gold
    target = tokenizer_dir(bench.root, name, kind)
    if settings.type == "morph_bpe" and settings.bias != 0 and settings.segmentation in (None, MORFESSOR):
        settings = replace(settings, segmentation=str(bench.directory / name / SEGMENTATION))
    with new_directory(target, force=True) as directory:
        train_tokenizer(settings, _lines(_text(bench.root, name, TRAIN))).save(directory)
    spelling = Spelling(load_tokenizer(target))
    held_out = {domain: _text(bench.root, name, domain) for domain in (IN_DOMAIN, OUT_OF_DOMAIN)}
    return {
        "text": {domain: asdict(score_text(spelling, _lines(path))) for domain, path in held_out.items()},
        "gold": asdict(score_words(spelling.word, read_gold(Path(gold)), seed=config.seed)) if gold else None,
    }


def prepare_datasets(config: MorphBPEConfig, bench: Bench) -> Results:
    """Every text cut by every tokenizer."""
    found: Results = {}
    jobs = [(name, kind, part) for name in config.languages for kind in config.tokenizers for part in SPLITS]
    for name, kind, part in bench.track(jobs):
        manifest = prepare_dataset(
            [str(_text(bench.root, name, part))],
            tokenizer=tokenizer_dir(bench.root, name, kind),
            output=dataset(bench.root, name, kind, part),
            config=PrepareConfig(split=SPLITS[part]),
            force=True,
        )
        (info,) = manifest.splits.values()
        found.setdefault(name, {}).setdefault(kind, {})[part] = {
            "tokens": info.tokens,
            "bytes": info.bytes,
            "bytes_per_token": info.bytes_per_token,
        }
    return found


SPLITS = {TRAIN: [1.0, 0.0, 0.0], IN_DOMAIN: [0.0, 1.0, 0.0], OUT_OF_DOMAIN: [0.0, 1.0, 0.0]}
"""Part -> shares of train, valid and test: each is a dataset of its own."""


def tokenizer_dir(root: Path, language: str, kind: str) -> Path:
    """Where a tokenizer is."""
    return root / "tokenizers" / language / kind


def dataset(root: Path, language: str, kind: str, part: str) -> Path:
    """Where a text is, cut by a tokenizer."""
    return root / "datasets" / language / kind / part


def _text(root: Path, language: str, part: str) -> Path:
    return root / "texts" / language / f"{part}.txt"


def _lines(path: Path) -> Iterator[str]:
    return read_texts(find_sources([str(path)], format="txt"), Reading())


def _choose(language: LanguageConfig, config: MorphBPEConfig, directory: Path, *, seed: int) -> Results:
    elsewhere = [line.strip() for line in _lines_of(language.out_of_domain)]
    excluded = set(elsewhere)
    corpus = [line for line in map(str.strip, _lines_of(language.corpus)) if line not in excluded]
    generator = random.Random(seed)
    generator.shuffle(elsewhere)
    generator.shuffle(corpus)
    held_out, rest = _take(corpus, config.held_out_bytes, language.corpus)
    train, _ = _take(rest, config.text_bytes, language.corpus)
    out_of_domain, _ = _take(elsewhere, config.held_out_bytes, language.out_of_domain)
    parts = {TRAIN: train, IN_DOMAIN: held_out, OUT_OF_DOMAIN: out_of_domain}
    directory.mkdir(parents=True, exist_ok=True)
    for part, lines in parts.items():
        write_text(directory / f"{part}.txt", "\n".join(lines) + "\n")
    return {part: {"documents": len(lines), "bytes": _size(lines)} for part, lines in parts.items()}


def _lines_of(name: str) -> Iterator[str]:
    return read_texts(find_sources([name], format="auto"), Reading())


def _take(lines: Sequence[str], size: int, name: str) -> tuple[Sequence[str], Sequence[str]]:
    """As many first lines as make `size` bytes, and the rest."""
    taken = 0
    for number, line in enumerate(lines):
        if taken >= size:
            return lines[:number], lines[number:]
        taken += len(line.encode())
    if taken < size:
        raise DataError(f"{name} is too short: {size:,} bytes were to be drawn, {taken:,} were left")
    return lines, []


def _size(lines: Sequence[str]) -> int:
    return sum(len(line.encode()) for line in lines)


def _segment(config: MorphBPEConfig, bench: Bench, language: str) -> None:
    """What Morfessor makes of the language's training text, for all tokenizers that want it."""
    path = bench.directory / language / SEGMENTATION
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = any(
        one.type == "morph_bpe" and one.bias != 0 and one.segmentation in (None, MORFESSOR)
        for one in config.tokenizers.values()
    )
    if wanted:
        words = letter_words(count_words(_lines(_text(bench.root, language, TRAIN))))
        write_segmentation(path, words, find_segmentation(MORFESSOR, words))
