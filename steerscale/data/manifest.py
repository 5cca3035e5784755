"""`manifest.json` of a dataset directory, and the checks that need neither torch nor a started rank."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from steerscale.data.indexed import check_files
from steerscale.errors import DataError
from steerscale.tokenizers.base import MANIFEST, SourceFile, read_manifest, write_json

SPLITS = ("train", "valid", "test")
TOKENIZER = "tokenizer"
"""Directory inside a dataset that holds a copy of its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """Size of one split."""

    documents: int
    """Documents, an eos after each."""
    tokens: int
    """Tokens, eos included."""
    bytes: int
    """UTF-8 bytes of the text, eos excluded."""

    @property
    def bytes_per_token(self) -> float:
        """Bits per byte = loss in nats per token / ln 2 / bytes_per_token."""
        return self.bytes / self.tokens


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer a dataset was made with."""

    type: str
    """Key in TOKENIZERS."""
    hash: str
    """SHA-256 of its model file, hex."""
    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """Ends every document."""


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """What a dataset directory holds and what it was made from. Nothing in it depends on time or number of workers."""

    tokenizer: TokenizerInfo
    """What turned the text into tokens; a copy lies in `tokenizer/`."""
    dtype: str
    """Of a token in the .bin files: uint16, or int32 for vocabularies from 65,500 tokens (Megatron-Core's rule)."""
    splits: dict[str, SplitInfo]
    """By name; a split with fraction 0 is absent."""
    fractions: dict[str, float]
    """Asked-for share of documents by split."""
    seed: int
    """With a document's place in its source, decides its split."""
    documents: str
    """What ends a document in a text file: line or blank-line."""
    text_key: str
    """Field or column of the text in structured sources."""
    sources: list[SourceFile] = field(default_factory=list)
    """The files the text came from, in order."""
    format_version: int = 1
    """Of the dataset directory."""
    steerscale_version: str = ""
    """What wrote it."""

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into an existing directory."""
        write_json(directory / MANIFEST, asdict(self))

    def require_split(self, name: str, *, seq_len: int, path: str | Path) -> SplitInfo:
        """The split, if it is there and fills a sequence of `seq_len` inputs and one more label; else DataError."""
        if name not in self.splits:
            raise DataError(
                f"{path} has no split {name!r}, only {', '.join(self.splits)}: prepare it again with another --split"
            )
        info = self.splits[name]
        if info.tokens < seq_len + 1:
            raise DataError(
                f"split {name!r} of {path} has {info.tokens} tokens, fewer than one sequence: model.seq_len={seq_len} "
                f"needs {seq_len + 1}; use shorter sequences or more text"
            )
        return info


def inspect_dataset(path: str | Path) -> DatasetManifest:
    """Read the manifest of a dataset directory and compare it with the files.

    Raises DataError if the directory, the manifest or a .bin/.idx file is missing, or a file is not what the manifest
    says.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise DataError(f"there is no dataset directory {directory}: make one with `steerscale data prepare`")
    if not (directory / MANIFEST).is_file():
        raise DataError(
            f"{directory} is not a dataset: it has no {MANIFEST}; name the directory given to `steerscale data "
            "prepare -o`"
        )
    manifest: DatasetManifest = read_manifest(DatasetManifest, directory / MANIFEST, what="dataset")
    for name, info in manifest.splits.items():
        check_files(directory / name, dtype=manifest.dtype, documents=info.documents, tokens=info.tokens)
    return manifest
