import json

import pytest

from steerscale.errors import ConfigError, DataError
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.registry import load_tokenizer, train_tokenizer


def test_unknown_type_lists_those_that_can_be_trained():
    with pytest.raises(ConfigError, match=r"must be one of unigram \| bpe \| morph_bpe, got 'wordpiece'"):
        train_tokenizer(TokenizerConfig(type="wordpiece"), ["text"])


def test_missing_directory_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="make one with `steerscale tokenizer train`"):
        load_tokenizer(tmp_path / "nowhere")


def test_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"holds neither manifest.json nor tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as the manifest"),
        ("[]", "format_version None"),
        (json.dumps({"format_version": 9}), "format_version 9, this version of steerscale reads 1"),
        (json.dumps({"format_version": 1, "type": "bpe"}), "vocab_size is missing"),
        (
            json.dumps({"format_version": 1, "type": "new", "vocab_size": 1, "eos_id": 0, "hash": ""}),
            "unknown tokenizer type 'new'",
        ),
    ],
)
def test_bad_manifest(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)
