import lzma
import random

import numpy as np
import pytest

from steerscale.data.sample import sample_corpus
from steerscale.errors import ConfigError, DataError
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.registry import load_tokenizer, train_tokenizer
from steerscale.tokenizers.spm import LONGEST_LINE

TEXTS = lzma.decompress(sample_corpus()[0].read_bytes()).decode().split("\n")[:1200]
SPECIAL = "<|user|>"
PARTS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "▁",
    "a",
    "Der",
    "Hund",
    "<s>",
    "</s>",
    "<unk>",
    SPECIAL,
    "<0x41>",
    "\x00",
    "🎉",
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request):
    return train_tokenizer(TokenizerConfig(type=request.param, vocab_size=600, special=[SPECIAL]), TEXTS)


def random_text(generator: random.Random) -> str:
    def part() -> str:
        if generator.random() < 0.5:
            return generator.choice(PARTS)
        return chr(generator.choice([generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)]))

    return "".join(part() for _ in range(generator.randrange(25)))


def test_decode_gives_back_any_text(tokenizer):
    generator = random.Random(1)
    for text in ["", *PARTS, *(random_text(generator) for _ in range(1000))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_never_come_from_text(tokenizer):
    generator = random.Random(2)
    control = {tokenizer.id_of(piece) for piece in ("<unk>", "<s>", "</s>", "<pad>")}
    assert control == {0, 1, 2, 3}
    assert not any(control & set(tokenizer.encode(random_text(generator))) for _ in range(500))


def test_special_text_is_one_token(tokenizer):
    token = tokenizer.id_of(SPECIAL)
    assert tokenizer.encode(f"a{SPECIAL}b").count(token) == 1
    assert tokenizer.piece(token) == SPECIAL
    assert tokenizer.id_of("no such entry") is None


def test_documents_agree_with_single_texts(tokenizer):
    generator = random.Random(3)
    texts = [random_text(generator) for _ in range(50)]
    documents = tokenizer.encode_documents(texts)
    assert all(document.dtype == np.int32 for document in documents)
    assert [document.tolist() for document in documents] == [[*tokenizer.encode(t), tokenizer.eos_id] for t in texts]
    assert tokenizer.encode_documents([]) == []


def test_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.type, loaded.hash, loaded.vocab_size, loaded.eos_id) == (
        tokenizer.type,
        tokenizer.hash,
        tokenizer.vocab_size,
        tokenizer.eos_id,
    )
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (tmp_path / "manifest.json").read_bytes()


def test_changed_model_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    model = tmp_path / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(DataError, match="not the model its manifest describes"):
        load_tokenizer(tmp_path)
    model.unlink()
    with pytest.raises(DataError, match=r"no readable tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_training_is_deterministic_and_the_seed_chooses_lines():
    def trained(seed: int) -> str:
        config = TokenizerConfig(vocab_size=500, input_sentence_size=400, seed=seed)
        return train_tokenizer(config, TEXTS).hash

    assert trained(0) == trained(0)
    assert trained(0) != trained(1)


def test_long_lines_take_part_in_training():
    # Sentencepiece alone would leave out a line of this length.
    long_line = " ".join(TEXTS)
    assert len(long_line) > 5 * LONGEST_LINE
    tokenizer = train_tokenizer(TokenizerConfig(type="bpe", vocab_size=1000), [long_line])
    assert [tokenizer.piece(token) for token in tokenizer.encode(" Debian")] == ["▁Debian"]


@pytest.mark.parametrize("type", ["unigram", "bpe"])
def test_too_large_vocabulary_names_the_possible_one(type):
    with pytest.raises(ConfigError, match=r"vocab_size=50000 is too large for this corpus: it yields at most \d+"):
        train_tokenizer(TokenizerConfig(type=type, vocab_size=50000), TEXTS)


def test_too_small_vocabulary_names_the_necessary_one():
    with pytest.raises(ConfigError, match=r"vocab_size=262 is too small: .* alone are \d+"):
        train_tokenizer(TokenizerConfig(vocab_size=262), TEXTS)


def test_empty_corpus_is_an_error():
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer(TokenizerConfig(), ["", " \n\t"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 260}, "choose more than 260"),
        ({"character_coverage": 0.0}, r"must be in \(0, 1\]"),
        ({"input_sentence_size": -1}, "at least 0"),
        ({"seed": -1}, r"seed must be in"),
        ({"special": ["a b"]}, "cannot be a special token"),
        ({"special": ["</s>"]}, "cannot be a special token"),
        ({"special": ["x", "x"]}, "names a token twice"),
    ],
)
def test_config_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig(**values)
