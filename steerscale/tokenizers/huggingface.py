"""A tokenizer directory of a Hugging Face model, behind the same interface."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from steerscale.errors import DataError
from steerscale.tokenizers.base import Tokenizer, TokenizerManifest

MODEL = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
"""Newer models have the template in a file of its own; when saved here it is among the settings, which both can read."""


class HuggingFaceTokenizer(Tokenizer):
    """A fast tokenizer (`tokenizer.json`). Special tokens are recognised in text, as they are wherever such models run.

    Whether decode(encode(text)) == text is up to the tokenizer; byte-level BPE (GPT-2, Llama 3, SmolLM) is lossless.
    """

    type = "huggingface"

    def __init__(self, model: bytes, settings: dict[str, Any], *, origin: str) -> None:
        """Build from the contents of `tokenizer.json` and `tokenizer_config.json`; `origin` is for error texts."""
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # the Rust library raises bare Exception
            raise DataError(f"{origin}: {MODEL} cannot be read: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._model, self._settings = model, settings
        self.hash = hashlib.sha256(model).hexdigest()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id, self.pad_id = self._named("bos_token"), self._named("pad_token")
        eos_id = self._named("eos_token")
        if eos_id is None:
            raise DataError(
                f"{origin} has no end-of-text token: set eos_token in {SETTINGS} to an entry of its vocabulary"
            )
        self.eos_id = eos_id
        added = tuple(self._backend.encode("", add_special_tokens=True).ids)
        self.prefix = added if added == (self.bos_id,) else ()
        self.chat_template = _chat_template(settings)

    @classmethod
    def load(cls, directory: Path) -> "HuggingFaceTokenizer":
        """Load `tokenizer.json`, or what `transformers` converts to one. Raises DataError if there is neither."""
        if (directory / MODEL).is_file():
            return cls((directory / MODEL).read_bytes(), _settings(directory), origin=str(directory))
        return cls(*_converted(directory), origin=str(directory))

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(map(int, ids)), skip_special_tokens=True)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        return [
            np.array([*encoding.ids, self.eos_id], dtype=np.int32)
            for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def piece(self, token: int) -> str:
        piece = self._backend.id_to_token(token)
        return f"<unused {token}>" if piece is None else piece

    def id_of(self, piece: str) -> int | None:
        return self._backend.token_to_id(piece)

    def save(self, directory: Path) -> None:
        (directory / MODEL).write_bytes(self._model)
        (directory / SETTINGS).write_text(json.dumps(self._settings, indent=2, ensure_ascii=False), encoding="utf-8")
        TokenizerManifest(type=self.type, vocab_size=self.vocab_size, eos_id=self.eos_id, hash=self.hash).write(
            directory
        )

    def _named(self, role: str) -> int | None:
        # Written as "</s>" or as {"content": "</s>", ...}.
        token = self._settings.get(role)
        text = token.get("content") if isinstance(token, dict) else token
        return self._backend.token_to_id(text) if isinstance(text, str) else None


def _settings(directory: Path) -> dict[str, Any]:
    settings, template = directory / SETTINGS, directory / CHAT_TEMPLATE
    try:
        values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        if not isinstance(values, dict):
            raise DataError(f"{settings} holds no JSON object: copy the tokenizer again")
        if template.is_file():
            values["chat_template"] = template.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{directory}: {SETTINGS} or {CHAT_TEMPLATE} cannot be read: {error}") from error
    return values


def _chat_template(settings: dict[str, Any]) -> str | None:
    # One template, or several with names.
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _converted(directory: Path) -> tuple[bytes, dict[str, Any]]:
    # Slow to import, and needed only for models published without a tokenizer.json.
    from transformers import AutoTokenizer

    try:
        slow: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = slow.backend_tokenizer.to_str().encode()
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise DataError(
            f"{directory} is not a tokenizer: no {MODEL}, and transformers cannot make one: {error}"
        ) from error
    return model, {role: getattr(slow, role) for role in ("bos_token", "eos_token", "pad_token", "chat_template")}
