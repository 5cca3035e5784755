import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from steerscale.data import sources as sources_module
from steerscale.data.encoding import assign_splits
from steerscale.data.manifest import inspect_dataset
from steerscale.data.prepare import PrepareConfig, prepare_dataset
from steerscale.data.sources import find_sources
from steerscale.errors import ConfigError, DataError
from steerscale.tokenizers.registry import load_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it announces the accelerators that are not installed
    from megatron.core.datasets.indexed_dataset import IndexedDataset

TEXTS = [f"Satz {number} mit ▁ und äöü 🎉" for number in range(500)]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXTS))
    return file


def prepare(text, tokenizer, output, *, workers=1, force=False, report=None, **config):
    config = PrepareConfig(**({"split": [0.8, 0.1, 0.1]} | config))
    return prepare_dataset(
        [str(text)], tokenizer=tokenizer, output=output, config=config, workers=workers, force=force, report=report
    )


def files_of(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_every_document_arrives_once_and_whole(text, tokenizer_directory, tmp_path):
    manifest = prepare(text, tokenizer_directory, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert inspect_dataset(tmp_path / "out") == manifest
    found = {}
    for name, info in manifest.splits.items():
        dataset = IndexedDataset(str(tmp_path / "out" / name))
        documents = [dataset[index].tolist() for index in range(len(dataset))]
        assert all(document[-1] == tokenizer.eos_id for document in documents)
        found[name] = [tokenizer.decode(document) for document in documents]
        assert info.documents == len(documents)
        assert info.tokens == sum(map(len, documents))
        assert info.bytes == sum(len(content.encode()) for content in found[name])
        order = [TEXTS.index(content) for content in found[name]]
        assert order == sorted(order)
    assert sorted(content for contents in found.values() for content in contents) == sorted(TEXTS)


def test_manifest_says_what_went_in(text, tokenizer_directory, tmp_path):
    manifest = prepare(text, tokenizer_directory, tmp_path / "out", seed=7)
    assert manifest.tokenizer.hash == load_tokenizer(tokenizer_directory).hash
    assert (manifest.dtype, manifest.seed) == ("uint16", 7)
    (source,) = manifest.sources
    assert (source.path, source.bytes, len(source.sha256)) == (str(text), text.stat().st_size, 64)


def test_output_does_not_depend_on_the_workers(text, tokenizer_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 500)  # about 40 blocks
    for workers in (1, 2, 3):
        prepare(text, tokenizer_directory, tmp_path / str(workers), workers=workers)
    monkeypatch.undo()
    prepare(text, tokenizer_directory, tmp_path / "one block")
    reference = files_of(tmp_path / "1")
    assert set(reference) >= {"manifest.json", "train.bin", "train.idx", "tokenizer/tokenizer.model"}
    for other in ("2", "3", "one block"):
        assert files_of(tmp_path / other) == reference


def test_splits_follow_shares_and_seed():
    records, shares = np.arange(100_000), np.array([0.9, 0.07, 0.03])
    splits = assign_splits(records, source=0, seed=1, shares=shares)
    assert np.allclose(np.bincount(splits) / len(records), shares, atol=0.003)
    for other in ({"source": 1, "seed": 1}, {"source": 0, "seed": 2}):
        agreement = (assign_splits(records, **other, shares=shares) == splits).mean()
        assert agreement == pytest.approx((shares**2).sum(), abs=0.01)  # as for independent draws
    assert not assign_splits(records, source=0, seed=1, shares=np.array([1.0])).any()


def test_split_of_share_zero_is_not_written(text, tokenizer_directory, tmp_path):
    manifest = prepare(text, tokenizer_directory, tmp_path / "out", split=[1, 0, 0])
    assert list(manifest.splits) == ["train"]
    assert not (tmp_path / "out" / "valid.bin").exists()


def test_progress_ends_at_the_whole(text, tokenizer_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 500)
    seen = []
    manifest = prepare(text, tokenizer_directory, tmp_path / "out", report=seen.append)
    assert len(seen) > 10
    assert [progress.documents for progress in seen] == sorted(progress.documents for progress in seen)
    last = seen[-1]
    assert (last.documents, last.fraction, last.seconds_left) == (500, 1.0, 0.0)
    assert last.tokens == sum(info.tokens for info in manifest.splits.values())
    assert last.text_bytes == sum(len(content.encode()) for content in TEXTS)


@pytest.mark.parametrize("workers", [1, 2])
def test_error_in_the_middle_leaves_nothing(text, tokenizer_directory, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 500)
    text.write_bytes(text.read_bytes() + b"\n\xff\n")
    with pytest.raises(DataError, match=r"text\.txt, line 501: byte 1 of the line \(0xff\)"):
        prepare(text, tokenizer_directory, tmp_path / "out", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_interrupt_leaves_nothing(tokenizer_directory, tmp_path):
    # Ctrl-C in a terminal signals the command and its workers alike.
    script = "import sys; from steerscale.cli import main; sys.exit(main())"
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXTS) * 4_000)
    arguments = ["data", "prepare", str(file), "--tokenizer", str(tokenizer_directory), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "--workers", "2"],
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Shells start what runs in the background with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob(".out.*/train.bin")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, b"steerscale: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_existing_output_needs_force(text, tokenizer_directory, tmp_path):
    prepare(text, tokenizer_directory, tmp_path / "out")
    with pytest.raises(DataError, match="--force"):
        prepare(text, tokenizer_directory, tmp_path / "out", seed=1)
    assert prepare(text, tokenizer_directory, tmp_path / "out", seed=1, force=True).seed == 1


def test_empty_corpus(tokenizer_directory, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" \n\n")
    with pytest.raises(DataError, match="the inputs hold no documents"):
        prepare(file, tokenizer_directory, tmp_path / "out")


def test_empty_split(tokenizer_directory, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("ein Satz\nnoch einer")
    with pytest.raises(DataError, match=r"got none of the 2 documents: raise its share in --split, set it to 0"):
        prepare(file, tokenizer_directory, tmp_path / "out", split=[0.9998, 0.0001, 0.0001])
    assert not (tmp_path / "out").exists()


def test_missing_tokenizer(text, tmp_path):
    with pytest.raises(DataError, match="there is no tokenizer directory"):
        prepare(text, tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("split", [[0.5, 0.5], [0.9, 0.2, 0.1], [1.1, -0.1, 0]])
def test_bad_shares(split):
    with pytest.raises(ConfigError, match="split must be 3 shares"):
        PrepareConfig(split=split)


def test_large_vocabulary_takes_int32(text, tokenizer_directory, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(tokenizer_directory)
    monkeypatch.setattr(tokenizer, "vocab_size", 70000)
    for module in ("prepare", "encoding"):
        monkeypatch.setattr(f"steerscale.data.{module}.load_tokenizer", lambda path: tokenizer)
    manifest = prepare(text, tokenizer_directory, tmp_path / "out")
    assert manifest.dtype == "int32"
    dataset = IndexedDataset(str(tmp_path / "out" / "train"))
    assert dataset[0].dtype == np.int32
    assert tokenizer.decode(dataset[0]) in TEXTS


def test_sample_corpus_is_german_text():
    sources = find_sources(["sample:german"])
    assert sum(source.stored_bytes for source in sources) < 1.4e6
    first = next(sources_module.read_chunks(sources[0]))[0].decode(errors="ignore")
    assert "Debian" in first
    assert " und " in first


def test_command_line_road(tmp_path, capsys):
    from steerscale.cli import main

    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"body": content}) for content in TEXTS))
    key = ["--text-key", "body"]
    assert main(["tokenizer", "train", str(text), *key, "-o", str(tmp_path / "tok"), "--vocab-size", "300"]) == 0
    road = [str(text), *key, "--tokenizer", str(tmp_path / "tok"), "-o", str(tmp_path / "out"), "--workers", "1"]
    assert main(["data", "prepare", *road, "--split", "0.9,0.1,0"]) == 0
    assert main(["data", "show", str(tmp_path / "out")]) == 0
    assert main(["tokenizer", "show", str(tmp_path / "out" / "tokenizer"), "Satz"]) == 0
    shown = capsys.readouterr()
    assert "train " in shown.out
    assert "bytes/token" in shown.out
    assert shown.err == ""
    assert main(["data", "prepare", *road]) == 2
    assert "exists already: choose another output directory" in capsys.readouterr().err
    assert main(["data", "prepare", *road, "--workers", "0"]) == 2
    assert main(["data", "prepare", *road, "--format", "word"]) == 2
    assert "format must be one of auto | txt" in capsys.readouterr().err
