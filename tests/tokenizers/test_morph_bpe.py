import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from steerscale.data.manifest import inspect_dataset
from steerscale.data.prepare import PrepareConfig, prepare_dataset
from steerscale.errors import ConfigError, DataError
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.morph_bpe import MorphBPETokenizer, first_tokens, prepare_words
from steerscale.tokenizers.morph_merges import learn_merges
from steerscale.tokenizers.morph_words import BYTE_CHARACTERS, count_words, pre_tokenizer, spell
from steerscale.tokenizers.registry import load_tokenizer, train_tokenizer
from tests.tokenizers.morph_words import BYTE_IDS, TEXTS, TOKENS
from tests.tokenizers.test_spm import PARTS, SPECIAL, random_text

SEGMENTS = (
    "installation\tinstall ation\ninstallieren\tinstall ieren\npakete\tpaket e\npaketen\tpaket en\nsysteme\tsystem e\n"
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("table") / "segments.tsv"
    path.write_text(SEGMENTS)
    return str(path)


def config(table: str | None, **values) -> TokenizerConfig:
    values = {"type": "morph_bpe", "vocab_size": 900, "bias": 0.9, "special": [SPECIAL], **values}
    return TokenizerConfig(segmentation=table if values["bias"] else None, **values)


@pytest.fixture(scope="module", params=[0.0, 0.9, 1.0])
def tokenizer(request: pytest.FixtureRequest, table: str) -> MorphBPETokenizer:
    found = train_tokenizer(config(table, bias=request.param), TEXTS)
    assert isinstance(found, MorphBPETokenizer)
    return found


def test_every_character_comes_back(tokenizer: MorphBPETokenizer) -> None:
    characters = [*map(chr, range(0xD800)), *map(chr, range(0xE000, 0x110000))]
    manifest = tokenizer._manifest
    assert manifest is not None
    assert manifest.config is not None
    if manifest.config.bias != 0.9:  # all 1.1 million once: they take seconds
        characters = characters[::29]
    for text in ("".join(characters), " ".join(characters[:5000]), ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_texts_come_back_and_give_no_control_tokens(tokenizer: MorphBPETokenizer) -> None:
    import random

    generator = random.Random(1)
    for text in [*PARTS, *(random_text(generator) for _ in range(500))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2, 3} & set(ids)


def test_any_bytes_come_back(tokenizer: MorphBPETokenizer) -> None:
    generator = np.random.default_rng(2)
    broken = [b"", b"\xff", b"a\xc3", b"\xe2\x82 b", "é".encode()[1:] + b" x", bytes(range(256))]
    for data in [*broken, *(generator.bytes(int(n)) for n in generator.integers(1, 60, 300))]:
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    assert tokenizer.encode_bytes("Läufer".encode()) == tokenizer.encode("Läufer")
    assert tokenizer.decode(tokenizer.encode_bytes(b"a\xff")) == "a�"


def test_special_text_is_one_token(tokenizer: MorphBPETokenizer) -> None:
    token = tokenizer.id_of(SPECIAL)
    assert token == 4
    assert tokenizer.encode(f"a{SPECIAL}b").count(token) == 1
    assert tokenizer.decode([*tokenizer.encode(f"ä{SPECIAL}"), tokenizer.eos_id]) == f"ä{SPECIAL}"


def test_other_libraries_load_it_and_encode_the_same(tokenizer: MorphBPETokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    automatic = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in (*TEXTS[:50], f"é🎉 {SPECIAL}\n\n  x"):
        ids = tokenizer.encode(text)
        assert loaded.encode(text).ids == ids
        assert loaded.decode(ids, skip_special_tokens=False) == text
        assert automatic.encode(text, add_special_tokens=False) == ids
    assert (automatic.eos_token_id, automatic.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)


def test_saved_tokenizer_loads_the_same(tokenizer: MorphBPETokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, MorphBPETokenizer)
    assert (loaded.type, loaded.hash, loaded.vocab_size, loaded.eos_id, loaded.bos_id) == (
        "morph_bpe", tokenizer.hash, 900, 2, 1,
    )  # fmt: skip
    documents = loaded.encode_documents(TEXTS[:20])
    assert [d.tolist() for d in documents] == [[*tokenizer.encode(t), 2] for t in TEXTS[:20]]
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (tmp_path / "manifest.json").read_bytes()


def test_changed_model_is_refused(tokenizer: MorphBPETokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    model = tmp_path / "tokenizer.json"
    model.write_bytes(model.read_bytes() + b"\n")
    with pytest.raises(DataError, match="not the model its manifest describes"):
        load_tokenizer(tmp_path)
    model.unlink()
    with pytest.raises(DataError, match=r"no readable tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_strict_bias_ends_a_token_at_every_morpheme(table: str) -> None:
    strict = config(table, bias=1.0)
    words = prepare_words(strict, TEXTS)
    marked = [word for word, inside in zip(words.words, words.borders) if inside]
    assert {b" Installation", b" installieren", b" Pakete", b" Paketen"} <= set(marked)  # in any case
    tokens = first_tokens(strict)
    learned = learn_merges(
        *words, tokens=tokens, byte_ids=[n + 1 for n in BYTE_IDS], vocab_size=900, bias=1.0
    )  # one more special token than TOKENS has
    ends = np.cumsum([0, *map(len, words.words)])
    wanted = [end + at for end, inside in zip(ends, words.borders) for at in inside]
    assert learned.starts[wanted].all()
    # A token of its own is longer than one where nothing was said: the boundary, not chance, ends it.
    assert not learned.starts[ends[:-1] + 1].all()


def test_bias_moves_the_cut_to_the_border(table: str) -> None:
    def cut(bias: float) -> list[str]:
        found = train_tokenizer(config(table, bias=bias, vocab_size=4000), TEXTS)
        return [found.piece(token) for token in found.encode(" Paketen")]

    assert cut(0.0) == ["ĠPaketen"]
    assert cut(1.0) == ["ĠPaket", "en"]


def test_training_is_the_same_in_every_process(table: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS[:400]))
    hashes = []
    for seed in ("1", "2"):
        command = (
            "from steerscale.cli import main; "
            f"main(['tokenizer','train',{str(text)!r},'-o',{str(tmp_path / seed)!r},'--type','morph_bpe','--bias','0.7',"
            f"'--segmentation',{table!r},'--vocab-size','700'])"
        )
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
        )
        assert "morph_bpe tokenizer, 700 tokens" in done.stdout
        hashes.append((tmp_path / seed / "tokenizer.json").read_bytes())
    assert hashes[0] == hashes[1]


def test_sampled_lines_depend_on_the_seed(table: str) -> None:
    few = {"vocab_size": 500, "input_sentence_size": 200}
    hashes = [train_tokenizer(config(table, seed=seed, **few), TEXTS).hash for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_datasets_are_prepared_with_it(table: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS[:200]))
    train_tokenizer(config(table), TEXTS).save((tmp_path / "tok").mkdir() or tmp_path / "tok")
    prepare_dataset([str(text)], tokenizer=tmp_path / "tok", output=tmp_path / "data", config=PrepareConfig())
    assert inspect_dataset(tmp_path / "data").tokenizer.type == "morph_bpe"
    assert load_tokenizer(tmp_path / "data" / "tokenizer").vocab_size == 900


def test_words_are_those_of_the_pre_tokenizer() -> None:
    odd = [
        "a  b\t c\n\nd",
        "x\x1cy \x1f z",
        "don't we'll 12ab3",
        "e\u0301te\u0301 \u00a0\u2003q",
        " \n ",
        "日本語 テスト",
    ]
    counted: dict[bytes, int] = {}
    for text in [*odd, *TEXTS[:100]]:
        for piece, _ in pre_tokenizer().pre_tokenize_str(text):
            word = bytes(BYTE_CHARACTERS.index(character) for character in piece)
            counted[word] = counted.get(word, 0) + 1
    assert count_words([*odd, *TEXTS[:100]]) == dict(sorted(counted.items()))
    assert "".join(BYTE_CHARACTERS) == spell(bytes(range(256)))


def test_byte_ids_and_first_tokens() -> None:
    assert TOKENS[:4] == [b"<unk>", b"<s>", b"</s>", b"<pad>"]
    assert sorted(BYTE_IDS) == list(range(4, 260))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bias": 1.5}, "must be between 0"),
        ({"bias": -0.1}, "must be between 0"),
        ({"bias": 0.0, "segmentation": "morfessor"}, "no effect at tokenizer.bias=0"),
        ({"type": "unigram", "bias": 0.5}, "is for type morph_bpe, not for unigram"),
        ({"type": "bpe", "segmentation": "morfessor"}, "is for type morph_bpe, not for bpe"),
        ({"character_coverage": 0.99}, "no meaning for morph_bpe"),
        ({"special": ["é!"]}, "all ASCII"),
        ({"special": ["x"]}, "at least two characters"),
    ],
)
def test_config_refuses(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig(**{"type": "morph_bpe", **values})


def test_bad_corpora_and_sizes(table: str) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=50000 is too large for this corpus: it yields at most \d+"):
        train_tokenizer(config(table, vocab_size=50000), TEXTS[:100])
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer(config(table), ["", " \n\t"])


def test_settings_are_kept(tokenizer: MorphBPETokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["config"]["type"] == "morph_bpe"
    assert manifest["config"]["bias"] in (0.0, 0.9, 1.0)
