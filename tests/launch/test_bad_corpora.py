"""Unreadable corpora at the command line: one clear line, status 2, no dataset or tokenizer left behind."""

import gzip
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from steerscale.cli import main
from tests.launch.conftest import listing

PREPARE = "data prepare {} --tokenizer {tokenizer} -o out --workers 1"
TRAIN = "tokenizer train {} -o out --vocab-size 300"
FILES: dict[str, bytes] = {
    "good.txt": b"Guten Tag\n" * 50,
    "empty.txt": b"",
    "blank.txt": b" \n\n \n",
    "latin.txt": "Tag\nGröße\n".encode("latin-1"),
    "cut.txt.gz": gzip.compress(b"Guten Tag\n" * 1000)[:-20],
    "fake.txt.xz": b"no xz",
    "broken.jsonl": b'{"text": "a"}\n{"text": \n',
    "no_key.jsonl": b'{"body": "a"}\n',
    "number.jsonl": b'{"text": 5}\n',
    "fake.parquet": b"PAR1",
    "notes.doc": b"x",
    "folder/a.txt": b"Guten Tag\n",
}
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "missing": (PREPARE.replace("{}", "nowhere.txt"), ("no input file nowhere.txt",)),
    "second one missing": (PREPARE.replace("{}", "good.txt nowhere.txt"), ("no input file nowhere.txt",)),
    "directory": (PREPARE.replace("{}", "folder"), ("folder is a directory", "--format hf")),
    "unknown suffix": (PREPARE.replace("{}", "notes.doc"), ("format of notes.doc", "--format txt | jsonl")),
    "empty": (PREPARE.replace("{}", "empty.txt"), ("hold no documents",)),
    "blank": (PREPARE.replace("{}", "blank.txt"), ("hold no documents", "white space")),
    "not UTF-8": (PREPARE.replace("{}", "latin.txt"), ("latin.txt, line 2", "0xf6", "UTF-8", "iconv")),
    "cut off": (PREPARE.replace("{}", "cut.txt.gz"), ("cut.txt.gz cannot be read as gzip", "incomplete")),
    "not compressed": (PREPARE.replace("{}", "fake.txt.xz"), ("fake.txt.xz cannot be read as xz",)),
    "broken jsonl": (PREPARE.replace("{}", "broken.jsonl"), ("broken.jsonl", "2")),
    "jsonl without key": (PREPARE.replace("{}", "no_key.jsonl"), ("no_key.jsonl", "'text'", "--text-key")),
    "jsonl with a number": (PREPARE.replace("{}", "number.jsonl"), ("number.jsonl", "text")),
    "not parquet": (PREPARE.replace("{}", "fake.parquet"), ("fake.parquet cannot be read as parquet",)),
    "unknown sample": (PREPARE.replace("{}", "sample:french"), ("no sample:french", "sample:german")),
    "split of two": (PREPARE.replace("{}", "good.txt") + " --split 0.5,0.5", ("split must be 3 shares", "[0.5, 0.5]")),
    "split got nothing": (
        PREPARE.replace("{}", "good.txt") + " --split 0.999998,0.000001,0.000001",
        ("split 'valid' got none of the 50 documents", "--split"),
    ),
    "no tokenizer": (
        "data prepare good.txt --tokenizer nowhere -o out",
        ("no tokenizer directory nowhere", "steerscale tokenizer train"),
    ),
    "other directory": ("data prepare good.txt --tokenizer folder -o out", ("folder is not a tokenizer",)),
    "output taken": (
        "data prepare good.txt --tokenizer {tokenizer} -o folder",
        ("folder exists", "choose another output"),
    ),
    "tokenizer: missing": (TRAIN.replace("{}", "nowhere.txt"), ("no input file nowhere.txt",)),
    "tokenizer: empty": (TRAIN.replace("{}", "empty.txt"), ("no text to train a tokenizer on",)),
    "tokenizer: not UTF-8": (TRAIN.replace("{}", "latin.txt"), ("latin.txt, line 2", "UTF-8")),
    "tokenizer: cut off": (TRAIN.replace("{}", "cut.txt.gz"), ("cut.txt.gz cannot be read as gzip",)),
    "tokenizer: too small": (
        "tokenizer train good.txt -o out --vocab-size 100",
        ("tokenizer.vocab_size=100", "more than 260"),
    ),
    "tokenizer: too large": (
        "tokenizer train good.txt -o out --vocab-size 5000",
        ("tokenizer.vocab_size=5000 is too large", "at most"),
    ),
    "tokenizer: output taken": ("tokenizer train good.txt -o folder --vocab-size 300", ("folder exists",)),
    "dataset missing": ("data show nowhere", ("no dataset directory nowhere", "steerscale data prepare")),
}


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refusal(corpora: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refuse(*argv: str) -> str:
        before = listing(corpora)
        status = main(argv)
        out, err = capsys.readouterr()
        assert listing(corpora) == before
        assert (status, out) == (2, "")
        *progress, error = err.splitlines()
        assert all("documents" in line for line in progress)
        assert error.startswith("steerscale: error: ")
        return error

    return refuse


@pytest.mark.parametrize("case", CASES)
def test_refuses_unreadable_corpora(case: str, refusal: Callable[..., str], german_data: Path) -> None:
    arguments, parts = CASES[case]
    text = refusal(*shlex.split(arguments.format(tokenizer=german_data / "tokenizer")))
    for part in parts:
        assert part in text
