"""How single tokens are written for people."""

from collections.abc import Iterable

from steerscale.tokenizers.base import Tokenizer


def token_texts(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[tuple[str, bool]]:
    """Of each token the text it stands for within a text, and whether it is one.

    Control tokens and parts of characters are none: they are written as the vocabulary does, or as <number> beyond it.
    """
    # After another token: at a text's beginning some tokenizers drop a blank.
    before = tokenizer.encode("a")[-1:]
    shown = len(tokenizer.decode(before))
    found = []
    for token in tokens:
        known = 0 <= token < tokenizer.vocab_size
        text = tokenizer.decode([*before, token])[shown:] if known else ""
        if text and "\ufffd" not in text:
            found.append((text, True))
        else:
            found.append((tokenizer.piece(token) if known else f"<{token}>", False))
    return found
