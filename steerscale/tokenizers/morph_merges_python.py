"""Byte-pair encoding with morpheme boundaries in plain Python: what `native/bpe.cpp` does, for machines without a compiler.

Pair counts are kept up to date, not counted anew: a merge changes only the pairs beside the places where it happens. The
heap holds outdated scores, which are put right when they come up.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence

SCORE_ONE = 1 << 20
"""What one occurrence inside a morpheme adds to a pair's score; scores are integers, so that no rounding decides."""

Pair = tuple[int, int]


class PythonTrainer:
    """Words as lists of token ids, and the merges learned from them."""

    def __init__(
        self,
        words: Sequence[bytes],
        borders: Sequence[Sequence[int]],
        counts: Sequence[int],
        *,
        tokens: Sequence[bytes],
        byte_ids: Sequence[int],
        keep: int,
    ) -> None:
        """Arguments as for `morph_merges.learn_merges`, with `keep` of SCORE_ONE for an occurrence across a boundary."""
        self.merges: list[tuple[int, int, int]] = []
        self._keep, self._counts = keep, counts
        self._tokens = list(tokens)
        self._ids = {token: number for number, token in reversed(list(enumerate(tokens)))}
        self._words = [[byte_ids[byte] for byte in word] for word in words]
        # borders[word][i]: whether a morpheme boundary lies before symbol i.
        self._borders = [[at in inside for at in range(len(word))] for word, inside in zip(words, map(set, borders))]
        self._inside: dict[Pair, int] = defaultdict(int)
        self._across: dict[Pair, int] = defaultdict(int)
        self._places: dict[Pair, list[int]] = defaultdict(list)
        self._changed: dict[Pair, None] = {}
        self._heap: list[tuple[int, int, int]] = []
        """(-score, left, right): ties go to the smaller pair, as in the `tokenizers` library."""

    def run(self, vocab_size: int) -> None:
        """Merge until there are `vocab_size` tokens or nothing is left to merge."""
        for word, symbols in enumerate(self._words):
            for at in range(1, len(symbols)):
                self._add(word, (symbols[at - 1], symbols[at]), border=self._borders[word][at])
        self._queue_changed()
        while len(self._tokens) < vocab_size and self._heap:
            queued, *pair = heapq.heappop(self._heap)
            left, right = pair
            score = self._score((left, right))
            if score == -queued:
                self._merge((left, right))
            elif 0 < score < -queued:  # it became rarer since; where it became more frequent, there is another entry
                heapq.heappush(self._heap, (-score, left, right))

    def starts(self) -> Iterator[bool]:
        """For every byte of the words in a row whether a token begins there."""
        for symbols in self._words:
            for symbol in symbols:
                yield True
                for _ in range(len(self._tokens[symbol]) - 1):
                    yield False

    def _score(self, pair: Pair) -> int:
        return SCORE_ONE * self._inside[pair] + self._keep * self._across[pair]

    def _add(self, word: int, pair: Pair, *, border: bool) -> None:
        (self._across if border else self._inside)[pair] += self._counts[word]
        places = self._places[pair]
        if not places or places[-1] != word:
            places.append(word)
        self._changed[pair] = None

    def _subtract(self, word: int, pair: Pair, *, border: bool) -> None:
        (self._across if border else self._inside)[pair] -= self._counts[word]

    def _queue_changed(self) -> None:
        for pair in self._changed:
            if (score := self._score(pair)) > 0:
                heapq.heappush(self._heap, (-score, *pair))
        self._changed.clear()

    def _merge(self, pair: Pair) -> None:
        text = self._tokens[pair[0]] + self._tokens[pair[1]]
        result = self._ids.get(text)  # two pairs can spell the same token
        if result is None:
            result = self._ids[text] = len(self._tokens)
            self._tokens.append(text)
        self.merges.append((*pair, result))
        for word in self._places.pop(pair):
            self._merge_word(word, pair, result)
        self._queue_changed()

    def _merge_word(self, word: int, pair: Pair, result: int) -> None:
        symbols, borders = self._words[word], self._borders[word]
        at = 0
        while at + 1 < len(symbols):
            if (symbols[at], symbols[at + 1]) == pair and (self._keep > 0 or not borders[at + 1]):
                self._subtract(word, pair, border=borders[at + 1])
                if at > 0:
                    self._subtract(word, (symbols[at - 1], pair[0]), border=borders[at])
                    self._add(word, (symbols[at - 1], result), border=borders[at])
                if at + 2 < len(symbols):
                    self._subtract(word, (pair[1], symbols[at + 2]), border=borders[at + 2])
                    self._add(word, (result, symbols[at + 2]), border=borders[at + 2])
                symbols[at : at + 2] = [result]
                del borders[at + 1]
            at += 1
