"""Morphemes as dictionaries write them ("ingenuity s") laid onto the word as it is spelled ("ingenuities")."""

import itertools
from collections.abc import Sequence


def place_morphemes(word: str, morphemes: Sequence[str]) -> list[int]:
    """Offsets in (0, len(word)), ascending, where a morpheme of `word` ends and the next begins.

    Where the morphemes in a row are the word, these are their borders. Otherwise their letters are aligned with the word's at
    the smallest edit distance (insertion, deletion and substitution cost 1); among equal alignments, and where letters are in
    the word alone, a border lies as far to the left as it can, so what is inserted belongs to what follows. A morpheme that
    is not to be seen in the word has no border.
    """
    borders = list(itertools.accumulate(map(len, morphemes[:-1])))
    written = "".join(morphemes)
    if written == word:
        return borders
    where = _align(written, word)
    return sorted({where[border] for border in borders if 0 < where[border] < len(word)})


def _align(written: str, word: str) -> list[int]:
    """For each offset in `written` the leftmost one in `word` to which an alignment of smallest edit distance takes it."""
    before = _distances(written, word)
    after = [row[::-1] for row in _distances(written[::-1], word[::-1])][::-1]
    best = before[-1][-1]
    return [
        next(offset for offset in range(len(word) + 1) if row[offset] + rest[offset] == best)
        for row, rest in zip(before, after)
    ]


def _distances(source: str, target: str) -> list[list[int]]:
    """Edit distance of every prefix of `source` to every prefix of `target`."""
    table = [list(range(len(target) + 1))]
    for number, letter in enumerate(source, start=1):
        row = [number]
        for column, other in enumerate(target):
            row.append(min(table[-1][column] + (letter != other), table[-1][column + 1] + 1, row[-1] + 1))
        table.append(row)
    return table
