"""Streaming and training against their parts: a language model read for activations while an SAE trains on them.

    python benchmarks/stream.py [--rounds 8] [--threads 2] [--quick]

- lm: forward passes to the last hooked layer alone, on the stream's own token batches
- sae: training steps of the SAE alone, on vectors that are there already, all per-step duties included
- both: what a run does: `SAETask.micro_batches` on the stream, then `SAETask.train_step`

In one process on one rank: an LM of SmolLM2-135M's shape with random weights, read at blocks.15.hook_resid_post, and a TopK
SAE of 16 times its width. Rounds of the three alternate after the buffer's first fill; figures are sums over all rounds. With
the LM alone making a vectors a second and the SAE alone taking b, nothing that does both one after the other on the same
devices is faster than 1 / (1/a + 1/b). That bound is taken for the passes and steps that `both` really ran in the rounds:
a step runs none or several. A vector is a kept token; passes also read what is left out, in `lm` as in `both`.
The last line is one JSON object: `ratio` is both / bound in wall-clock time, `cpu_ratio` the same in CPU time, which a busy
machine disturbs less; `shuffle_share` is the share of `both`'s time spent on writing, mixing and gathering vectors, and
`data_share` that on reading and ordering tokens.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import lzma
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from benchmarks._common import against, print_environment
from steerscale.activations.config import StreamConfig
from steerscale.activations.order import GIB, HALVES
from steerscale.activations.source import GPTSource
from steerscale.activations.stream import ActivationStream
from steerscale.data.config import DataConfig
from steerscale.data.dataset import SampleStream
from steerscale.data.prepare import PrepareConfig, prepare_dataset
from steerscale.data.sample import sample_corpus
from steerscale.models.config import ModelConfig
from steerscale.models.gpt import build_chunks, transformer_config
from steerscale.models.sharding import initialize_parameters
from steerscale.parallel.context import ParallelContext, initialize
from steerscale.parallel.layout import ParallelConfig
from steerscale.sae.config import SAEConfig
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.registry import train_tokenizer
from steerscale.train.config import RunConfig, TrainConfig
from steerscale.train.sae import SAETask

SMOLLM2 = ModelConfig(
    num_layers=30,
    d_model=576,
    num_heads=9,
    num_kv_groups=3,
    d_ff=1536,
    seq_len=128,
    vocab_size=4096,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
)
HOOK = "blocks.15.hook_resid_post"
BATCH = 1024
LANES, PASS_SEQUENCES, BLOCK_SEQUENCES = 16, 8, 16  # every pass is a whole one
TINY = {"num_layers": 2, "d_model": 48, "num_heads": 3, "d_ff": 96}
STEPS_PER_ROUND = 3
GOAL, SHUFFLE_GOAL = 0.9, 0.03


class CountedSource:
    """Counts the forward passes of a source and remembers the last tokens."""

    def __init__(self, source: GPTSource) -> None:
        self._source, self.passes, self.tokens = source, 0, torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def run(self, batches: Iterable[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """The source's own, counted."""
        for self.tokens in batches:
            yield from self._source.run([self.tokens])
            self.passes += 1


class Clock:
    """Wall-clock and CPU seconds by name."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def __call__(self, name: str, action: Callable[[], object]) -> None:
        """Time one call."""
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        self.wall[name] += time.perf_counter() - wall
        self.cpu[name] += time.process_time() - cpu
        self.calls[name] += 1


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: does it run?")
    args = parser.parse_args()
    environment = print_environment("megatron-core")
    torch.set_num_threads(args.threads)
    model, hook, rounds = SMOLLM2, HOOK, args.rounds
    if args.quick:
        model, hook, rounds = replace(SMOLLM2, **TINY), "blocks.1.hook_resid_post", 2
    with tempfile.TemporaryDirectory() as directory:
        config = run_config(Path(directory), model, hook)
        with initialize(config.layout()) as context, closing(build_task(config, context)) as task:
            result = measure(task, rounds)
    print(json.dumps({**result, "rounds": rounds, "threads": args.threads, "environment": environment}))


def run_config(directory: Path, model: ModelConfig, hook: str) -> RunConfig:
    """A run on the German sample, prepared in `directory`."""
    with lzma.open(sample_corpus("german")[0], "rt", encoding="utf-8") as file:
        lines = list(islice(file, 5000))
    text, tokenizer = directory / "text.txt", directory / "tokenizer"
    text.write_text("".join(lines), encoding="utf-8")
    tokenizer.mkdir()
    train_tokenizer(TokenizerConfig(type="bpe", vocab_size=model.tokens), lines).save(tokenizer)
    prepare_dataset(
        [str(text)], tokenizer=tokenizer, output=directory / "data", config=PrepareConfig(split=[1.0, 0.0, 0.0])
    )
    buffer_gib = HALVES * LANES * BLOCK_SEQUENCES * model.seq_len * model.d_model * 4 / GIB * 1.001
    return RunConfig(
        name="stream",
        run_dir=str(directory / "run"),
        model=model,
        train=TrainConfig(steps=10**6),
        data=DataConfig(path=str(directory / "data")),
        parallel=ParallelConfig(micro_batch_size=BATCH),
        sae=SAEConfig(hooks=[hook], architecture="topk", expansion=16, k=32),
        stream=StreamConfig(lm="random", micro_batch_size=PASS_SEQUENCES, lanes=LANES, buffer_gib=buffer_gib),
    )


def build_source(config: RunConfig, context: ParallelContext) -> Any:
    """A language model with random weights, counted."""
    assert config.sae is not None
    chunks = build_chunks(config.model, transformer_config(config.model, context), context)
    initialize_parameters(chunks, context, seed=0)
    return CountedSource(GPTSource(chunks, config.sae.hooks, context, seq_len=config.model.seq_len))


def build_task(config: RunConfig, context: ParallelContext) -> SAETask:
    """The task of `config` on a language model with random weights."""
    assert config.stream is not None
    assert config.data is not None
    source = build_source(config, context)
    dataset = SampleStream(config.data, seq_len=config.model.seq_len, seed=config.seed)
    return SAETask(config, context, ActivationStream(config.stream, source, dataset, context, config.seed))


def measure(task: SAETask, rounds: int) -> dict[str, Any]:
    """Alternate the three; print a table; return the figures."""
    source: Any = task.stream.source
    seen: list[Any] = []

    def both() -> None:
        seen[:] = task.micro_batches(0, 1)
        train()

    def train() -> None:
        task.train_step(seen, step=0, lr=1e-4, extra=(), timer=lambda name: nullcontext())

    def forward() -> None:
        for _ in source.run([source.tokens]):
            pass

    for warm_up in (both, both, forward, train):
        warm_up()
    clock, passes, shares = Clock(), 0, defaultdict(float)
    for _ in range(rounds):
        before, spent = source.passes, dict(task.stream.seconds)
        for _ in range(STEPS_PER_ROUND):
            clock("both", both)
        passes += source.passes - before
        for name, seconds in task.stream.seconds.items():
            shares[name] += seconds - spent[name]
        for _ in range(STEPS_PER_ROUND):
            clock("lm", forward)
            clock("sae", train)
    steps, per_call = clock.calls["both"], clock.calls["lm"]
    kept = steps * BATCH / passes  # vectors that a pass brings, in the long run and here
    bounds = {
        kind: (passes * seconds["lm"] + steps * seconds["sae"]) / per_call
        for kind, seconds in (("wall", clock.wall), ("cpu", clock.cpu))
    }
    figures = {
        "ratio": bounds["wall"] / clock.wall["both"],
        "cpu_ratio": bounds["cpu"] / clock.cpu["both"],
        "shuffle_share": shares["shuffle"] / clock.wall["both"],
        "data_share": shares["data"] / clock.wall["both"],
        "lm_vectors_per_second": kept * per_call / clock.wall["lm"],
        "sae_vectors_per_second": BATCH * per_call / clock.wall["sae"],
        "bound_vectors_per_second": steps * BATCH / bounds["wall"],
        "both_vectors_per_second": steps * BATCH / clock.wall["both"],
        "passes": passes,
        "steps": steps,
    }
    for name in ("lm", "sae", "bound", "both"):
        print(f"{name:<8}{figures[f'{name}_vectors_per_second']:>10,.0f} vectors/s")
    shuffling = against(figures["shuffle_share"], SHUFFLE_GOAL, at_most=True)
    print(f"both / bound: {against(figures['ratio'], GOAL)}; by CPU time {against(figures['cpu_ratio'], GOAL)}")
    print(f"share of shuffling: {shuffling}; of reading and ordering tokens: {figures['data_share']:.2%}")
    return figures


if __name__ == "__main__":
    main()
