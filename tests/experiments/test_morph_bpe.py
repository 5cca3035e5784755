"""The experiment with morphological BPE end to end at a tiny size, on the German sample."""

import dataclasses
import json
import lzma
import math
from pathlib import Path

import pytest
import torch

from launch.experiment import load_experiment, train
from steerscale.data.sample import sample_corpus
from steerscale.errors import ConfigError, DataError
from steerscale.experiments.morph_bpe import EXPERIMENT, bits_per_byte, gpt_config
from steerscale.experiments.morph_bpe_config import LanguageConfig, MorphBPEConfig
from steerscale.experiments.morph_bpe_report import mean_and_error, paired, spoken
from steerscale.experiments.morph_bpe_text import dataset
from steerscale.experiments.stages import run_experiment
from steerscale.language_model import LanguageModel, load_language_model
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.registry import load_tokenizer

LINES = lzma.decompress(sample_corpus()[0].read_bytes()).decode().split("\n")
SMALL = [
    "name=tiny", "text_bytes=150000", "held_out_bytes=6000", "seen_bytes=30000", "seeds=1", "gpt.model.num_layers=1",
    "gpt.model.d_model=32", "gpt.model.num_heads=2", "gpt.model.d_ff=64", "sequence_bytes=150",
    "gpt.optim.warmup_steps=2",
]  # fmt: skip


def tiny_config(place: Path) -> MorphBPEConfig:
    _, config = load_experiment("morph_bpe/small", SMALL)
    assert isinstance(config, MorphBPEConfig)
    language = LanguageConfig(
        corpus=str(place / "corpus.txt"), out_of_domain=str(place / "other.txt"), gold=str(place / "gold.tsv")
    )
    table = str(place / "segments.tsv")
    tokenizers = {
        "bpe": TokenizerConfig(type="morph_bpe", bias=0.0, vocab_size=600),
        "morph_bpe": TokenizerConfig(type="morph_bpe", bias=1.0, segmentation=table, vocab_size=600),
    }
    run_dir = str(place / "run")
    return dataclasses.replace(config, run_dir=run_dir, languages={"de": language}, tokenizers=tokenizers)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the texts and of the finished experiment."""
    place = tmp_path_factory.mktemp("morph_bpe")
    other = LINES[1500:1600]
    (place / "corpus.txt").write_text("\n".join([*LINES[:1200], *other]))
    (place / "other.txt").write_text("\n".join(other))
    (place / "gold.tsv").write_text("Paketen\tPaket @@en\nSysteme\tSystem @@e\n")
    (place / "segments.tsv").write_text("pakete\tpaket e\npaketen\tpaket en\nsysteme\tsystem e\n")
    run_experiment(EXPERIMENT, tiny_config(place), train=train, say=print)
    return place


def test_texts_do_not_overlap(place: Path) -> None:
    parts = {
        part: (place / "run" / "texts" / "de" / f"{part}.txt").read_text().splitlines()
        for part in ("train", "in_domain", "out_of_domain")
    }
    assert not set(parts["train"]) & set(parts["in_domain"])
    assert not {*parts["train"], *parts["in_domain"]} & {line.strip() for line in LINES[1500:1600]}
    assert sum(len(line.encode()) for line in parts["train"]) >= 150_000


def test_models_saw_the_same_bytes(place: Path) -> None:
    found = json.loads((place / "run" / "results.json").read_text())["results"]
    for kind in ("bpe", "morph_bpe"):
        seen = found["train"]["de"][kind]["tokens"] * found["datasets"]["de"][kind]["train"]["bytes_per_token"]
        assert seen == pytest.approx(30_000, rel=0.01)
        assert found["train"]["de"][kind]["steps"] == 50
    assert found["tokenizers"]["de"]["bpe"]["gold"]["words"] == 2
    assert load_tokenizer(place / "run" / "tokenizers" / "de" / "morph_bpe").type == "morph_bpe"


def test_bits_per_byte_are_those_of_the_definition(place: Path) -> None:
    config = tiny_config(place)
    values = json.loads((place / "run" / "results.json").read_text())["results"]["evaluate"]["de"]["bpe"][
        "out_of_domain"
    ]
    path = dataset(place / "run", "de", "bpe", "out_of_domain")
    run = gpt_config(config, place / "run", "de", "bpe", 0)
    with initialize(ParallelLayout()) as context:
        lm = load_language_model(Path(run.run_dir), context)
        assert bits_per_byte(lm, path) == pytest.approx(values[0])
        by_hand = _by_hand(lm, place / "run" / "texts" / "de" / "out_of_domain.txt")
        lm.close()
    assert values[0] == pytest.approx(by_hand, rel=0.02)  # the last window is left out there
    assert 2 < values[0] < 8


def _by_hand(lm: LanguageModel, text: Path) -> float:
    """All tokens of the text but the first, in windows as they come, over all of its bytes."""
    lines = text.read_text().splitlines()
    tokens = [token for line in lines for token in (*lm.tokenizer.encode(line), lm.tokenizer.eos_id)]
    nats = 0.0
    for begin in range(0, len(tokens) - 1, lm.seq_len):
        window = torch.tensor([tokens[begin : begin + lm.seq_len + 1]])
        logits = lm.logits(window[:, :-1])
        assert logits is not None
        nats -= logits.log_softmax(-1).gather(-1, window[:, 1:, None]).sum().item()
    return nats / math.log(2) / sum(len(line.encode()) for line in lines)


def test_second_start_runs_nothing(place: Path) -> None:
    said: list[str] = []
    run_experiment(EXPERIMENT, tiny_config(place), train=train, say=said.append)
    assert sum("done before" in line for line in said) == 5
    assert "bits per byte after 0.03 MB" in said[-1]
    assert (place / "run" / "morph_bpe.png").stat().st_size > 5_000


def test_tokenizers_of_an_interrupted_start_with_other_settings_are_trained_again(place: Path, tmp_path: Path) -> None:
    first = dataclasses.replace(EXPERIMENT, stages=EXPERIMENT.stages[:2], report=lambda *_: "")

    def start(vocab_size: int, table: Path) -> None:
        config = tiny_config(place)
        kinds = {
            name: dataclasses.replace(one, vocab_size=vocab_size, segmentation=one.segmentation and str(table))
            for name, one in config.tokenizers.items()
        }
        config = dataclasses.replace(config, run_dir=str(tmp_path), tokenizers=kinds)
        run_experiment(first, config, train=train, say=print)

    with pytest.raises(DataError, match="nowhere"):
        start(500, place / "nowhere.tsv")
    directory = tmp_path / "tokenizers" / "de" / "bpe"
    assert load_tokenizer(directory).vocab_size == 500
    start(560, place / "segments.tsv")
    assert load_tokenizer(directory).vocab_size == 560


def test_differences_are_paired() -> None:
    assert paired([1.0, 2.0], [0.5, 1.0]) == [0.5, 1.0]
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))
    assert spoken([2.0]) == "2.0000"
    assert spoken([0.1, 0.1], sign=True) == "+0.1000 +- 0.0000"


def test_named_sections_are_set_one_by_one() -> None:
    _, config = load_experiment("morph_bpe/small", ["languages.cs.corpus=other.txt", "tokenizers.morph_bpe.bias=0.5"])
    assert isinstance(config, MorphBPEConfig)
    assert (config.languages["cs"].corpus, config.tokenizers["morph_bpe"].bias) == ("other.txt", 0.5)
    assert config.languages["en"].corpus.endswith("corpora/en.txt.xz")
    with pytest.raises(ConfigError, match=r"unknown key 'languages.cs.corpsu': did you mean 'corpus'\?"):
        load_experiment("morph_bpe/small", ["languages.cs.corpsu=x"])


def test_sizes_are_configurations() -> None:
    _, config = load_experiment("morph_bpe/gpu")
    assert isinstance(config, MorphBPEConfig)
    assert set(config.languages) == {"en", "cs", "de"}


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    _, config = load_experiment("morph_bpe/small")
    assert isinstance(config, MorphBPEConfig)
    other = {**config.tokenizers, "unigram": TokenizerConfig(vocab_size=5000)}
    with pytest.raises(ConfigError, match=r"vocab_size must all be the same, got .*5000"):
        dataclasses.replace(config, tokenizers=other)
    with pytest.raises(ConfigError, match="seeds must be positive"):
        dataclasses.replace(config, seeds=0)
    (tmp_path / "few.txt").write_text("zu wenig\n")
    language = LanguageConfig(corpus=str(tmp_path / "few.txt"), out_of_domain=str(tmp_path / "few.txt"))
    short = dataclasses.replace(config, run_dir=str(tmp_path / "run"), languages={"de": language})
    with pytest.raises(DataError, match=r"few.txt is too short: 150,000 bytes were to be drawn, 0 were left"):
        run_experiment(EXPERIMENT, short, train=train, say=print)
