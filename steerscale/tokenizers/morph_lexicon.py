"""Segmentations from files: SIGMORPHON 2022 and MorphyNet tables, hunspell dictionaries, and tables of the user's."""

import gzip
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from steerscale.errors import DataError
from steerscale.tokenizers.morph_align import place_morphemes
from steerscale.tokenizers.morph_hunspell import read_hunspell

JOINT = "@@"
"""Before every morpheme but the first, in SIGMORPHON's tables."""


def read_lexicon(path: Path) -> Callable[[str], Sequence[int]]:
    """The borders of the words of a published lexicon; () for words it does not have.

    `.dic` is a hunspell dictionary with its `.aff` beside it. A table is SIGMORPHON's (word, morphemes joined by " @@",
    possibly a category), MorphyNet's of inflections (lemma, form, features, morphemes joined by "|") or of derivations (source,
    target, two parts of speech, affix, prefix or suffix); compressed with gzip or xz as well. Morphemes in dictionary form are
    aligned with the word (`morph_align`). Raises DataError for a file that is none of these.
    """
    if path.suffix == ".dic":
        return read_hunspell(path)
    table: dict[str, list[int]] = {}
    for number, columns in _rows(path):
        if len(columns) in (2, 3):
            word, morphemes = columns[0], _joined(columns[1])
        elif len(columns) == 4:
            word, morphemes = columns[1], [part for part in columns[3].split("|") if part not in ("", "-")]
        elif len(columns) == 6 and columns[5] in ("prefix", "suffix"):
            word, affix = columns[1], columns[4]
            morphemes = [affix, columns[0]] if columns[5] == "prefix" else [columns[0], affix]
        else:
            raise DataError(
                f"{path}, line {number}: {len(columns)} columns are neither SIGMORPHON's (2 or 3) nor MorphyNet's (4, or 6 "
                "with prefix or suffix at the end)"
            )
        if word and all(morphemes) and morphemes:
            table.setdefault(word, place_morphemes(word, morphemes))
    return lambda word: table.get(word, ())


def read_gold(path: Path) -> dict[str, list[str]]:
    """Word -> morphemes, of a table with a word, a tab and its morphemes a line (joined by " @@" or by spaces).

    Raises DataError for a file that is not one.
    """
    gold = {}
    for number, columns in _rows(path):
        if len(columns) < 2 or not columns[0] or not (morphemes := _joined(columns[1])):
            raise DataError(f"{path}, line {number}: expected a word, a tab and its morphemes, got {columns}")
        gold[columns[0]] = morphemes
    if not gold:
        raise DataError(f"{path} holds no words")
    return gold


def read_segmentations(path: Path) -> dict[str, list[int]]:
    """Word -> borders, of a table as `read_gold` takes it whose morphemes in a row are the word.

    Raises DataError, naming the line, if one is not; morphemes in dictionary form are for `lexicon:FILE`.
    """
    borders = {}
    for word, morphemes in read_gold(path).items():
        if "".join(morphemes) != word:
            raise DataError(
                f"{path}: {' '.join(morphemes)!r} in a row is not {word!r}; for morphemes in dictionary form write "
                f"lexicon:{path}"
            )
        borders[word] = place_morphemes(word, morphemes)
    return borders


def _joined(text: str) -> list[str]:
    parts = text.split()
    return [bare for part in parts if (bare := part.removeprefix(JOINT))] if JOINT in text else parts


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    openers = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if stripped := line.rstrip("\r\n"):
                    yield number, stripped.split("\t")
    except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a table of morphemes: {error}") from error
