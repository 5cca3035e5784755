"""Megatron-Core's indexed dataset files, written and checked without importing torch.

`NAME.bin` holds the tokens of all documents end to end. `NAME.idx` holds, little-endian: magic (9 bytes), version u64,
dtype code u8, number of sequences u64, number of documents + 1 u64, then the sequences' lengths (int32), their byte
offsets in the .bin (int64) and the index of each document's first sequence, with the end (int64). A document of ours is
one sequence. The tests compare these files byte by byte with those of `megatron.core.datasets.indexed_dataset`.
"""

import struct
from pathlib import Path
from types import TracebackType

import numpy as np

from steerscale.errors import DataError

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES = {"uint16": 8, "int32": 4}


def token_dtype(vocab_size: int) -> str:
    """The dtype Megatron-Core chooses for a vocabulary (`DType.optimal_dtype`)."""
    return "uint16" if vocab_size < 65500 else "int32"


class IndexedWriter:
    """Writes one split; the .idx only when the block ends without an error."""

    def __init__(self, prefix: Path, *, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.documents = self.tokens = 0
        self._prefix = prefix
        self._bin = prefix.with_suffix(".bin").open("wb")
        self._lengths: list[np.ndarray] = []

    def add(self, tokens: bytes, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: their ids end to end, in the dtype of the dataset.
            lengths: tokens of each document, int32 [documents].
        """
        self._bin.write(tokens)
        self._lengths.append(lengths)
        self.documents += len(lengths)
        self.tokens += len(tokens) // self.dtype.itemsize

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bin.close()
        if kind is None:
            self._write_index()

    def _write_index(self) -> None:
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        offsets = np.zeros(self.documents, dtype=np.int64)
        np.cumsum(lengths[:-1], out=offsets[1:])
        offsets *= self.dtype.itemsize
        header = HEADER.pack(MAGIC, VERSION, DTYPE_CODES[self.dtype.name], self.documents, self.documents + 1)
        with self._prefix.with_suffix(".idx").open("wb") as file:
            file.write(header)
            for part in (lengths, offsets, np.arange(self.documents + 1)):
                file.write(part.tobytes())


def map_tokens(prefix: Path, *, dtype: str) -> np.ndarray:
    """The tokens of all documents end to end, [tokens] of `dtype`, memory-mapped read-only."""
    return np.memmap(prefix.with_suffix(".bin"), dtype=dtype, mode="r")


def check_files(prefix: Path, *, dtype: str, documents: int, tokens: int) -> None:
    """Raise DataError unless `prefix`.bin and .idx are there, of the right size, with the right header."""
    expected = {
        ".bin": tokens * np.dtype(dtype).itemsize,
        ".idx": HEADER.size + documents * (4 + 8 + 8) + 8,
    }
    for suffix, size in expected.items():
        file = prefix.with_suffix(suffix)
        if not file.is_file():
            raise DataError(f"{file} is missing: copy the whole dataset directory, or prepare it again")
        if (found := file.stat().st_size) != size:
            raise DataError(
                f"{file} has {found} bytes where the manifest expects {size}: it was truncated or changed; copy it "
                "again or prepare the dataset again"
            )
    with prefix.with_suffix(".idx").open("rb") as file:
        header = file.read(HEADER.size)
    if header != HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], documents, documents + 1):
        raise DataError(f"{file.name} has another header than the manifest expects: prepare the dataset again")
