"""A sample for every global position.

Which tokens stand at position p depends on the datasets, the seed and p; not on the layout, the micro-batch size or the
length of training. So a resumed run, and a run on another layout, goes on with exactly the samples that were next.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from steerscale.data.blend import Blend, Concatenation
from steerscale.data.config import DataConfig
from steerscale.data.indexed import map_tokens
from steerscale.data.manifest import DatasetManifest, inspect_dataset
from steerscale.data.order import OrderedWindows, ShuffledWindows, Skip
from steerscale.errors import DataError


class SampleId(NamedTuple):
    """Where a sample comes from."""

    position: int
    """Global position in training (or validation) order."""
    corpus: int
    """Number of the dataset in data.blend."""
    start: int
    """First token in that dataset's split."""


def inspect_data(config: DataConfig, *, seq_len: int, split: str = "train") -> dict[str, DatasetManifest]:
    """Check all datasets of `config` before any rank starts; their manifests by path.

    Raises DataError if one is missing or damaged, lacks the split, is shorter than a sequence, or if two of them were
    made with different tokenizers.
    """
    manifests = {path: inspect_dataset(path) for path in config.weights}
    (first, reference), *_ = manifests.items()
    for path, manifest in manifests.items():
        manifest.require_split(split, seq_len=seq_len, path=path)
        if manifest.tokenizer != reference.tokenizer:
            raise DataError(
                f"data.blend mixes tokenizers: {first} was made with {_describe(reference)}, {path} with "
                f"{_describe(manifest)}; prepare both with the same tokenizer directory"
            )
    return manifests


def _describe(manifest: DatasetManifest) -> str:
    tokenizer = manifest.tokenizer
    return f"{tokenizer.type}, {tokenizer.vocab_size} tokens, hash {tokenizer.hash[:12]}"


class SampleStream:
    """The samples of one split in their order. Torch-free; holds nothing but memory maps."""

    def __init__(
        self, config: DataConfig, *, seq_len: int, seed: int = 0, split: str = "train", shuffle: bool = True
    ) -> None:
        """Open the datasets of `config`.

        Args:
            seq_len: inputs of a sample; it has one more token, the last label.
            seed: determines the order, with the position; unused without `shuffle`.
            shuffle: True: for training, endless, blended by weight, without `config.skip`. False: for validation, every
                window once, dataset after dataset.

        Raises DataError as `inspect_data` does.
        """
        manifests = inspect_data(config, seq_len=seq_len, split=split)
        self.manifests = list(manifests.values())
        self.seq_len = seq_len
        self.split = split
        self._tokens = [map_tokens(Path(path) / split, dtype=m.dtype) for path, m in manifests.items()]
        self._skip = Skip(config.skip if shuffle else [])
        infos = [manifest.splits[split] for manifest in self.manifests]
        if shuffle:
            shares = np.array(list(config.weights.values()))
            self._windows = [
                ShuffledWindows(
                    num_tokens=info.tokens,
                    seq_len=seq_len,
                    key=f"{seed}/{corpus}",
                    random_offset=config.random_offset,
                )
                for corpus, info in enumerate(infos)
            ]
            self._corpora = Blend(shares.tolist())
            self.num_samples = None
        else:
            shares = np.array([info.tokens for info in infos]) / sum(info.tokens for info in infos)
            self._windows = [OrderedWindows(num_tokens=info.tokens, seq_len=seq_len) for info in infos]
            sizes = [windows.per_epoch for windows in self._windows]
            self._corpora = Concatenation(sizes)
            self.num_samples = sum(sizes)
        self.bytes_per_token = float(shares @ [info.bytes_per_token for info in infos])

    num_samples: int | None
    """Samples in all; None: endless."""
    bytes_per_token: float
    """UTF-8 bytes of text a token stands for on average: bits per byte = nats per token / ln 2 / bytes_per_token."""

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer's model, hex."""
        return self.manifests[0].tokenizer.hash

    @property
    def vocab_size(self) -> int:
        """Tokens the tokenizer knows."""
        return self.manifests[0].tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        return self.manifests[0].tokenizer.eos_id

    @property
    def samples_per_epoch(self) -> list[int]:
        """Samples in one pass over each dataset, in the order of data.blend."""
        return [windows.per_epoch for windows in self._windows]

    def limit(self, num_samples: int | None) -> None:
        """End a finite stream after `num_samples`, if it has more; None leaves it as it is."""
        if num_samples is not None and self.num_samples is not None:
            self.num_samples = min(self.num_samples, num_samples)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset number and first token of the samples at these positions: int64 [N] -> (int64 [N], int64 [N])."""
        if len(positions) and self.num_samples is not None and positions.max() >= self.num_samples:
            raise DataError(
                f"split {self.split!r} ends at position {self.num_samples - 1}, {positions.max()} was asked for"
            )
        corpora, places = self._corpora.locate(self._skip(positions))
        starts = np.empty_like(places)
        for corpus in np.unique(corpora):
            chosen = corpora == corpus
            starts[chosen] = self._windows[corpus].starts(places[chosen])
        return corpora, starts

    def read(self, corpora: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The samples that `locate` found: int64 [N, seq_len + 1]."""
        samples = np.empty((len(starts), self.seq_len + 1), dtype=np.int64)
        for row, corpus, start in zip(samples, corpora, starts):
            row[:] = self._tokens[corpus][start : start + self.seq_len + 1]
        return samples

    def tokens(self, position: int) -> np.ndarray:
        """The sample at a global position: int64 [seq_len + 1]."""
        return self.read(*self.locate(np.array([position], dtype=np.int64)))[0]

    def sample_id(self, position: int) -> SampleId:
        """Where the sample at a global position comes from."""
        (corpus,), (start,) = self.locate(np.array([position], dtype=np.int64))
        return SampleId(position, int(corpus), int(start))
