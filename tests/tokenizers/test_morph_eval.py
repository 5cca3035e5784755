import json
import math
from pathlib import Path

import numpy as np
import pytest

from steerscale.cli import main
from steerscale.errors import DataError
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.huggingface import HuggingFaceTokenizer
from steerscale.tokenizers.morph_eval import overlaps, renyi_efficiency, score_text, spellings_of
from steerscale.tokenizers.morph_metrics import score_words
from steerscale.tokenizers.morph_spelling import Spelling
from steerscale.tokenizers.registry import train_tokenizer
from tests.tokenizers.morph_words import TEXTS

GOLD = {"walks": ["walk", "s"], "talks": ["talk", "s"], "walked": ["walk", "ed"], "tree": ["tree"]}


def by_table(**cuts: str):
    return lambda word: [part.encode() for part in cuts[word].split()]


@pytest.fixture(scope="module")
def spellings() -> dict[str, Spelling]:
    configs = {
        "unigram": TokenizerConfig(type="unigram", vocab_size=700),
        "bpe": TokenizerConfig(type="bpe", vocab_size=700),
        "byte_level": TokenizerConfig(type="morph_bpe", vocab_size=700, bias=0.0),
    }
    return spellings_of({name: train_tokenizer(config, TEXTS) for name, config in configs.items()})


def test_gold_against_itself_is_perfect() -> None:
    scores = score_words(by_table(walks="walk s", talks="talk s", walked="walk ed", tree="tree"), GOLD)
    assert (scores.precision, scores.recall, scores.f1, scores.edit_distance) == (1, 1, 1, 0)
    assert (scores.consistency_f1, scores.stem_consistency) == (1, 1)
    assert scores.parts == scores.morphemes == 7 / 4


def test_scores_of_a_small_example() -> None:
    # borders: 4|4 wal.k.s, none in talks, walk.ed, t.ree -> 4 found, 3 wanted, 2 right
    scores = score_words(by_table(walks="wal k s", talks="talks", walked="walk ed", tree="t ree"), GOLD)
    assert (scores.precision, scores.recall) == (2 / 4, 2 / 3)
    assert scores.f1 == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    assert scores.edit_distance == (2 + 2 + 0 + 2) / 4
    # pairs that share a morpheme: walks-talks, walks-walked; pairs that share a part: none
    assert scores.consistency_f1 == 0
    # two words have the stem "walk": one is cut wal.k, the other walk; either way one of two agrees
    assert scores.stem_consistency == 1 / 2
    joined = score_words(by_table(walks="walks", talks="talk s", walked="walk ed", tree="walk s"[:4]), GOLD)
    assert joined.stem_consistency == 1 / 2  # walks does not cut its stem off


def test_consistency_counts_pairs() -> None:
    # sharing a part: walks-talks (s), walks-tree (walk), talks-tree (s); of these one shares a morpheme, of two that do
    scores = score_words(by_table(walks="walk s", talks="talk s", walked="walked", tree="s walk"), GOLD)
    precision, recall = 1 / 3, 1 / 2
    assert scores.consistency_f1 == pytest.approx(2 * precision * recall / (precision + recall))


def test_renyi_efficiency_by_its_formula() -> None:
    assert renyi_efficiency(np.array([5, 5, 5, 5])) == pytest.approx(1)
    shares = np.array([0.5, 0.25, 0.25])
    expected = math.log((shares**2.5).sum()) / -1.5 / math.log(4)
    assert renyi_efficiency(np.array([2, 1, 1, 0])) == pytest.approx(expected)


def test_parts_of_a_word_are_its_bytes(spellings: dict[str, Spelling]) -> None:
    for spelling in spellings.values():
        for word in ("Paketen", "přístupového", "größte", "🎉", "▁"):
            assert b"".join(spelling.word(word)) == word.encode()


def test_texts_are_counted(spellings: dict[str, Spelling]) -> None:
    texts = TEXTS[:50]
    for spelling in spellings.values():
        scores = score_text(spelling, iter(texts))
        tokens = sum(len(spelling.tokenizer.encode(text)) for text in texts)
        assert scores.fertility == tokens / sum(len(text.split()) for text in texts)
        assert scores.bytes_per_token == sum(len(text.encode()) for text in texts) / tokens
        assert 0.9 < scores.coverage <= 1
        assert 0 < scores.used < 1
        # Of 4 characters unknown to all of them, none is whole.
        assert score_text(spelling, ["語語語語"]).coverage == 0
    with pytest.raises(DataError, match="no text to evaluate"):
        score_text(spellings["bpe"], [])


def test_vocabularies_overlap(spellings: dict[str, Spelling]) -> None:
    found = overlaps(spellings)
    assert all(found[name][name] == 1 for name in found)
    assert found["bpe"]["unigram"] == found["unigram"]["bpe"]
    assert 0.3 < found["bpe"]["byte_level"] < 1


def test_a_tokenizer_that_normalises_is_refused() -> None:
    import tokenizers
    from tokenizers import models, normalizers

    backend = tokenizers.Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "?": 2}, merges=[], unk_token="?"))
    backend.normalizer = normalizers.Lowercase()
    settings = {"eos_token": "</s>"}
    lower = HuggingFaceTokenizer(backend.to_str().encode(), settings, origin="lower")
    with pytest.raises(DataError, match="lower: this huggingface tokenizer does not spell texts as they are"):
        spellings_of({"lower": lower})


def test_command_prints_tables_and_writes_files(
    spellings: dict[str, Spelling], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, spelling in spellings.items():
        (tmp_path / name).mkdir()
        spelling.tokenizer.save(tmp_path / name)
    (tmp_path / "text.txt").write_text("\n".join(TEXTS[:20]))
    (tmp_path / "gold.tsv").write_text("Paketen\tPaket @@en\nläuft\tlauf @@t\n")
    (tmp_path / "cut.tsv").write_text("paketen\tpak eten\n")
    directories = [str(tmp_path / name) for name in spellings]
    command = [
        "tokenizer",
        "eval",
        *directories,
        "--text",
        str(tmp_path / "text.txt"),
        "--gold",
        str(tmp_path / "gold.tsv"),
    ]
    assert main([*command, "--segmentation", str(tmp_path / "cut.tsv"), "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("tokens/word", "unigram", "cut.tsv", "2 words, 2.00 morphemes a word"))
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert found["gold"]["cut.tsv"]["f1"] == 0
    assert set(found["texts"][str(tmp_path / "text.txt")]) == set(spellings)
    assert (tmp_path / "out" / "eval.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "nothing to evaluate on"), (["--text", "x", "--segmentation", "y"], "give --gold FILE.tsv as well")],
)
def test_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "eval", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err
