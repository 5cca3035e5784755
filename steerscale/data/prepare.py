"""Text -> a dataset directory that training reads."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import steerscale
from steerscale.config import require
from steerscale.data.blocks import Reading, read_blocks
from steerscale.data.encoding import EncodedBlock, Encoding, encode_blocks
from steerscale.data.indexed import IndexedWriter, token_dtype
from steerscale.data.manifest import SPLITS, TOKENIZER, DatasetManifest, SplitInfo, TokenizerInfo
from steerscale.data.sources import Source, describe_sources, find_sources
from steerscale.errors import DataError
from steerscale.tokenizers.base import Tokenizer
from steerscale.tokenizers.directory import new_directory
from steerscale.tokenizers.registry import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How text becomes a dataset. Together with the sources and the tokenizer it determines every byte."""

    format: Literal["auto", "txt", "jsonl", "parquet", "hf"] = "auto"
    """Of the inputs; auto goes by their names."""
    documents: Literal["line", "blank-line"] = "line"
    """What ends a document in a text file."""
    text_key: str = "text"
    """Field or column of the text in the other formats."""
    split: list[float] = field(default_factory=lambda: [0.98, 0.01, 0.01])
    """Shares of the documents for train, valid and test; a split with share 0 is not written."""
    seed: int = 0
    """With a document's place in its source, decides its split."""

    def __post_init__(self) -> None:
        require(
            len(self.split) == len(SPLITS) and min(self.split) >= 0 and abs(sum(self.split) - 1) < 1e-6,
            f"split must be {len(SPLITS)} shares ({', '.join(SPLITS)}) that sum to 1, got {self.split}",
        )

    @property
    def fractions(self) -> dict[str, float]:
        """Split name -> share, without shares of 0."""
        return {name: share for name, share in zip(SPLITS, self.split) if share > 0}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a preparation is."""

    documents: int
    """Written so far."""
    tokens: int
    """Written so far, eos included."""
    text_bytes: int
    """UTF-8 bytes of the documents so far."""
    seconds: float
    """Since the start."""
    fraction: float | None
    """Of the stored input; None where its size is unknown."""

    @property
    def seconds_left(self) -> float | None:
        """At the average speed so far; None where it cannot be told."""
        return self.seconds * (1 / self.fraction - 1) if self.fraction else None


def prepare_dataset(
    inputs: Sequence[str],
    *,
    tokenizer: Path,
    output: Path,
    config: PrepareConfig,
    workers: int = 1,
    force: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> DatasetManifest:
    """Tokenize `inputs` into the new directory `output`: all of it or, after an error or Ctrl-C, nothing.

    Args:
        inputs: paths, or `sample:NAME`.
        tokenizer: tokenizer directory; a copy goes into the dataset.
        workers: processes that tokenize; the output does not depend on it.
        force: replace an existing dataset.
        report: called after every block.

    Raises DataError for missing or unreadable inputs, an empty corpus or split, or if `output` is in the way.
    """
    require(workers >= 1, f"workers must be at least 1, got {workers}")
    loaded = load_tokenizer(tokenizer)
    sources = find_sources(inputs, format=config.format)
    reading = Reading(documents=config.documents, text_key=config.text_key)
    with new_directory(output, force=force) as directory, ThreadPoolExecutor(1) as hashing:
        hashes = hashing.submit(describe_sources, sources)
        (directory / TOKENIZER).mkdir()
        loaded.save(directory / TOKENIZER)
        encoding = Encoding(directory / TOKENIZER, reading, config.fractions, config.seed)
        with contextlib.closing(encode_blocks(read_blocks(sources, reading), encoding, workers=workers)) as blocks:
            splits = _write(_reported(blocks, sources, report), directory, loaded, config)
        _check_splits(splits)
        manifest = DatasetManifest(
            tokenizer=TokenizerInfo(
                type=loaded.type, hash=loaded.hash, vocab_size=loaded.vocab_size, eos_id=loaded.eos_id
            ),
            dtype=token_dtype(loaded.vocab_size),
            splits=splits,
            fractions=config.fractions,
            seed=config.seed,
            documents=config.documents,
            text_key=config.text_key,
            sources=hashes.result(),
            steerscale_version=steerscale.__version__,
        )
        manifest.write(directory)
    return manifest


def _write(
    blocks: Iterable[EncodedBlock], directory: Path, tokenizer: Tokenizer, config: PrepareConfig
) -> dict[str, SplitInfo]:
    text_bytes = dict.fromkeys(config.fractions, 0)
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(directory / name, dtype=token_dtype(tokenizer.vocab_size)))
            for name in config.fractions
        }
        for block in blocks:
            for name, split in block.splits.items():
                writers[name].add(split.tokens, split.lengths)
                text_bytes[name] += split.text_bytes
    return {
        name: SplitInfo(documents=writer.documents, tokens=writer.tokens, bytes=text_bytes[name])
        for name, writer in writers.items()
    }


def _reported(
    blocks: Iterable[EncodedBlock], sources: Sequence[Source], report: Callable[[Progress], None] | None
) -> Iterator[EncodedBlock]:
    start = time.perf_counter()
    documents = tokens = text_bytes = 0
    before = [sum(source.stored_bytes for source in sources[:number]) for number in range(len(sources) + 1)]
    for block in blocks:
        yield block
        documents += sum(len(split.lengths) for split in block.splits.values())
        tokens += sum(int(split.lengths.sum()) for split in block.splits.values())
        text_bytes += sum(split.text_bytes for split in block.splits.values())
        if report is not None:
            done = before[block.source] + block.stored_bytes
            report(
                Progress(
                    documents=documents,
                    tokens=tokens,
                    text_bytes=text_bytes,
                    seconds=time.perf_counter() - start,
                    fraction=done / before[-1] if before[-1] else None,
                )
            )


def _check_splits(splits: dict[str, SplitInfo]) -> None:
    total = sum(info.documents for info in splits.values())
    if total == 0:
        raise DataError("the inputs hold no documents: nothing but white space was found")
    for name, info in splits.items():
        if info.documents == 0:
            raise DataError(
                f"split {name!r} got none of the {total} documents: raise its share in --split, set it to 0 to do without "
                "this split, or give more text"
            )
