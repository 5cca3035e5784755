import gzip
import json
import lzma
import sys
import types

import pyarrow as pa
import pytest
from pyarrow import parquet

from steerscale.data import sources as sources_module
from steerscale.data.blocks import Reading, parse, read_blocks, read_texts
from steerscale.data.sources import find_sources
from steerscale.errors import DataError

LINES = ["erste Zeile", "", "  eingerückt ", "\t", "vier\rte", "Ünïcode 🎉"]


def texts(path, *, format="auto", **reading):
    return list(read_texts(find_sources([str(path)], format=format), Reading(**reading)))


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_txt_a_document_a_line(tmp_path, suffix):
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(COMPRESS[suffix]("\n".join(LINES).encode()))
    assert texts(file) == ["erste Zeile", "  eingerückt ", "vier\rte", "Ünïcode 🎉"]


def test_txt_windows_line_ends_and_byte_order_mark(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfeins\r\nzwei\r\n")
    assert texts(file) == ["eins", "zwei"]


def test_txt_documents_between_blank_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\nTitel\nerster Satz\n \t\n\n\nzweites\nDokument\n")
    assert texts(file, documents="blank-line") == ["Titel\nerster Satz", "zweites\nDokument"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl(tmp_path, suffix):
    file = tmp_path / f"a.jsonl{suffix}"
    records = [{"text": "a\nb", "id": 1}, {"text": " "}, {"text": "c"}]
    file.write_bytes(COMPRESS[suffix]("\n\n".join(json.dumps(record) for record in records).encode()))
    assert texts(file) == ["a\nb", "c"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_parquet(tmp_path, suffix):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": [1, 2, 3], "body": ["a\nb", "", "c"]}), file)
    compressed = tmp_path / f"b.parquet{suffix}"
    compressed.write_bytes(COMPRESS[suffix](file.read_bytes()))
    assert texts(compressed, text_key="body") == ["a\nb", "c"]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 10**6])
@pytest.mark.parametrize("documents", ["line", "blank-line"])
def test_documents_and_numbers_do_not_depend_on_the_chunks(tmp_path, monkeypatch, chunk_bytes, documents):
    file = tmp_path / "a.txt"
    content = [line for number in range(60) for line in (f"Zeile {number} äöü", *[""] * (number % 4))]
    file.write_text("\n".join(content))

    def documents_found():
        reading = Reading(documents=documents)
        blocks = list(read_blocks(find_sources([str(file)]), reading))
        assert blocks[-1].stored_bytes == file.stat().st_size
        return [item for block in blocks for item in zip(*parse(block, reading))]

    expected = documents_found()
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", chunk_bytes)
    assert documents_found() == expected
    # The record number is the line where the document begins.
    assert all(content[number] == text.split("\n")[0] for number, text in expected)


def test_sample_and_plain_files_together(tmp_path):
    file = tmp_path / "a.text"
    file.write_text("x")
    names = [source.name.rsplit("/", 1)[-1] for source in find_sources(["sample:german", str(file)])]
    assert names == ["debian-handbook.de.txt.xz", "paketmanagement-buch.de.txt.xz", "wesnoth.de.txt.xz", "a.text"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.txt", "there is no input file"),
        (".", "is a directory: name the files in it"),
        ("a.csv", "cannot tell the format of .*a.csv from its name: give --format"),
    ],
)
def test_unusable_inputs(tmp_path, name, message):
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=message):
        find_sources([str(tmp_path / name)])


def test_unknown_sample():
    with pytest.raises(DataError, match="there is no sample:klingon; there is sample:german"):
        find_sources(["sample:klingon"])


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_damaged_compressed_file(tmp_path, suffix, damage):
    file = tmp_path / f"a.txt{suffix}"
    content = COMPRESS[suffix](b"".join(b"%d Zeilen\n" % number for number in range(5000)))
    file.write_bytes(content[:-20] if damage == "cut" else b"only text, no archive")
    with pytest.raises(DataError, match=f"a.txt{suffix} cannot be read as .*: it is damaged, incomplete"):
        texts(file)


def test_damaged_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 but nothing else")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        texts(file)


def test_invalid_utf8_names_line_and_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 8)
    file = tmp_path / "a.txt"
    file.write_bytes(b"gut\nauch gut\nschl\xe4cht\ngut\n")
    with pytest.raises(DataError, match=r"a\.txt, line 3: byte 5 of the line \(0xe4\) is not valid UTF-8"):
        texts(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 2}', "line 2 has no key 'text', only body, id: choose one with --text-key"),
        ('{"text": 5}', "line 2: 'text' must be text, got 5"),
        ('{"text": "x"', "line 2 is not valid JSON"),
        ('{"text": ' + "[" * 100_000, "line 2 is not valid JSON"),
        ('"x"', "line 2 is not a JSON object"),
        ('{"text": "\\ud800"}', "line 2: 'text' holds half of a surrogate pair"),
    ],
)
def test_bad_jsonl_line(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n' + line)
    with pytest.raises(DataError, match=message):
        texts(file)


def test_parquet_text_that_is_not_utf8(tmp_path):
    file = tmp_path / "a.parquet"
    stored = pa.array([b"gut", b"schl\xe4cht"], type=pa.binary())
    parquet.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, stored.buffers())}), file)
    with pytest.raises(DataError, match=r"a\.parquet, rows 1 to 2: 'text' holds text that is not valid UTF-8"):
        texts(file)


def test_bad_parquet_columns(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": [1, 2], "text": ["a", None]}), file)
    with pytest.raises(DataError, match="row 2: 'text' must be text, got None"):
        texts(file)
    with pytest.raises(DataError, match="has no column 'body', only id, text"):
        texts(file, text_key="body")
    with pytest.raises(DataError, match="column 'id' holds int64, not text"):
        texts(file, text_key="id")


def test_hf_needs_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'steerscale\[hub\]'"):
        texts("some/dataset", format="hf")


def test_hf_reads_rows_of_the_train_split(monkeypatch):
    class Table:
        column_names = ("id", "text")

        def select_columns(self, columns):
            assert columns == ["text"]
            return self

        def iter(self, batch_size):
            yield {"text": ["a", "b"]}
            yield {"text": ["c"]}

    def load_dataset(name, split):
        if (name, split) != ("some/dataset", "train"):
            raise ValueError("unknown")
        return Table()

    library = types.SimpleNamespace(load_dataset=load_dataset, DatasetDict=dict)
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert texts("some/dataset", format="hf") == ["a", "b", "c"]
    with pytest.raises(DataError, match="cannot be loaded by `datasets`: unknown"):
        texts("other/dataset", format="hf")
