"""The two engines at the same layouts: Megatron-Core's against DeepSpeed's, step by step in turn.

    python benchmarks/engines.py [--layouts "TP1 PP1 DP2 ZeRO-1" ...] [--rounds 9] [--quick]

Both train the same GPT (float32, the same weights, micro-batches, clipping and AdamW) on gloo ranks of this machine, one thread
each, within the same processes: a step of one engine, a step of the other, taking turns at going first. The first steps are
warm-up, figures are medians. At each ZeRO stage above 0 Megatron-Core has its distributed optimizer on. Reading data is in
neither. Before anything is measured the losses must agree.

The last line is one JSON object: `ratio` is DeepSpeed / Megatron-Core in seconds a step (above 1: Megatron-Core is faster), the
lowest over the layouts; `cpu_ratio` the same in CPU seconds, which a busy machine disturbs less.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import torch

from benchmarks._common import print_environment
from steerscale.data.loader import MicroBatch, make_micro_batch
from steerscale.engines.base import Engine
from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig
from steerscale.optim import OptimConfig
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelConfig
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig, TrainConfig
from steerscale.train.gpt import build_engine, sum_losses

ENGINES = ("megatron", "deepspeed")
WARM_UP = 2
MODEL = ModelConfig(
    num_layers=6,
    d_model=320,
    num_heads=4,
    d_ff=864,
    seq_len=256,
    vocab_size=4096,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
TINY = ModelConfig(num_layers=2, d_model=64, num_heads=2, seq_len=64, vocab_size=256)
SEQUENCES, MICRO_BATCH_SIZE = 8, 2
LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "TP1 PP1 DP1 ZeRO-0": ({}, 0),
    "TP1 PP1 DP2 ZeRO-0": ({"data": 2}, 0),
    "TP1 PP1 DP2 ZeRO-1": ({"data": 2}, 1),
    "TP1 PP1 DP2 ZeRO-2": ({"data": 2}, 2),
    "TP1 PP1 DP2 ZeRO-3": ({"data": 2}, 3),
    "TP2 PP1 DP1 ZeRO-0": ({"tensor": 2}, 0),
    "TP1 PP2 DP1 ZeRO-1": ({"pipeline": 2}, 1),
}

Steps = list[tuple[float, float]]
"""Seconds and CPU seconds (of all ranks) of each step."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each engine")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two layouts and two rounds: does it run?")
    args = parser.parse_args()
    names, rounds = (list(LAYOUTS)[1:3], 2) if args.quick else (args.layouts, args.rounds)
    environment = print_environment("megatron-core", "deepspeed")
    print(f"{'layout':<20} {'parameters':>11} {'megatron ms':>12} {'deepspeed ms':>13} {'ratio':>6} {'by CPU':>7}")
    pool = RankPool()
    try:
        results = {name: measure(pool, name, rounds=rounds, quick=args.quick) for name in names}
    finally:
        pool.close()
    lowest = {key: min(result[key] for result in results.values()) for key in ("ratio", "cpu_ratio")}
    print(
        f"DeepSpeed / Megatron-Core, lowest: {lowest['ratio']:.3f}, by CPU time {lowest['cpu_ratio']:.3f} (no limit: compared)"
    )
    print(json.dumps({**lowest, "rounds": rounds, "environment": environment, "layouts": results}))


def measure(pool: RankPool, name: str, *, rounds: int, quick: bool) -> dict[str, Any]:
    """Both engines at one layout: print a line, return the figures."""
    degrees, zero = LAYOUTS[name]
    configs = {engine: _config(engine, degrees, zero, quick=quick) for engine in ENGINES}
    layout = configs["megatron"].layout()
    ranks = pool.run(alternate, configs, rounds, ranks=layout.world_size)
    wall = {engine: statistics.median(seconds for seconds, _ in ranks[0][engine]) for engine in ENGINES}
    cpu = {
        engine: statistics.median(sum(part) for part in zip(*([cpu for _, cpu in rank[engine]] for rank in ranks)))
        for engine in ENGINES
    }
    model = configs["megatron"].model
    figures = {
        "parameters": model.num_parameters(),
        "tokens_per_step": layout.global_batch_size * model.seq_len,
        "seconds_per_step": {engine: round(wall[engine], 4) for engine in ENGINES},
        "ratio": round(wall["deepspeed"] / wall["megatron"], 4),
        "cpu_ratio": round(cpu["deepspeed"] / cpu["megatron"], 4),
    }
    print(
        f"{name:<20} {figures['parameters']:>11,} {1e3 * wall['megatron']:>12,.1f} {1e3 * wall['deepspeed']:>13,.1f} "
        f"{figures['ratio']:>6.3f} {figures['cpu_ratio']:>7.3f}",
        flush=True,
    )
    return figures


def _config(engine: str, degrees: dict[str, int], zero: int, *, quick: bool) -> RunConfig:
    model = TINY if quick else MODEL
    stage = {"zero_stage": zero} if engine == "deepspeed" else {"distributed_optimizer": zero > 0}
    return RunConfig(
        name="engines",
        run_dir="unused",
        model=model,
        train=TrainConfig(steps=1000),
        parallel=ParallelConfig(micro_batch_size=MICRO_BATCH_SIZE, global_batch_size=SEQUENCES, **degrees),
        engine=EngineConfig(name=engine, **stage),  # type: ignore[arg-type]
        optim=OptimConfig(lr=1e-4),
    )


def alternate(configs: dict[str, RunConfig], rounds: int) -> dict[str, Steps]:
    """On every rank: both engines built, then steps in turn."""
    steps: dict[str, Steps] = {engine: [] for engine in ENGINES}
    config = configs["megatron"]
    with initialize(config.layout()) as context:
        batches = _batches(config, context.at.data)
        engines = {name: build_engine(configs[name], context) for name in ENGINES}
        with closing(engines["deepspeed"]), closing(engines["megatron"]):
            for number in range(WARM_UP + rounds):
                losses = {}
                for name in ENGINES if number % 2 else reversed(ENGINES):
                    torch.distributed.barrier()
                    wall, cpu = time.perf_counter(), time.process_time()
                    losses[name] = _step(engines[name], batches)
                    if number >= WARM_UP:
                        steps[name].append((time.perf_counter() - wall, time.process_time() - cpu))
                # A benchmark of something else would be worthless: both must learn the same.
                assert abs(losses["megatron"] / losses["deepspeed"] - 1) < 1e-5, losses
    return steps


def _step(engine: Engine, batches: list[MicroBatch]) -> float:
    def forward(batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        output = chunk(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.labels_BS)
        return output, lambda losses_BS: sum_losses(losses_BS, batch.loss_mask_BS)

    return engine.train_step(batches, forward, lr=1e-4).totals.loss


def _batches(config: RunConfig, data_rank: int) -> list[MicroBatch]:
    layout, model = config.layout(), config.model
    generator = np.random.default_rng(data_rank)
    shape = (layout.micro_batch_size, model.seq_len + 1)
    return [
        make_micro_batch(generator.integers(3, model.tokens, shape), eos_id=2)
        for _ in range(layout.gradient_accumulation_steps)
    ]


if __name__ == "__main__":
    main()
