"""Text to look at latents with and to measure the cost of steering on: a dataset's held-out split, or any text file.

Shapes: B sequences, T tokens of each, one more than inputs.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from steerscale.data.config import DataConfig
from steerscale.data.dataset import SampleStream
from steerscale.errors import ConfigError, DataError
from steerscale.language_model import LanguageModel

BATCH = 8
"""Sequences in one forward pass."""


def sequences_of(lm: LanguageModel, path: Path, *, samples: int, seq_len: int | None = None) -> Iterator[torch.Tensor]:
    """Batches int64 [B, T] on the model's device: at most `samples` sequences of a prepared dataset or a UTF-8 text file.

    Args:
        path: a dataset directory (its split "valid", else "train", in order), or a text file.
        seq_len: inputs of a sequence; None: as many as the model was made for, at most 256.
    Raises:
        ConfigError: `samples` is not positive.
        DataError: the file cannot be read or is too short; the dataset's tokenizer is not the model's.
    """
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}")
    length = (seq_len or min(lm.seq_len, 256)) + 1
    rows = _of_dataset(lm, path, length, samples) if path.is_dir() else _of_file(lm, path, length, samples)
    for begin in range(0, len(rows), BATCH):
        yield torch.from_numpy(rows[begin : begin + BATCH]).to(lm.context.device)


def _of_dataset(lm: LanguageModel, path: Path, length: int, samples: int) -> np.ndarray:
    data = DataConfig(path=str(path))
    try:
        stream = SampleStream(data, seq_len=length - 1, split="valid", shuffle=False)
    except DataError:
        stream = SampleStream(data, seq_len=length - 1, split="train", shuffle=False)
    if stream.tokenizer_hash != lm.tokenizer.hash:
        raise DataError(f"{path} was made with another tokenizer than the language model's: name another dataset")
    count = min(samples, stream.num_samples or 0)
    return np.stack([stream.tokens(position) for position in range(count)]).astype(np.int64)


def _of_file(lm: LanguageModel, path: Path, length: int, samples: int) -> np.ndarray:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    # A few bytes a token: no more of a large file is tokenized than may be needed.
    tokens = np.array(lm.encode(text[: samples * length * 16]), dtype=np.int64)
    if len(tokens) < 2:
        raise DataError(f"{path} is too short: it has {len(tokens)} tokens")
    length = min(length, len(tokens))
    count = min(len(tokens) // length, samples)
    return tokens[: count * length].reshape(count, length)
