import json

import pytest

from steerscale.data.manifest import inspect_dataset
from steerscale.errors import DataError


def test_reads_what_was_written(counted):
    manifest = inspect_dataset(counted)
    assert manifest.splits["train"].tokens == 1001
    assert manifest.splits["train"].bytes_per_token == 3
    assert manifest.require_split("train", seq_len=1000, path=counted).documents == 1


def test_missing_directory(tmp_path):
    with pytest.raises(DataError, match=r"no dataset directory .* make one with `steerscale data prepare`"):
        inspect_dataset(tmp_path / "nowhere")


def test_missing_manifest(tmp_path):
    with pytest.raises(DataError, match=r"it has no manifest.json"):
        inspect_dataset(tmp_path)


def test_newer_format(counted):
    manifest = counted / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 2}))
    with pytest.raises(DataError, match="format_version 2, this version of steerscale reads 1"):
        inspect_dataset(counted)


@pytest.mark.parametrize("name", ["train.bin", "valid.idx"])
def test_missing_file(counted, name):
    (counted / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        inspect_dataset(counted)


@pytest.mark.parametrize("name", ["train.bin", "valid.idx"])
def test_truncated_file(counted, name):
    file = counted / name
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 2)
    with pytest.raises(DataError, match=f"{name} has {size - 2} bytes where the manifest expects {size}"):
        inspect_dataset(counted)


def test_foreign_index(counted):
    file = counted / "train.idx"
    file.write_bytes(b"X" + file.read_bytes()[1:])
    with pytest.raises(DataError, match="another header"):
        inspect_dataset(counted)


def test_fewer_tokens_than_a_sequence(counted):
    with pytest.raises(DataError, match=r"has 1001 tokens, fewer than one sequence: model.seq_len=1001 needs 1002"):
        inspect_dataset(counted).require_split("train", seq_len=1001, path=counted)


def test_missing_split(counted):
    with pytest.raises(DataError, match="has no split 'test', only train, valid"):
        inspect_dataset(counted).require_split("test", seq_len=8, path=counted)
