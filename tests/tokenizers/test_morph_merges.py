import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from steerscale import native
from steerscale.tokenizers.config import SPECIAL
from steerscale.tokenizers.morph_merges import Learned, learn_merges
from steerscale.tokenizers.morph_words import count_words, pre_tokenizer, spell
from tests.tokenizers.morph_words import BYTE_IDS, TEXTS, TOKENS, merge_plainly

COMPILED = [
    pytest.param(True, marks=pytest.mark.skipif(native.bpe_library() is None, reason="no C++ compiler")),
    False,
]


def learn(words, borders, counts, *, vocab_size: int, bias: float, compiled: bool = True) -> Learned:
    return learn_merges(
        words, borders, counts, tokens=TOKENS, byte_ids=BYTE_IDS, vocab_size=vocab_size, bias=bias, compiled=compiled
    )


def random_words(seed: int) -> tuple[list[bytes], list[list[int]], list[int]]:
    """Few letters, so that pairs overlap, repeat and tie."""
    generator = random.Random(seed)
    words = sorted({bytes(generator.choices(b"aab", k=generator.randrange(1, 12))) for _ in range(60)})
    borders = [[at for at in range(1, len(word)) if generator.random() < 0.3] for word in words]
    return words, borders, [generator.randrange(1, 9) for _ in words]


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("bias", [0.0, 0.5, 0.875, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_merges_are_those_of_the_definition(seed: int, bias: float, compiled: bool) -> None:
    words = random_words(seed)
    learned = learn(*words, vocab_size=310, bias=bias, compiled=compiled)
    assert learned.merges.tolist() == [list(merge) for merge in merge_plainly(*words, vocab_size=310, bias=bias)]


@pytest.mark.parametrize("bias", [0.0, 0.3, 1.0])
def test_compiled_and_python_agree_on_text(bias: float) -> None:
    counted = count_words(TEXTS[:300])
    generator = random.Random(0)
    borders = [[at for at in range(1, len(word)) if generator.random() < 0.2] for word in counted]
    arguments = (list(counted), borders, list(counted.values()))
    compiled, python = (learn(*arguments, vocab_size=700, bias=bias, compiled=c) for c in (True, False))
    assert np.array_equal(compiled.merges, python.merges)
    assert np.array_equal(compiled.starts, python.starts)
    assert len(compiled.merges) >= 700 - len(TOKENS)


def test_without_bias_merges_are_those_of_the_tokenizers_library() -> None:
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator(TEXTS, trainer)
    model = json.loads(reference.to_str())["model"]
    counted = count_words(TEXTS)
    borders = [list(range(1, len(word))) for word in counted]  # which mean nothing at bias 0
    learned = learn(list(counted), borders, list(counted.values()), vocab_size=3000, bias=0.0)
    pieces = [*SPECIAL.values(), *map(spell, TOKENS[len(SPECIAL) :])]
    merges = []
    for left, right, result in learned.merges.tolist():
        merges.append([pieces[left], pieces[right]])
        if result == len(pieces):
            pieces.append(pieces[left] + pieces[right])
    assert merges == model["merges"]
    assert {piece: number for number, piece in enumerate(pieces)} == model["vocab"]


@pytest.mark.parametrize("compiled", COMPILED)
def test_strict_bias_keeps_every_border(compiled: bool) -> None:
    words, borders, counts = random_words(7)
    learned = learn(words, borders, counts, vocab_size=10_000, bias=1.0, compiled=compiled)
    ends = np.cumsum([0, *map(len, words)])
    wanted = np.array([end + at for end, inside in zip(ends, borders) for at in inside])
    assert learned.starts[wanted].all()
    # and merges all there is between them
    assert learned.starts.sum() == len(wanted) + len(words)


def test_soft_bias_lies_between() -> None:
    words, borders, counts = random_words(8)
    ends = np.cumsum([0, *map(len, words)])
    wanted = np.array([end + at for end, inside in zip(ends, borders) for at in inside])
    recall = [learn(words, borders, counts, vocab_size=280, bias=bias).starts[wanted].mean() for bias in (0, 0.9, 1)]
    assert recall[0] < recall[1] < recall[2] == 1


def test_nothing_to_learn_from() -> None:
    for compiled in (True, False):
        assert learn([], [], [], vocab_size=300, bias=0.5, compiled=compiled).merges.shape == (0, 3)
        assert learn([b"a"], [[]], [3], vocab_size=300, bias=0.5, compiled=compiled).merges.shape == (0, 3)


def test_without_a_compiler_python_learns_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = random_words(9)
    expected = learn(*words, vocab_size=290, bias=0.5)
    monkeypatch.setenv("PATH", str(tmp_path))
    native.bpe_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            found = learn(*words, vocab_size=290, bias=0.5)
    finally:
        native.bpe_library.cache_clear()
    assert np.array_equal(found.merges, expected.merges)
    assert "no compiled trainer of merges, Python is used instead" in caplog.text
