"""Words with borders to learn merges from, and the plainest way there is to learn them."""

import lzma
from collections import Counter

from steerscale.data.sample import sample_corpus
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.morph_bpe import first_tokens

TEXTS = lzma.decompress(sample_corpus()[0].read_bytes()).decode().split("\n")[:1200]
TOKENS = first_tokens(TokenizerConfig(type="morph_bpe"))
BYTE_IDS = [TOKENS.index(bytes([byte])) for byte in range(256)]


def merge_plainly(
    words: list[bytes], borders: list[list[int]], counts: list[int], *, vocab_size: int, bias: float
) -> list[tuple[int, int, int]]:
    """Merges by the definition: count every pair anew before every merge."""
    tokens, merges = list(TOKENS), []
    cut = [[BYTE_IDS[byte] for byte in word] for word in words]
    flags = [[at in inside for at in range(len(word))] for word, inside in zip(words, borders)]
    while len(tokens) < vocab_size:
        scores: Counter[tuple[int, int]] = Counter()
        for symbols, marks, count in zip(cut, flags, counts):
            for at in range(1, len(symbols)):
                scores[symbols[at - 1], symbols[at]] += count * ((1 - bias) if marks[at] else 1)
        pair = min(scores, key=lambda pair: (-scores[pair], pair), default=None)
        if pair is None or scores[pair] <= 0:
            break
        text = tokens[pair[0]] + tokens[pair[1]]
        if text not in tokens:
            tokens.append(text)
        merges.append((*pair, tokens.index(text)))
        for symbols, marks in zip(cut, flags):
            at = 0
            while at + 1 < len(symbols):
                if (symbols[at], symbols[at + 1]) == pair and not (bias == 1 and marks[at + 1]):
                    symbols[at : at + 2] = [merges[-1][2]]
                    del marks[at + 1]
                at += 1
    return merges
