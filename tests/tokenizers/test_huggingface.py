import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from steerscale.errors import DataError
from steerscale.tokenizers.registry import load_tokenizer

EOS = "<|endoftext|>"


@pytest.fixture
def directory(tmp_path):
    """A byte-level BPE as GPT-2's, with the files of a Hugging Face model."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["der Hund und der Baum"] * 20, trainer)
    backend.enable_truncation(4)  # as some published tokenizers have it; must not cut documents
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": EOS}, "bos_token": None}))
    return tmp_path


def test_same_interface(directory):
    tokenizer = load_tokenizer(directory)
    text = "der Hund,\n  und der Báum 🎉"
    assert tokenizer.type == "huggingface"
    assert len(tokenizer.encode(text)) > 4
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_id]) == text
    assert (tokenizer.eos_id, tokenizer.bos_id) == (tokenizer.id_of(EOS), None)
    assert tokenizer.vocab_size == 1 + max(tokenizer._backend.get_vocab().values())
    assert tokenizer.piece(tokenizer.vocab_size + 5) == f"<unused {tokenizer.vocab_size + 5}>"
    documents = tokenizer.encode_documents([text, "der"])
    assert [document.tolist() for document in documents] == [
        [*tokenizer.encode(text), tokenizer.eos_id],
        [*tokenizer.encode("der"), tokenizer.eos_id],
    ]


def test_saved_copy_loads_the_same(directory, tmp_path):
    tokenizer = load_tokenizer(directory)
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    assert load_tokenizer(copy).hash == tokenizer.hash
    assert load_tokenizer(copy).eos_id == tokenizer.eos_id


def test_missing_end_token_is_an_error(directory):
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="has no end-of-text token"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (b"{", "tokenizer_config.json or chat_template.jinja cannot be read"),
        (b"\xff\xfe", "tokenizer_config.json or chat_template.jinja cannot be read"),
        (b"[1]", "tokenizer_config.json holds no JSON object"),
        (b'{"eos_token": [1]}', "has no end-of-text token"),
    ],
)
def test_damaged_settings_are_an_error(directory, settings, message):
    (directory / "tokenizer_config.json").write_bytes(settings)
    with pytest.raises(DataError, match=message):
        load_tokenizer(directory)


def test_empty_vocabulary_is_an_error(directory):
    tokenizers.Tokenizer(models.BPE()).save(str(directory / "tokenizer.json"))
    with pytest.raises(DataError, match="has no end-of-text token"):
        load_tokenizer(directory)


def test_damaged_file_is_an_error(directory):
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json cannot be read"):
        load_tokenizer(directory)
