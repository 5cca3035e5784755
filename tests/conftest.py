import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from steerscale.data.prepare import PrepareConfig, prepare_dataset
from steerscale.data.sample import sample_corpus
from steerscale.testing.ranks import RankPool
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.registry import train_tokenizer


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Persistent gloo ranks, started when first used."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def german_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset: the beginning of the German sample in 1000 tokens, with train and valid splits."""
    directory = tmp_path_factory.mktemp("german")
    with lzma.open(sample_corpus("german")[0], "rt", encoding="utf-8") as file:
        lines = list(islice(file, 1200))
    text = directory / "text.txt"
    text.write_text("".join(lines), encoding="utf-8")
    (directory / "tokenizer").mkdir()
    train_tokenizer(TokenizerConfig(type="bpe", vocab_size=1000), lines).save(directory / "tokenizer")
    config = PrepareConfig(split=[0.95, 0.05, 0.0])
    prepare_dataset([str(text)], tokenizer=directory / "tokenizer", output=directory / "data", config=config)
    return directory / "data"


@pytest.fixture(scope="session")
def sae_run(pool: RankPool, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an SAE on a run of a GPT, both barely trained: runs/german_demo_sae beside runs/german_demo."""
    from steerscale.rundir import create_run_dir
    from tests.sae.training import language_model, sae_config, train_sae
    from tests.train.runs import train

    directory = tmp_path_factory.mktemp("steer") / "runs"
    directory.mkdir()
    lm = language_model(german_data, directory / "german_demo")
    pool.run(train, lm, ranks=1)
    config = sae_config(lm, german_data, directory / "german_demo_sae")
    create_run_dir(Path(config.run_dir), config, command=["test"])
    pool.run(train_sae, config, ranks=1)
    return Path(config.run_dir)
