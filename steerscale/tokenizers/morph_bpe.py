"""Byte-level BPE whose merges keep to morpheme boundaries as far as `tokenizer.bias` says; plain BPE at bias 0.

What comes out is a `tokenizer.json` as every byte-level BPE has one: whoever loads it needs neither us nor the segmentation,
and every text, byte for byte, comes back from its tokens.
"""

import hashlib
import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models

import steerscale
from steerscale.errors import ConfigError, DataError
from steerscale.tokenizers.base import SourceFile, TokenizerManifest
from steerscale.tokenizers.config import DEFAULT_BIAS, DEFAULT_SEGMENTATION, SPECIAL, TokenizerConfig
from steerscale.tokenizers.huggingface import MODEL, HuggingFaceTokenizer
from steerscale.tokenizers.morph_merges import learn_merges
from steerscale.tokenizers.morph_segment import byte_borders, find_segmentation
from steerscale.tokenizers.morph_words import BYTE_CHARACTERS, count_words, pre_tokenizer, spell, unspell
from steerscale.tokenizers.spm import sample_lines

_BROKEN = re.compile("([\udc80-\udcff]+)")
"""How Python's "surrogateescape" decodes bytes that are not UTF-8."""


class MorphBPETokenizer(HuggingFaceTokenizer):
    """A byte-level BPE of our own. Texts never give control tokens; those of `special` they do."""

    type = "morph_bpe"

    def __init__(self, model: bytes, *, origin: str, manifest: TokenizerManifest | None = None) -> None:
        super().__init__(model, _settings(), origin=origin)
        self._backend.encode_special_tokens = True  # spelled out, that is: "</s>" in a text is four signs
        self._manifest = manifest
        added = {token: str(entry) for token, entry in self._backend.get_added_tokens_decoder().items()}
        self._bytes = [self._spelled(token, added) for token in range(self.vocab_size)]
        control = {self.id_of(piece) for piece in SPECIAL.values()}
        self._text = [b"" if token in control else spelled for token, spelled in enumerate(self._bytes)]
        self._byte_ids = [self.id_of(character) for character in BYTE_CHARACTERS]

    @classmethod
    def load(cls, directory: Path) -> "MorphBPETokenizer":
        """Load a tokenizer directory. Raises DataError if the model is missing or is not the manifest's."""
        manifest = TokenizerManifest.read(directory)
        return cls(manifest.read_model(directory / MODEL), origin=str(directory), manifest=manifest)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: of the text where they are UTF-8, and of single bytes where they are not."""
        text = data.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        for number, part in enumerate(_BROKEN.split(text)):
            if number % 2:
                ids += [token for byte in part.encode("utf-8", "surrogateescape") if (token := self._byte_ids[byte])]
            elif part:
                ids += self.encode(part)
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, exactly; control tokens give nothing."""
        return b"".join([self._text[token] for token in ids])

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, directory: Path) -> None:
        super().save(directory)
        if self._manifest is not None:
            self._manifest.write(directory)

    def _spelled(self, token: int, added: dict[int, str]) -> bytes:
        if token in added:
            return self.piece(token).encode()
        return unspell(self.piece(token)) or b""


class Words(NamedTuple):
    """What merges are learned from."""

    words: list[bytes]
    """Different words, each with the space before it if there is one."""
    borders: list[list[int]]
    """Byte offsets of each one's morpheme boundaries."""
    counts: list[int]
    """How often each occurs."""


def prepare_words(config: TokenizerConfig, texts: Iterable[str]) -> Words:
    """The words of a corpus and their boundaries by `config.segmentation`. Raises DataError if there are none."""
    if config.input_sentence_size:
        lines = (line for text in texts for line in text.split("\n") if line and not line.isspace())
        texts = sample_lines(lines, config.input_sentence_size, seed=config.seed)
    counted = count_words(texts)
    if not any(not word.isspace() for word in counted):
        raise DataError("there is no text to train a tokenizer on: the input holds nothing but white space")
    words, counts = list(counted), list(counted.values())
    if not _bias(config):
        return Words(words, [[]] * len(words), counts)
    spelled = [word.decode() for word in words]
    bare = [word.removeprefix(" ") for word in spelled]
    frequency = letter_words(counted)
    segmentation = find_segmentation(config.segmentation or DEFAULT_SEGMENTATION, frequency)
    borders = [
        byte_borders(word, segmentation, offset=len(whole) - len(word)) if word in frequency else []
        for whole, word in zip(spelled, bare)
    ]
    return Words(words, borders, counts)


def letter_words(counted: Mapping[bytes, int]) -> dict[str, int]:
    """The words of `count_words` that begin with a letter, without the space before them, and how often they occur."""
    words: dict[str, int] = {}
    for spelled, count in counted.items():
        word = spelled.decode().removeprefix(" ")
        if word[:1].isalpha():
            words[word] = words.get(word, 0) + count
    return words


def train_morph_bpe(
    config: TokenizerConfig, texts: Iterable[str], *, sources: list[SourceFile] | None = None
) -> MorphBPETokenizer:
    """Learn merges from `texts`; the same texts, config and segmentation give the same file, byte for byte.

    Raises ConfigError if the corpus cannot fill the vocabulary, DataError if it is empty.
    """
    tokens = first_tokens(config)
    known = len(tokens) - 256
    byte_ids = [0] * 256
    for number, token in enumerate(tokens[known:], start=known):
        byte_ids[token[0]] = number
    learned = learn_merges(
        *prepare_words(config, texts),
        tokens=tokens,
        byte_ids=byte_ids,
        vocab_size=config.vocab_size,
        bias=_bias(config),
    )
    merges: list[tuple[str, str]] = []
    pieces = [token.decode() if number < known else spell(token) for number, token in enumerate(tokens)]
    for left, right, result in learned.merges.tolist():
        merges.append((pieces[left], pieces[right]))
        if result == len(pieces):
            pieces.append(pieces[left] + pieces[right])
    if len(pieces) < config.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size={config.vocab_size} is too large for this corpus: it yields at most {len(pieces)} "
            "tokens; choose a smaller vocabulary or give more text"
        )
    model = _model_file(pieces, merges, config.special)
    manifest = TokenizerManifest(
        type=config.type,
        vocab_size=len(pieces),
        eos_id=list(SPECIAL).index("eos"),
        hash=hashlib.sha256(model).hexdigest(),
        versions={"steerscale": steerscale.__version__, "tokenizers": importlib.metadata.version("tokenizers")},
        config=config,
        sources=sources or [],
    )
    return MorphBPETokenizer(model, origin="a new tokenizer", manifest=manifest)


def first_tokens(config: TokenizerConfig) -> list[bytes]:
    """The vocabulary before the first merge: control tokens, special ones, the bytes in order of their characters."""
    bytes_in_order = sorted(range(256), key=lambda byte: BYTE_CHARACTERS[byte])
    return [*(text.encode() for text in (*SPECIAL.values(), *config.special)), *(bytes([b]) for b in bytes_in_order)]


def _bias(config: TokenizerConfig) -> float:
    return DEFAULT_BIAS if config.bias is None else config.bias


def _model_file(pieces: Sequence[str], merges: Sequence[tuple[str, str]], special: Sequence[str]) -> bytes:
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in SPECIAL.values()])
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    return backend.to_str(pretty=True).encode()


def _settings() -> dict[str, object]:
    """`tokenizer_config.json`, for `transformers`."""
    roles = {f"{role}_token": text for role, text in SPECIAL.items()}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
