"""Sentencepiece unigram and BPE, set up so that decode(encode(text)) == text for every Unicode text.

Identity normalisation, no dummy prefix, no white-space clean-up, and 256 byte tokens for what the vocabulary lacks.
"""

import hashlib
import importlib.metadata
import io
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

import steerscale
from steerscale.errors import ConfigError, DataError
from steerscale.tokenizers.base import SourceFile, Tokenizer, TokenizerManifest
from steerscale.tokenizers.config import SPECIAL, TokenizerConfig

MODEL = "tokenizer.model"
SPACE = "▁"
"""U+2581, which sentencepiece writes for a space and would turn into one when it occurs in a text."""
LONGEST_LINE = 1000
"""Characters. Sentencepiece silently leaves out training lines over 4192 bytes, so longer ones are cut at a space."""


class SentencePieceTokenizer(Tokenizer):
    """A trained sentencepiece model."""

    def __init__(self, model: bytes, *, type: str, manifest: TokenizerManifest | None = None) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._manifest = manifest
        self.type = type
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id, self.pad_id = (self._processor.piece_to_id(SPECIAL[k]) for k in ("bos", "eos", "pad"))
        self.hash = hashlib.sha256(model).hexdigest()
        self._space_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @classmethod
    def load(cls, directory: Path) -> "SentencePieceTokenizer":
        """Load a tokenizer directory. Raises DataError if the model is missing or is not the manifest's."""
        manifest = TokenizerManifest.read(directory)
        return cls(manifest.read_model(directory / MODEL), type=manifest.type, manifest=manifest)

    def encode(self, text: str) -> list[int]:
        if SPACE not in text:
            return self._processor.encode(text)
        first, *rest = (self._processor.encode(part) for part in text.split(SPACE))
        return first + [token for part in rest for token in (*self._space_ids, *part)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(map(int, ids)))

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        documents = self._encode_batch(texts)
        for index, text in enumerate(texts):
            if SPACE in text:
                documents[index] = np.array([*self.encode(text), self.eos_id], dtype=np.int32)
        return documents

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        # Arrays spare a Python integer for each token and their conversion.
        if hasattr(self._processor, "encode_as_numpy"):  # older releases lack it
            return self._processor.encode(texts, add_eos=True, num_threads=1, return_type="numpy")
        return [np.array(ids, np.int32) for ids in self._processor.encode(texts, add_eos=True, num_threads=1)]

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def id_of(self, piece: str) -> int | None:
        token = self._processor.piece_to_id(piece)
        return token if self._processor.id_to_piece(token) == piece else None

    def save(self, directory: Path) -> None:
        (directory / MODEL).write_bytes(self._model)
        manifest = self._manifest or TokenizerManifest(
            type=self.type, vocab_size=self.vocab_size, eos_id=self.eos_id, hash=self.hash
        )
        manifest.write(directory)


def train_sentencepiece(
    config: TokenizerConfig, texts: Iterable[str], *, sources: list[SourceFile] | None = None
) -> SentencePieceTokenizer:
    """Learn a unigram or BPE vocabulary from `texts`; the same texts and config give the same model, byte for byte.

    Raises ConfigError if the corpus cannot fill or not fit the vocabulary, DataError if it is empty.
    """
    lines = _training_lines(texts)
    first = next(lines, None)
    if first is None:
        raise DataError("there is no text to train a tokenizer on: the input holds nothing but white space")
    lines = itertools.chain([first], lines)
    if config.input_sentence_size:
        lines = iter(sample_lines(lines, config.input_sentence_size, seed=config.seed))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=config.type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            user_defined_symbols=config.special,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # EM adds up float32 per thread: another number of threads would give another model.
            num_threads=16,
            minloglevel=2,
            **_control_tokens(),
        )
    except RuntimeError as error:
        raise _translated(error, config) from error
    tokenizer = SentencePieceTokenizer(model.getvalue(), type=config.type)
    tokenizer._manifest = TokenizerManifest(
        type=config.type,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        hash=tokenizer.hash,
        versions={
            "steerscale": steerscale.__version__,
            "sentencepiece": importlib.metadata.version("sentencepiece"),
        },
        config=config,
        sources=sources or [],
    )
    return tokenizer


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            while len(line) > LONGEST_LINE:
                # The space stays with the word that follows it, as it does in the vocabulary.
                cut = max(line.rfind(" ", 1, LONGEST_LINE), 0) or LONGEST_LINE
                yield line[:cut]
                line = line[cut:]
            if line and not line.isspace():
                yield line


def sample_lines(lines: Iterable[str], size: int, *, seed: int) -> list[str]:
    """`size` lines chosen uniformly in one pass (reservoir sampling, Vitter 1985, algorithm R)."""
    # Sentencepiece can sample too, but its seed does not reach lines that come from an iterator.
    generator = random.Random(seed)
    chosen = []
    for index, line in enumerate(lines):
        if index < size:
            chosen.append(line)
        elif (slot := generator.randrange(index + 1)) < size:
            chosen[slot] = line
    return chosen


def _control_tokens() -> dict[str, Any]:
    ids = {f"{name}_id": token for token, name in enumerate(SPECIAL)}
    return ids | {f"{name}_piece": piece for name, piece in SPECIAL.items()}


def _translated(error: RuntimeError, config: TokenizerConfig) -> ConfigError | DataError:
    message = str(error)
    if found := re.search(r"Vocabulary size too high.*<= *(\d+)", message, re.DOTALL):
        return ConfigError(
            f"tokenizer.vocab_size={config.vocab_size} is too large for this corpus: it yields at most {found[1]} "
            "tokens; choose a smaller vocabulary or give more text"
        )
    if found := re.search(r"smaller than required_chars\. *\d+ vs (\d+)", message):
        return ConfigError(
            f"tokenizer.vocab_size={config.vocab_size} is too small: the bytes, special tokens and single characters "
            f"of this corpus alone are {found[1]}; choose a larger vocabulary or a lower character coverage"
        )
    return DataError(f"sentencepiece could not train a {config.type} tokenizer: {message}")
