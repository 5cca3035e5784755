"""Sources cut into blocks of whole documents, and blocks parsed into texts.

Cutting is cheap and happens in one place, in order; parsing can happen anywhere. Every document has a record number in its
source (line or row, from 0) that depends on nothing but the source.
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steerscale.data.sources import Source, read_chunks
from steerscale.errors import DataError

ROWS = 1024
"""Rows of a table in a block."""
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


class Block(NamedTuple):
    """Some whole documents of one source, not parsed yet."""

    name: str
    """Of the source, for error texts."""
    source: int
    """Number of the source."""
    kind: str
    """A key of PARSERS."""
    first: int
    """Record number of the first line or row."""
    data: bytes | list[str | None]
    """UTF-8 text, or the text column of some rows."""
    stored_bytes: int
    """Bytes of this source read so far, as stored; for progress."""


class Reading(NamedTuple):
    """How sources are understood."""

    documents: str = "line"
    """What ends a document in txt: line or blank-line."""
    text_key: str = "text"
    """Field or column of the text in the other formats."""


def read_blocks(sources: Sequence[Source], reading: Reading) -> Iterator[Block]:
    """The blocks of all sources in order. Raises DataError, naming the file, for what cannot be read."""
    for number, source in enumerate(sources):
        yield from FORMATS[source.format](source, number, reading)


def read_texts(sources: Sequence[Source], reading: Reading) -> Iterator[str]:
    """The documents of all sources in order. Raises DataError as `read_blocks` and `parse` do."""
    for block in read_blocks(sources, reading):
        yield from parse(block, reading)[1]


def parse(block: Block, reading: Reading) -> tuple[list[int], list[str]]:
    """Record numbers and texts of the documents in a block; those of nothing but white space are left out.

    Raises DataError, naming file and line, for invalid UTF-8, invalid JSON, or a record without text.
    """
    records = [(number, text) for number, text in PARSERS[block.kind](block, reading) if text and not text.isspace()]
    return [number for number, _ in records], [text for _, text in records]


def _cut(source: Source, number: int, kind: str, border: Callable[[bytes], int]) -> Iterator[Block]:
    """Blocks that end where `border` finds the last end of a document in a chunk (0: none in it)."""
    first, parts, position = 0, [], 0
    for chunk, position in read_chunks(source):
        if first == 0 and not parts:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
        end = border(chunk)
        parts.append(chunk[:end] if end else chunk)
        if end:
            data = b"".join(parts)
            yield Block(source.name, number, kind, first, data, position)
            first += data.count(b"\n")
            parts = [chunk[end:]]
    if rest := b"".join(parts):
        yield Block(source.name, number, kind, first, rest, position)


def _last_line_end(chunk: bytes) -> int:
    return chunk.rfind(b"\n") + 1


def _last_blank_line(chunk: bytes) -> int:
    return max((match.end() for match in BLANK_LINE.finditer(chunk)), default=0)


def _read_txt(source: Source, number: int, reading: Reading) -> Iterator[Block]:
    border = _last_blank_line if reading.documents == "blank-line" else _last_line_end
    return _cut(source, number, reading.documents, border)


def _read_jsonl(source: Source, number: int, reading: Reading) -> Iterator[Block]:
    return _cut(source, number, "jsonl", _last_line_end)


def _read_parquet(source: Source, number: int, reading: Reading) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    try:
        stored: Any = Path(source.name)
        if source.compression:
            stored = pyarrow.BufferReader(b"".join(chunk for chunk, _ in read_chunks(source)))
        with parquet.ParquetFile(stored) as table:
            _check_column(source.name, reading.text_key, table.schema_arrow.names)
            kind = table.schema_arrow.field(reading.text_key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{source.name}: column {reading.text_key!r} holds {kind}, not text: choose --text-key")
            first = 0
            for batch in table.iter_batches(batch_size=ROWS, columns=[reading.text_key]):
                done = source.stored_bytes * (first + len(batch)) // table.metadata.num_rows
                where = f"{source.name}, rows {first + 1} to {first + len(batch)}: {reading.text_key!r}"
                yield Block(source.name, number, "rows", first, _column_texts(batch.column(0), where), done)
                first += len(batch)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{source.name} cannot be read as parquet: {error}") from error


def _column_texts(column: Any, where: str) -> list[str | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:  # neither Arrow nor most that write parquet look at the bytes of a string
        raise DataError(
            f"{where} holds text that is not valid UTF-8 ({error}); write the file again with text that is"
        ) from error


def _read_hf(source: Source, number: int, reading: Reading) -> Iterator[Block]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("--format hf needs the `datasets` library: pip install 'steerscale[hub]'") from error
    try:
        if Path(source.name).is_dir():
            table: Any = datasets.load_from_disk(source.name)
        else:
            table = datasets.load_dataset(source.name, split="train")
    except (OSError, ValueError) as error:
        raise DataError(f"{source.name} cannot be loaded by `datasets`: {error}") from error
    if isinstance(table, datasets.DatasetDict):
        raise DataError(
            f"{source.name} holds several splits: name one of {', '.join(f'{source.name}/{s}' for s in table)}"
        )
    _check_column(source.name, reading.text_key, table.column_names)
    first = 0
    for rows in table.select_columns([reading.text_key]).iter(batch_size=ROWS):
        yield Block(source.name, number, "rows", first, rows[reading.text_key], 0)
        first += len(rows[reading.text_key])


def _check_column(name: str, key: str, columns: Iterable[str]) -> None:
    if key not in columns:
        raise DataError(f"{name} has no column {key!r}, only {', '.join(columns)}: choose one with --text-key")


FORMATS: dict[str, Callable[[Source, int, Reading], Iterator[Block]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "hf": _read_hf,
}


def _lines(block: Block) -> list[str]:
    assert isinstance(block.data, bytes)
    try:
        text = block.data.decode("utf-8")
    except UnicodeDecodeError as error:
        begin = block.data.rfind(b"\n", 0, error.start) + 1
        line = block.first + block.data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{block.name}, line {line}: byte {error.start - begin + 1} of the line (0x{block.data[error.start]:02x}) is not "
            "valid UTF-8; convert the file first, e.g. with iconv"
        ) from error
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    return text.split("\n")


def _parse_lines(block: Block, reading: Reading) -> Iterable[tuple[int, str]]:
    return enumerate(_lines(block), block.first)


def _parse_paragraphs(block: Block, reading: Reading) -> Iterable[tuple[int, str]]:
    numbered = enumerate(_lines(block), block.first)
    for blank, group in itertools.groupby(numbered, lambda item: not item[1] or item[1].isspace()):
        if not blank:
            numbers, lines = zip(*group)
            yield numbers[0], "\n".join(lines)


def _parse_jsonl(block: Block, reading: Reading) -> Iterable[tuple[int, str]]:
    key = reading.text_key
    for number, line in enumerate(_lines(block), block.first):
        if not line or line.isspace():
            continue
        where = f"{block.name}, line {number + 1}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # brackets within thousands of brackets
            raise DataError(f"{where} is not valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is not a JSON object with a key {key!r}: {line[:60]}")
        if key not in record:
            raise DataError(f"{where} has no key {key!r}, only {', '.join(record)}: choose one with --text-key")
        yield number, _checked_text(record[key], where, key)


def _parse_rows(block: Block, reading: Reading) -> Iterable[tuple[int, str]]:
    for number, text in enumerate(block.data, block.first):
        yield number, _checked_text(text, f"{block.name}, row {number + 1}", reading.text_key)


def _checked_text(text: Any, where: str, key: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} must be text, got {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key!r} holds half of a surrogate pair (character {error.start + 1})") from error
    return text


PARSERS: dict[str, Callable[[Block, Reading], Iterable[tuple[int, str]]]] = {
    "line": _parse_lines,
    "blank-line": _parse_paragraphs,
    "jsonl": _parse_jsonl,
    "rows": _parse_rows,
}
