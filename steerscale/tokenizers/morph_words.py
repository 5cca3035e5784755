"""What byte-pair encoding counts: the words of a text, as the pre-tokenizer of the finished `tokenizer.json` cuts them.

Each word is letters (marks included), digits or other signs, with the space before it; longer white space stands alone. A byte
is written as one character, as GPT-2's tokenizer and all later byte-level ones do.
"""

import re
from collections import Counter
from collections.abc import Iterable

import tokenizers
from tokenizers import pre_tokenizers

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's, but a combining mark belongs to its letter."""

# The pattern never goes on from a sign to white space, so what is cut there can be counted before it is cut further: far fewer
# different chunks than chunks go through the pre-tokenizer. U+001C to U+001F are white space to Python, not to the pattern.
_CHUNK = re.compile(r"\s*\S+|\s+")
_DISPUTED = re.compile("[\x1c-\x1f]")
# Latin letters alone are one word by any version of Unicode: most chunks need no cutting.
_WHOLE = re.compile(" ?[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]+")


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Of every tokenizer trained here."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_characters() -> list[str]:
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
"""How byte-level tokenizers write each byte in their vocabulary (Radford et al. 2019): no control characters or white space."""
_BYTES = {ord(character): byte for byte, character in enumerate(BYTE_CHARACTERS)}


def spell(text: bytes) -> str:
    """Bytes as a byte-level vocabulary writes them."""
    return "".join(BYTE_CHARACTERS[byte] for byte in text)


def unspell(piece: str) -> bytes | None:
    """The bytes of a vocabulary entry; None if it is not written that way."""
    return _unspelled(piece) if all(ord(character) in _BYTES for character in piece) else None


def _unspelled(piece: str) -> bytes:
    return piece.translate(_BYTES).encode("latin-1")


def count_words(texts: Iterable[str]) -> dict[bytes, int]:
    """Every word of the texts (UTF-8) and how often it occurs, in order of the bytes."""
    chunks: Counter[str] = Counter()
    for text in texts:
        if _DISPUTED.search(text):
            chunks[text] += 1
        else:
            chunks.update(_CHUNK.findall(text))
    cut = pre_tokenizer().pre_tokenize_str
    words: Counter[bytes] = Counter()
    for chunk, count in chunks.items():
        if _WHOLE.fullmatch(chunk):
            words[chunk.encode()] += count
        else:
            for word, _ in cut(chunk):
                words[_unspelled(word)] += count
    return dict(sorted(words.items()))
