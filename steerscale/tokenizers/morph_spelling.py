"""The bytes behind each token, whatever the tokenizer: what boundaries and vocabularies are compared by."""

import re
from collections.abc import Callable

from steerscale.errors import DataError
from steerscale.tokenizers.base import Tokenizer
from steerscale.tokenizers.morph_words import unspell

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_PROBE = " Příští_probe 12, naïve ▁ 語"


class Spelling:
    """How a tokenizer's tokens are spelled."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises DataError for a tokenizer whose tokens in a row are not the text: one that normalises, or marks otherwise."""
        self.tokenizer = tokenizer
        for convention in (_sentencepiece, _byte_level):
            self._bytes = [convention(tokenizer.piece(token)) for token in range(tokenizer.vocab_size)]
            if b"".join(self.cut(_PROBE)) in (_PROBE.encode(), b" " + _PROBE.encode()):
                return
        raise DataError(
            f"this {tokenizer.type} tokenizer does not spell texts as they are (it normalises them, or writes its vocabulary "
            "in a way unknown here): tokens cannot be laid onto morphemes"
        )

    def cut(self, text: str) -> list[bytes]:
        """The text's tokens; a space put before it by the tokenizer counts as its own."""
        return [self._bytes[token] for token in self.tokenizer.encode(text)]

    def vocabulary(self) -> set[bytes]:
        """The spellings of all tokens."""
        return set(self._bytes)

    def word(self, word: str) -> list[bytes]:
        """The tokens of a word as it stands after a space, without the space."""
        parts, drop = self.cut(f" {word}"), None
        drop = sum(map(len, parts)) - len(word.encode())
        while drop > 0:
            parts[0], drop = parts[0][drop:], drop - len(parts[0])
            if not parts[0]:
                del parts[0]
        return parts

    def __getitem__(self, token: int) -> bytes:
        """The bytes of one token."""
        return self._bytes[token]


def _sentencepiece(piece: str) -> bytes:
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return piece.replace("▁", " ").encode()


def _byte_level(piece: str) -> bytes:
    spelled = unspell(piece)
    return piece.encode() if spelled is None else spelled


Cut = Callable[[str], list[bytes]]
"""A word -> its parts, whose bytes in a row are the word."""
