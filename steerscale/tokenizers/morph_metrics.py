"""How well the parts of words are their morphemes. Parts are bytes; gold morphemes are laid onto the word as it is spelled."""

import itertools
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from steerscale.tokenizers.morph_align import place_morphemes
from steerscale.tokenizers.morph_spelling import Cut

CONSISTENCY_WORDS = 4000
"""Consistency looks at all pairs of so many words, drawn if there are more."""


@dataclass(frozen=True, kw_only=True)
class MorphScores:
    """Of one tokenizer, or segmentation, against gold."""

    words: int
    """Gold words."""
    precision: float
    """Share of the borders inside words that are borders of morphemes."""
    recall: float
    """Share of the borders of morphemes that are found."""
    f1: float
    """Of these two, over all words together."""
    parts: float
    """Parts a word; `morphemes` would be right."""
    morphemes: float
    """Gold morphemes a word."""
    edit_distance: float
    """Mean edit distance between a word's morphemes and its parts, whole ones inserted, deleted or replaced."""
    consistency_f1: float
    """Of precision: of pairs of words that share a part, those that share a morpheme; recall: the other way round."""
    stem_consistency: float
    """Share of the words of a stem (all but the last morpheme, at least two words) that cut it off, and cut it as most do."""


def score_words(cut: Cut, gold: Mapping[str, Sequence[str]], *, seed: int = 0) -> MorphScores:
    """Compare the parts of the gold words with their morphemes. `gold`: word -> morphemes, also in dictionary form."""
    words = list(gold)
    morphemes = [_parts(word, gold[word]) for word in words]
    parts = [cut(word) for word in words]
    hits = found = wanted = 0
    for mine, theirs in zip(parts, morphemes):
        predicted, true = _borders(mine), _borders(theirs)
        hits += len(predicted & true)
        found += len(predicted)
        wanted += len(true)
    chosen = random.Random(seed).sample(range(len(words)), min(len(words), CONSISTENCY_WORDS))
    precision, recall = hits / max(found, 1), hits / max(wanted, 1)
    return MorphScores(
        words=len(words),
        precision=precision,
        recall=recall,
        f1=_f1(precision, recall),
        parts=float(np.mean([len(mine) for mine in parts])),
        morphemes=float(np.mean([len(theirs) for theirs in morphemes])),
        edit_distance=float(np.mean([_edit_distance(mine, theirs) for mine, theirs in zip(parts, morphemes)])),
        consistency_f1=_consistency([parts[i] for i in chosen], [morphemes[i] for i in chosen]),
        stem_consistency=_stem_consistency(parts, morphemes),
    )


def _parts(word: str, morphemes: Sequence[str]) -> list[bytes]:
    cuts = [0, *place_morphemes(word, morphemes), len(word)]
    return [word[begin:end].encode() for begin, end in itertools.pairwise(cuts)]


def _borders(parts: Sequence[bytes]) -> set[int]:
    return set(np.cumsum([len(part) for part in parts[:-1]]).tolist())


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _edit_distance(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    row = list(range(len(other) + 1))
    for number, part in enumerate(one, start=1):
        corner, row[0] = row[0], number
        for column, morpheme in enumerate(other, start=1):
            corner, row[column] = row[column], min(corner + (part != morpheme), row[column] + 1, row[column - 1] + 1)
    return row[-1]


def _consistency(parts: Sequence[Sequence[bytes]], morphemes: Sequence[Sequence[bytes]]) -> float:
    """F1 over pairs of words: sharing a part as the prediction of sharing a morpheme (arXiv 2502.00894)."""
    by_part, by_morpheme = _share(parts), _share(morphemes)
    both = by_part.multiply(by_morpheme).nnz
    return _f1(both / max(by_part.nnz, 1), both / max(by_morpheme.nnz, 1))


def _share(items: Sequence[Sequence[bytes]]) -> csr_matrix:
    """int [words, words], not 0 where two words have something in common; a word is no pair with itself."""
    ids: dict[bytes, int] = {}
    pairs = {(row, ids.setdefault(item, len(ids))) for row, present in enumerate(items) for item in present}
    rows, columns = np.array(sorted(pairs)).T
    has = csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape=(len(items), len(ids)))
    common = csr_matrix(has @ has.T)
    common.setdiag(0)
    common.eliminate_zeros()
    return common


def _stem_consistency(parts: Sequence[Sequence[bytes]], morphemes: Sequence[Sequence[bytes]]) -> float:
    stems: dict[tuple[bytes, ...], list[tuple[bytes, ...] | None]] = defaultdict(list)
    for mine, theirs in zip(parts, morphemes):
        if len(theirs) > 1:
            stem = tuple(theirs[:-1])
            stems[stem].append(_prefix(mine, len(b"".join(stem))))
    agree = words = 0
    for seen in stems.values():
        if len(seen) > 1:
            words += len(seen)
            whole = [cut for cut in seen if cut is not None]
            agree += max((whole.count(cut) for cut in set(whole)), default=0)
    return agree / max(words, 1)


def _prefix(parts: Sequence[bytes], length: int) -> tuple[bytes, ...] | None:
    """The first parts that make `length` bytes; None if a part goes on beyond."""
    size = 0
    for number, part in enumerate(parts):
        if size >= length:
            return tuple(parts[:number]) if size == length else None
        size += len(part)
    return None
