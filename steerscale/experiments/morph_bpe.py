"""Plain BPE, unigram and morphological BPE under the same language model: bits per byte at equal bytes seen."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from steerscale.data.config import DataConfig
from steerscale.data.dataset import SampleStream
from steerscale.data.manifest import inspect_dataset
from steerscale.experiments.morph_bpe_config import MorphBPEConfig
from steerscale.experiments.morph_bpe_report import report
from steerscale.experiments.morph_bpe_text import (
    IN_DOMAIN,
    OUT_OF_DOMAIN,
    TRAIN,
    choose_texts,
    dataset,
    prepare_datasets,
    train_tokenizers,
)
from steerscale.experiments.stages import Bench, Experiment, Results, Stage
from steerscale.language_model import LanguageModel, load_language_model
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.train.config import RunConfig

BATCH = 16
"""Windows evaluated at once."""


def train_gpts(config: MorphBPEConfig, bench: Bench) -> Results:
    """A GPT for every language, tokenizer and seed, by the loop of every training run."""
    found: Results = {}
    for seed in range(config.seeds):  # seed by seed: what an unfinished start leaves is comparable
        for language in config.languages:
            for kind in config.tokenizers:
                run = gpt_config(config, bench.root, language, kind, seed)
                bench.train(run)
                tokens = run.train.steps * run.layout().global_batch_size * run.model.seq_len
                found.setdefault(language, {})[kind] = {"steps": run.train.steps, "tokens": tokens}
                bench.progress(
                    seed * _pairs(config) + _place(config, language, kind) + 1, config.seeds * _pairs(config)
                )
    return found


def evaluate_gpts(config: MorphBPEConfig, bench: Bench) -> Results:
    """Bits per byte of each on both held-out texts."""
    found: Results = {}
    jobs = [(language, kind) for language in config.languages for kind in config.tokenizers]
    with initialize(ParallelLayout()) as context:
        for language, kind in bench.track(jobs):
            values: dict[str, list[float]] = {IN_DOMAIN: [], OUT_OF_DOMAIN: []}
            for seed in range(config.seeds):
                run = gpt_config(config, bench.root, language, kind, seed)
                lm = load_language_model(Path(run.run_dir), context)
                for domain, scores in values.items():
                    scores.append(bits_per_byte(lm, dataset(bench.root, language, kind, domain)))
                lm.close()
            found.setdefault(language, {})[kind] = values
    return found


def gpt_config(config: MorphBPEConfig, root: Path, language: str, kind: str, seed: int) -> RunConfig:
    """The training run of one GPT; steps and bytes a step are the same for all tokenizers, to half a token a sequence."""
    path = dataset(root, language, kind, TRAIN)
    gpt, name = config.gpt, f"{language}_{kind}_{seed}"
    seq_len = max(round(config.sequence_bytes / inspect_dataset(path).splits["train"].bytes_per_token), 1)
    steps = max(round(config.seen_bytes / config.sequence_bytes / gpt.layout().global_batch_size), 1)
    return replace(
        gpt,
        name=name,
        run_dir=str(root / "train" / name),
        seed=config.seed + seed,
        model=replace(gpt.model, seq_len=seq_len),
        data=DataConfig(path=str(path)),
        train=replace(gpt.train, steps=steps),
    )


def bits_per_byte(lm: LanguageModel, path: Path) -> float:
    """The loss on a dataset's `valid` in windows of the model's length, in bits a byte of its text; as the loop reports it."""
    stream = SampleStream(DataConfig(path=str(path)), seq_len=lm.seq_len, split="valid", shuffle=False)
    assert stream.num_samples is not None
    total, tokens = 0.0, 0
    for begin in range(0, stream.num_samples, BATCH):
        positions = np.arange(begin, min(begin + BATCH, stream.num_samples))
        window = torch.from_numpy(stream.read(*stream.locate(positions)))
        losses = lm.losses(window[:, :-1], window[:, 1:])
        assert losses is not None
        total, tokens = total + losses.double().sum().item(), tokens + losses.numel()
    return total / tokens / math.log(2) / stream.bytes_per_token


def _pairs(config: MorphBPEConfig) -> int:
    return len(config.languages) * len(config.tokenizers)


def _place(config: MorphBPEConfig, language: str, kind: str) -> int:
    return list(config.languages).index(language) * len(config.tokenizers) + list(config.tokenizers).index(kind)


EXPERIMENT = Experiment(
    config=MorphBPEConfig,
    stages=[
        Stage(name="texts", run=choose_texts, settings=("languages", "text_bytes", "held_out_bytes")),
        Stage(name="tokenizers", run=train_tokenizers, settings=("tokenizers",)),
        Stage(name="datasets", run=prepare_datasets, settings=()),
        Stage(
            name="train",
            run=train_gpts,
            settings=(
                "seen_bytes",
                "sequence_bytes",
                "seeds",
                "gpt.model",
                "gpt.optim",
                "gpt.parallel",
                "gpt.engine.precision",
            ),
        ),
        Stage(name="evaluate", run=evaluate_gpts, settings=()),
    ],
    report=report,
)
