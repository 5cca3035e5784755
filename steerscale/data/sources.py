"""What a user names as input -> readable sources; decompression with errors that name the file."""

import gzip
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from steerscale.data.sample import PREFIX, sample_corpus
from steerscale.errors import DataError
from steerscale.tokenizers.base import SourceFile, sha256_file

COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
SUFFIXES = {".txt": "txt", ".text": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
CHUNK_BYTES = 256 * 1024
"""Uncompressed bytes read at a time; about the size of a block of work."""


class Source(NamedTuple):
    """One input."""

    name: str
    """Path of a file, or name of a dataset of the `datasets` library."""
    format: str
    """A key of FORMATS in `blocks`."""
    compression: str | None
    """gzip, xz, zstd or None."""
    stored_bytes: int
    """Size as stored; 0 where it is unknown."""


def find_sources(inputs: Sequence[str], *, format: str = "auto") -> list[Source]:
    """The sources of a command line: paths, or `sample:NAME` for text that ships with steerscale.

    Raises DataError if one does not exist or its format cannot be told.
    """
    sources = []
    for name in inputs:
        if name.startswith(PREFIX):
            sources += [_file_source(str(path), "auto") for path in sample_corpus(name.removeprefix(PREFIX))]
        elif format == "hf":
            sources.append(Source(name, "hf", None, 0))
        else:
            sources.append(_file_source(name, format))
    return sources


def _file_source(name: str, format: str) -> Source:
    path = Path(name)
    if path.is_dir():
        raise DataError(
            f"{name} is a directory: name the files in it, or add --format hf for a saved `datasets` dataset"
        )
    if not path.is_file():
        raise DataError(f"there is no input file {name}")
    *_, inner, outer = ["", "", *path.suffixes]
    compression = COMPRESSIONS.get(outer.lower())
    suffix = inner if compression else outer
    if format == "auto":
        if suffix.lower() not in SUFFIXES:
            raise DataError(f"cannot tell the format of {name} from its name: give --format txt | jsonl | parquet")
        format = SUFFIXES[suffix.lower()]
    return Source(name, format, compression, path.stat().st_size)


def describe_sources(sources: Sequence[Source]) -> list[SourceFile]:
    """Size and SHA-256 of each, for the manifest. Reads every file once."""
    return [
        SourceFile(
            path=source.name,
            bytes=source.stored_bytes,
            sha256="" if source.format == "hf" else sha256_file(Path(source.name)),
        )
        for source in sources
    ]


def read_chunks(source: Source) -> Iterator[tuple[bytes, int]]:
    """Decompressed bytes in chunks of about CHUNK_BYTES, each with the number of stored bytes read so far.

    Raises DataError if the file cannot be read, or is damaged or cut off.
    """
    try:
        with Path(source.name).open("rb") as stored, _decompressed(stored, source.compression) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk, stored.tell()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        how = f" as {source.compression}: it is damaged, incomplete or something else" if source.compression else ""
        raise DataError(f"{source.name} cannot be read{how} ({error})") from error


def _decompressed(file: IO[bytes], compression: str | None) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file)
    if compression == "xz":
        return lzma.LZMAFile(file)
    if compression == "zstd":
        # Arrow's reader, because the zstandard package reads a truncated file without complaint.
        import pyarrow

        return pyarrow.input_stream(file, compression="zstd")
    return file
