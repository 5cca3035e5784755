"""The interface all tokenizers share, and the manifest that lies beside a tokenizer on disk."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from steerscale.config import from_mapping
from steerscale.errors import ConfigError, DataError
from steerscale.tokenizers.config import TokenizerConfig

MANIFEST = "manifest.json"


class Tokenizer(ABC):
    """Text <-> token ids in [0, vocab_size)."""

    type: str
    """The key in TOKENIZERS that loads it."""
    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """Ends every document of a dataset."""
    bos_id: int | None
    """Begins a text where a model was trained that way; datasets of ours do not hold it."""
    pad_id: int | None
    """Fills up a batch; never trained on."""
    prefix: tuple[int, ...] = ()
    """What it puts before a text by itself where a model is to read one; `encode` leaves it out."""
    chat_template: str | None = None
    """Jinja template that makes a text of a conversation, if the model was trained on some."""
    hash: str
    """SHA-256 (hex) of the file that determines the ids; two tokenizers agree exactly if it does."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special tokens added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens give nothing, an incomplete UTF-8 sequence gives U+FFFD."""

    @abstractmethod
    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of many documents at once, each with an eos at its end: int32 [tokens of the document]."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """How the vocabulary writes this id (not its text: a space may be '▁' or 'Ġ'). For displays."""

    @abstractmethod
    def id_of(self, piece: str) -> int | None:
        """Id of an entry as the vocabulary writes it, e.g. a special token; None if there is none."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write into an existing directory all that `load_tokenizer` needs."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that text was read from."""

    path: str
    """As the user named it."""
    bytes: int
    """Size as stored, before decompression."""
    sha256: str
    """Of the file as stored, hex."""


@dataclass(frozen=True, kw_only=True)
class TokenizerManifest:
    """`manifest.json` of a tokenizer directory."""

    type: str
    """Key in TOKENIZERS."""
    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """Ends a document."""
    hash: str
    """SHA-256 of the model file, hex."""
    format_version: int = 1
    """Of this manifest."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that made it."""
    config: TokenizerConfig | None = None
    """What it was trained with; None for a tokenizer from elsewhere."""
    sources: list[SourceFile] = field(default_factory=list)
    """What it was trained on."""

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into an existing directory."""
        write_json(directory / MANIFEST, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> "TokenizerManifest":
        """Read `manifest.json`. Raises DataError if it is missing, damaged or of a newer format."""
        return read_manifest(cls, directory / MANIFEST, what="tokenizer")

    def read_model(self, path: Path) -> bytes:
        """The model file this manifest describes. Raises DataError if it is missing or another one."""
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path.parent} has a manifest but no readable {path.name}: {error}") from error
        if hashlib.sha256(model).hexdigest() != self.hash:
            raise DataError(
                f"{path} is not the model its manifest describes (SHA-256 differs): it was changed or damaged; train or copy "
                "the tokenizer again"
            )
        return model


def read_manifest(cls: Any, path: Path, *, what: str) -> Any:
    """Read a JSON file into the dataclass `cls`. Raises DataError if that fails or the format is unknown."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as the manifest of a {what}: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != cls.format_version:
        raise DataError(
            f"{path} has format_version {version!r}, this version of steerscale reads {cls.format_version}; "
            f"make the {what} again or update steerscale"
        )
    try:
        return from_mapping(cls, values)
    except ConfigError as error:
        raise DataError(f"{path} is not a valid manifest of a {what}: {error}") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write indented JSON, keys in their order."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
