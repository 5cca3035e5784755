"""A tokenizer and labelled text for probes on made-up models."""

import random
from pathlib import Path

import numpy as np

from steerscale.interp.probes.labels import Example, Span
from steerscale.tokenizers.base import Tokenizer

WORDS = {"noun": ("ab", "bc", "cde", "dd"), "verb": ("xz", "yx", "zzy", "wx"), "det": ("o", "e")}


class CharacterTokenizer(Tokenizer):
    """A token a byte: small, and words have several tokens."""

    type = "characters"
    vocab_size = 61
    eos_id = 0
    bos_id = pad_id = None
    hash = "characters"

    def encode(self, text: str) -> list[int]:
        return [1 if character == " " else 2 + ord(character) % 59 for character in text]

    def decode(self, ids: object) -> str:
        back = {2 + ord(character) % 59: character for character in "abcdefghijklmnopqrstuvwxyz.,"}
        return "".join(" " if token == 1 else back.get(token, "") for token in ids)  # type: ignore[attr-defined]

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def piece(self, token: int) -> str:
        return str(token)

    def id_of(self, piece: str) -> int | None:
        return None

    def save(self, directory: Path) -> None:
        raise NotImplementedError


def examples(number: int, *, seed: int = 0) -> list[Example]:
    """Sentences like `o ab xz`, of 16 characters at most, each word labelled by its kind."""
    generator, found = random.Random(seed), []
    for group in range(number):
        text, spans = "", []
        for label in ("det", "noun", "verb", "noun"):
            word = generator.choice(WORDS[label])
            text += " " * bool(text)
            spans.append(Span(len(text), len(text) + len(word), label))
            text += word
        found.append(Example(text=text, spans=tuple(spans), group=group))
    return found
