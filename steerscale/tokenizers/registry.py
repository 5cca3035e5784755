"""The known tokenizers. A new one is a file with a `Tokenizer` subclass and a line here."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from steerscale.errors import ConfigError, DataError
from steerscale.tokenizers.base import MANIFEST, SourceFile, Tokenizer, TokenizerManifest
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.huggingface import MODEL as HUGGINGFACE_MODEL
from steerscale.tokenizers.huggingface import SETTINGS as HUGGINGFACE_SETTINGS
from steerscale.tokenizers.huggingface import HuggingFaceTokenizer
from steerscale.tokenizers.morph_bpe import MorphBPETokenizer, train_morph_bpe
from steerscale.tokenizers.spm import SentencePieceTokenizer, train_sentencepiece


class TokenizerType(NamedTuple):
    """How a type is loaded, and trained if it can be."""

    load: Callable[[Path], Tokenizer]
    """A directory -> the tokenizer in it."""
    train: Callable[..., Tokenizer] | None
    """(TokenizerConfig, texts, sources=list of SourceFile) -> a new tokenizer."""


TOKENIZERS: dict[str, TokenizerType] = {
    "unigram": TokenizerType(SentencePieceTokenizer.load, train_sentencepiece),
    "bpe": TokenizerType(SentencePieceTokenizer.load, train_sentencepiece),
    "morph_bpe": TokenizerType(MorphBPETokenizer.load, train_morph_bpe),
    "huggingface": TokenizerType(HuggingFaceTokenizer.load, None),
}


def train_tokenizer(
    config: TokenizerConfig, texts: Iterable[str], *, sources: list[SourceFile] | None = None
) -> Tokenizer:
    """Train a tokenizer of type `config.type`. Raises ConfigError if there is none that can be trained."""
    kind = TOKENIZERS.get(config.type)
    if kind is None or kind.train is None:
        trainable = " | ".join(name for name, entry in TOKENIZERS.items() if entry.train is not None)
        raise ConfigError(f"tokenizer.type must be one of {trainable}, got {config.type!r}")
    return kind.train(config, texts, sources=sources)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a directory written by `steerscale tokenizer train`, or the tokenizer of a Hugging Face model.

    Raises DataError if there is no tokenizer, or its files do not belong together.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise DataError(
            f"there is no tokenizer directory {directory}: make one with `steerscale tokenizer train`, or name the "
            "directory of a Hugging Face model"
        )
    if (directory / MANIFEST).is_file():
        return _known(TokenizerManifest.read(directory), directory).load(directory)
    if any((directory / name).is_file() for name in (HUGGINGFACE_MODEL, HUGGINGFACE_SETTINGS, "tokenizer.model")):
        return HuggingFaceTokenizer.load(directory)
    raise DataError(f"{directory} is not a tokenizer: it holds neither {MANIFEST} nor {HUGGINGFACE_MODEL}")


def _known(manifest: Any, directory: Path) -> TokenizerType:
    if manifest.type not in TOKENIZERS:
        raise DataError(
            f"{directory / MANIFEST} names an unknown tokenizer type {manifest.type!r}; known: {', '.join(TOKENIZERS)}"
        )
    return TOKENIZERS[manifest.type]
