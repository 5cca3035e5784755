from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from steerscale.data.indexed import IndexedWriter
from steerscale.data.manifest import DatasetManifest, SplitInfo, TokenizerInfo
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.registry import train_tokenizer

EOS = 0

MakeDataset = Callable[..., Path]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """A function that writes a dataset of known tokens: make_dataset(name, {split: list of documents})."""

    def make(name: str, splits: dict[str, list[list[int]]], *, hash: str = "abc") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        infos = {}
        for split, documents in splits.items():
            with IndexedWriter(directory / split, dtype="uint16") as writer:
                for document in documents:
                    tokens = np.array([*document, EOS], dtype=np.uint16)
                    writer.add(tokens.tobytes(), np.array([len(tokens)], dtype=np.int32))
            infos[split] = SplitInfo(documents=writer.documents, tokens=writer.tokens, bytes=3 * writer.tokens)
        DatasetManifest(
            tokenizer=TokenizerInfo(type="bpe", hash=hash, vocab_size=5000, eos_id=EOS),
            dtype="uint16",
            splits=infos,
            fractions={split: 1 / len(splits) for split in splits},
            seed=0,
            documents="line",
            text_key="text",
        ).write(directory)
        return directory

    return make


@pytest.fixture
def counted(make_dataset: MakeDataset) -> Path:
    """A dataset whose token at place i is i + 1 (modulo nothing), in one document: what a slice holds shows where it lay."""
    return make_dataset("counted", {"train": [list(range(1, 1001))], "valid": [list(range(1, 104))]})


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [f"Der Satz Nummer {number} steht hier, und noch einer folgt ihm." for number in range(200)]
    train_tokenizer(TokenizerConfig(type="bpe", vocab_size=320), texts).save(directory)
    return directory
