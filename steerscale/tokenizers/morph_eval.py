"""Several tokenizers side by side: on texts, against gold morphemes, and by what is in their vocabularies."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from steerscale.errors import DataError
from steerscale.tokenizers.base import Tokenizer
from steerscale.tokenizers.morph_spelling import Spelling

RENYI_ALPHA = 2.5
"""Order of the entropy (Zouhar et al. 2023, arXiv 2306.16842)."""
BATCH = 1000
"""Documents encoded at once."""


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """Of a tokenizer on one text."""

    fertility: float
    """Tokens a word, words being what stands between white space."""
    bytes_per_token: float
    """UTF-8 bytes of text a token stands for; ends of documents are not counted."""
    coverage: float
    """Share of the bytes in tokens that are whole characters, neither unknown nor spelled in bytes."""
    renyi_efficiency: float
    """Renyi entropy of order 2.5 of the tokens' frequencies, of its maximum over the whole vocabulary: 1 is even use."""
    used: float
    """Share of the vocabulary that occurs."""
    mb_per_second: float
    """Encoding speed, 1e6 bytes of UTF-8 a second, as `data prepare` encodes in one process; of this machine at this time."""


def score_text(spelling: Spelling, texts: Iterable[str]) -> TextScores:
    """Encode `texts`, documents in any number. Raises DataError if there is nothing in them."""
    tokenizer = spelling.tokenizer
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    words = size = 0
    seconds = 0.0
    for batch in _batches(texts):
        words += sum(len(text.split()) for text in batch)
        size += sum(len(text.encode()) for text in batch)
        begin = time.perf_counter()
        documents = tokenizer.encode_documents(batch)
        seconds += time.perf_counter() - begin
        for document in documents:
            counts += np.bincount(document[:-1], minlength=len(counts))
    tokens = int(counts.sum())
    if not tokens or not words:
        raise DataError("there is no text to evaluate tokenizers on: the input holds nothing but white space")
    unknown = tokenizer.id_of("<unk>")
    whole = np.array([token != unknown and _is_whole(spelling[token]) for token in range(len(counts))])
    lengths = np.array([len(spelling[token]) for token in range(len(counts))])
    return TextScores(
        fertility=tokens / words,
        bytes_per_token=size / tokens,
        coverage=float((counts * lengths)[whole].sum() / max((counts * lengths).sum(), 1)),
        renyi_efficiency=renyi_efficiency(counts),
        used=float((counts > 0).mean()),
        mb_per_second=size / 1e6 / max(seconds, 1e-9),
    )


def renyi_efficiency(counts: np.ndarray, alpha: float = RENYI_ALPHA) -> float:
    """Renyi entropy of the frequencies, H = ln(sum p^alpha) / (1 - alpha), of ln(number of entries). counts: int [V]."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.log((shares**alpha).sum()) / (1 - alpha) / np.log(len(counts)))


def overlaps(spellings: Mapping[str, Spelling]) -> dict[str, dict[str, float]]:
    """Share of the entries of two vocabularies that are in both (Jaccard), by what their tokens spell."""
    vocabularies = {name: spelling.vocabulary() for name, spelling in spellings.items()}
    return {
        one: {other: len(mine & theirs) / len(mine | theirs) for other, theirs in vocabularies.items()}
        for one, mine in vocabularies.items()
    }


def spellings_of(tokenizers: Mapping[str, Tokenizer]) -> dict[str, Spelling]:
    """Raises DataError, naming the tokenizer, for one that cannot be compared."""
    found = {}
    for name, tokenizer in tokenizers.items():
        try:
            found[name] = Spelling(tokenizer)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    return found


def _is_whole(spelled: bytes) -> bool:
    try:
        spelled.decode()
    except UnicodeDecodeError:
        return False
    return True


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
