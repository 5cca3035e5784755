"""The format: whatever cut a parameter was written in, any range of any box can be read."""

import json
import pickletools
import struct
from pathlib import Path

import pytest
import torch

from steerscale.checkpoint.fragments import Fragment, FragmentReader, write_fragments, write_index
from steerscale.errors import CheckpointError

WHOLE = torch.arange(48, dtype=torch.float32).reshape(8, 6)


def fragment(rows: slice, columns: slice, start: int = 0, stop: int | None = None) -> Fragment:
    """Elements [start, stop) of a box of WHOLE."""
    box = WHOLE[rows, columns]
    data = box.reshape(-1)[start:stop]
    offset, shape = (rows.start, columns.start), tuple(box.shape)
    return Fragment(kind="weight", name="w", whole_shape=(8, 6), offset=offset, shape=shape, start=start, data=data)


def write(directory: Path, *ranks: list[Fragment]) -> FragmentReader:
    """One file for each rank."""
    entries = [
        entry for rank, own in enumerate(ranks) for entry in write_fragments(own, directory / f"{rank}.safetensors")
    ]
    write_index(entries, directory)
    return FragmentReader(directory)


ALL = slice(0, 6)
LAYOUTS = {
    "one process": [[fragment(slice(0, 8), ALL)]],
    "rows": [[fragment(slice(0, 4), ALL)], [fragment(slice(4, 8), ALL)]],
    "columns": [[fragment(slice(0, 8), slice(0, 3))], [fragment(slice(0, 8), slice(3, 6))]],
    "ranges": [[fragment(slice(0, 8), ALL, 0, 17)], [fragment(slice(0, 8), ALL, 17, 48)]],
    "ranges of rows": [
        [fragment(slice(0, 4), ALL, 0, 5), fragment(slice(4, 8), ALL, 20, 24)],
        [fragment(slice(0, 4), ALL, 5, 24), fragment(slice(4, 8), ALL, 0, 20)],
    ],
    "halves": [
        [fragment(slice(0, 2), ALL), fragment(slice(4, 6), ALL)],
        [fragment(slice(2, 4), ALL), fragment(slice(6, 8), ALL)],
    ],
}
BOXES = [(slice(0, 8), ALL), (slice(0, 4), ALL), (slice(2, 6), ALL), (slice(0, 8), slice(0, 3)), (slice(1, 2), ALL)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fragments_are_read_in_any_other_cut(layout: str, tmp_path: Path) -> None:
    reader = write(tmp_path, *LAYOUTS[layout])
    assert reader.shapes == {"w": (8, 6)}
    for rows, columns in BOXES:
        box = WHOLE[rows, columns]
        place = {"offset": (rows.start, columns.start), "shape": box.shape}
        for start, stop in [(0, None), (0, 1), (3, 5), (box.numel() - 1, box.numel())]:
            read = reader.read("weight", "w", **place, start=start, stop=stop)
            assert torch.equal(read, box.reshape(-1)[start:stop])


@pytest.mark.parametrize(
    ("ranks", "offset", "shape"),
    [
        ([[fragment(slice(0, 8), ALL, 0, 47)]], (0, 0), (8, 6)),
        ([[fragment(slice(0, 8), ALL, 0, 47)]], (4, 0), (4, 6)),
        ([[fragment(slice(0, 4), ALL)]], (0, 0), (8, 6)),
        ([[fragment(slice(0, 4), ALL)]], (2, 0), (4, 6)),
    ],
)
def test_missing_elements_are_an_error(
    ranks: list[list[Fragment]], offset: tuple[int, int], shape: tuple[int, int], tmp_path: Path
) -> None:
    reader = write(tmp_path, *ranks)
    with pytest.raises(CheckpointError, match=r"elements of weight of w"):
        reader.read("weight", "w", offset=offset, shape=shape)


def test_elements_written_twice_are_an_error(tmp_path: Path) -> None:
    reader = write(tmp_path, [fragment(slice(0, 8), ALL)], [fragment(slice(0, 8), ALL)])
    with pytest.raises(CheckpointError, match="96 of 48 elements"):
        reader.read("weight", "w", offset=(0, 0), shape=(8, 6))


def test_unknown_parameter_kind_and_shape_are_errors(tmp_path: Path) -> None:
    reader = write(tmp_path, [fragment(slice(0, 8), ALL)])
    whole = {"offset": (0, 0), "shape": (8, 6)}
    with pytest.raises(CheckpointError, match="no weight of parameter 'v': it is of another model"):
        reader.read("weight", "v", **whole)
    with pytest.raises(CheckpointError, match="no exp_avg of parameter 'w'"):
        reader.read("exp_avg", "w", **whole)
    with pytest.raises(CheckpointError, match=r"'w' with shape \[8, 6\], the model has \[8, 12\]"):
        reader.read("weight", "w", **whole, whole_shape=(8, 12))


@pytest.mark.parametrize("content", ["", "{", "{}x", "[1]", '[{"kind": "weight"}]', "null"])
def test_unreadable_index_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index.json cannot be read"):
        FragmentReader(tmp_path)


def test_missing_and_broken_files_are_errors(tmp_path: Path) -> None:
    write(tmp_path, [fragment(slice(0, 8), ALL)])
    file = tmp_path / "0.safetensors"
    content = file.read_bytes()
    for broken in (content[:20], b"", None):
        file.unlink() if broken is None else file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"0.safetensors cannot be read"):
            FragmentReader(tmp_path).read("weight", "w", offset=(0, 0), shape=(8, 6))


def test_index_reaches_no_file_outside_the_checkpoint(tmp_path: Path) -> None:
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    write(inside, [fragment(slice(0, 8), ALL)])
    (inside / "0.safetensors").rename(tmp_path / "0.safetensors")
    entries = json.loads((inside / "index.json").read_text())
    entries[0]["file"] = "../0.safetensors"
    (inside / "index.json").write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=r"checkpoint/0.safetensors cannot be read"):
        FragmentReader(inside).read("weight", "w", offset=(0, 0), shape=(8, 6))


def test_views_of_one_buffer_are_written(tmp_path: Path) -> None:
    """The distributed optimizer's float32 weights are ranges of one big buffer."""
    buffer = WHOLE.reshape(-1)
    pieces = [
        Fragment(
            kind="weight", name="w", whole_shape=(8, 6), offset=(0, 0), shape=(8, 6), start=i, data=buffer[i : i + 16]
        )
        for i in (0, 16, 32)
    ]
    reader = write(tmp_path, pieces)
    assert torch.equal(reader.read("weight", "w", offset=(0, 0), shape=(8, 6)), buffer)


def test_files_hold_data_only(tmp_path: Path) -> None:
    write(tmp_path, [fragment(slice(0, 8), ALL)])
    content = (tmp_path / "0.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header == {"weight/w/0": {"dtype": "F32", "shape": [48], "data_offsets": [0, 192]}}
    with pytest.raises(ValueError, match="opcode"):
        list(pickletools.genops(content))
