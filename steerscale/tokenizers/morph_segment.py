"""Where morphemes end: segmentations from Morfessor, from a lexicon, or from a file of the user's.

A segmentation is a function from a word (letters and marks) to the offsets, in characters, where a morpheme ends and the next
begins. A word it does not know has none.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from steerscale.errors import ConfigError
from steerscale.tokenizers.morph_lexicon import read_lexicon, read_segmentations

Segmentation = Callable[[str], Sequence[int]]

MORFESSOR, LEXICON = "morfessor", "lexicon:"
MORFESSOR_TYPES = 20_000
"""Morfessor learns from so many of the most frequent words; the others are cut by what it learned."""

LONGEST_WORD = 200
"""Letters. What is longer is no word (a sequence of DNA, say); Morfessor's time grows with the square and would be minutes."""


def find_segmentation(spec: str, words: Mapping[str, int]) -> Segmentation:
    """The segmentation that `tokenizer.segmentation` names.

    Args:
        spec: "morfessor" (learned from `words`), "lexicon:FILE", or a file with a word and its morphemes a line.
        words: the corpus' words and how often they occur.
    Raises ConfigError for anything else, or if the package `morfessor` is missing; DataError for files that cannot be read.
    """
    if spec == MORFESSOR:
        return train_morfessor(words)
    if spec.startswith(LEXICON):
        return in_any_case(read_lexicon(Path(spec.removeprefix(LEXICON))))
    if ".tsv" in spec or ".txt" in spec:
        return in_any_case(_from_table(read_segmentations(Path(spec))))
    raise ConfigError(
        f"tokenizer.segmentation={spec!r} is none: give morfessor, lexicon:FILE (SIGMORPHON or MorphyNet .tsv, hunspell .dic), "
        "or a .tsv of your own with a word, a tab and its morphemes a line"
    )


def write_segmentation(path: Path, words: Iterable[str], segmentation: Segmentation) -> int:
    """Write a table that `tokenizer.segmentation` takes, in order of the words (lower case); returns how many are cut."""
    rows = []
    for word in sorted({word.lower() for word in words if word.isalpha()}):
        if borders := segmentation(word):
            cuts = [0, *borders, len(word)]
            rows.append(f"{word}\t{' '.join(word[begin:end] for begin, end in itertools.pairwise(cuts))}\n")
    path.write_text("".join(rows), encoding="utf-8")
    return len(rows)


def cut_by(table: Mapping[str, Sequence[int]]) -> Callable[[str], list[bytes]]:
    """Words cut at the borders that a table has for them, if it has any."""
    segmentation = in_any_case(_from_table(table))

    def cut(word: str) -> list[bytes]:
        cuts = [0, *segmentation(word), len(word)]
        return [word[begin:end].encode() for begin, end in itertools.pairwise(cuts)]

    return cut


def in_any_case(segmentation: Segmentation) -> Segmentation:
    """Look a word up as it stands, then in lower case."""

    def segment(word: str) -> Sequence[int]:
        lower = word.lower()
        return segmentation(word) or (segmentation(lower) if len(lower) == len(word) else ())

    return segment


def byte_borders(word: str, segmentation: Segmentation, *, offset: int = 0) -> list[int]:
    """The borders of a word as offsets into its UTF-8 bytes, after `offset` bytes of something else."""
    return [offset + len(word[:border].encode()) for border in segmentation(word)]


def _from_table(table: Mapping[str, Sequence[int]]) -> Segmentation:
    return lambda word: table.get(word, ())


def train_morfessor(words: Mapping[str, int], *, types: int = MORFESSOR_TYPES) -> Segmentation:
    """Morfessor Baseline (Virpioja et al. 2013) learned from the `types` most frequent of the words, each counted once.

    Words are taken in lower case; those of more than LONGEST_WORD letters have no borders. The same words give the same
    segmentation, in any process.
    Raises ConfigError if the package is missing.
    """
    try:
        from morfessor import BaselineModel, utils
    except ImportError as error:
        raise ConfigError(
            "tokenizer.segmentation=morfessor needs the package: pip install 'steerscale[morph]'"
        ) from error
    counts: dict[str, int] = {}
    for word, count in words.items():
        if _is_word(word):
            counts[word.lower()] = counts.get(word.lower(), 0) + count
    chosen = sorted(counts, key=lambda word: (-counts[word], word))[:types]
    utils.show_progress_bar = False
    model = BaselineModel()
    model.load_data([(1, word) for word in chosen])
    state = random.getstate()
    random.seed(0)  # Morfessor goes through the words in an order drawn from the global generator
    try:
        model.train_batch()
    finally:
        random.setstate(state)

    @functools.cache
    def segment(lower: str) -> tuple[int, ...]:
        borders, at = [], 0
        for morph in model.viterbi_segment(lower)[0][:-1]:
            at += len(morph)
            borders.append(at)
        return tuple(borders)

    return lambda word: segment(word.lower()) if _is_word(word) and len(word.lower()) == len(word) else ()


def _is_word(text: str) -> bool:
    return text.isalpha() and len(text) <= LONGEST_WORD
