"""Weak scaling: measured on 1 to 8 ranks of this machine's CPU, predicted for clusters of GPUs. Two parts, never mixed.

    python benchmarks/weak_scaling.py [--ranks 1 2 4 8] [--rounds 5] [--no-measured] [-o weak_scaling.png] [--quick]

Measured. P ranks (gloo, one thread each) train one and the same GPT on P times the tokens a step, along one axis: P replicas
(DP), matrices cut P ways (TP) or P stages (PP, 2 P micro-batches, so that a share of (P-1)/(3P-1) is bubble). What each rank
computes stays the same. Steps are `MegatronEngine.train_step` on batches that are there already; figures are medians.
A machine of C cores can do no better with P ranks than with min(P, C), so "wall" is

    (tokens/s of P ranks) / (tokens/s of one rank x min(P, C)),

what is lost to waiting and sharing. Where P > C ranks share cores, and one's wait is another's turn: bubbles cost nothing
there. "CPU" is the CPU seconds of one rank a token over those of all P ranks: what is lost to more work (copies, collectives,
smaller matrices). It needs no cores of one's own and hardly changes on a busy machine, and knows nothing of waiting. Gloo
over loopback is no NVLink and no InfiniBand: none of it says anything about GPUs.

Predicted. `planning.iteration.predict_iteration` for A100 nodes, 8 to 1,024 GPUs: the layout that is fastest among those that
fit the smallest number of GPUs, then more replicas of it, micro-batches and accumulation as they were. Nobody ran these; slow
nodes, congestion and reading data are not in the model, which grow with the number of GPUs. How far it is from published
times is benchmarks/planner_accuracy.py's to say (3.3 % in the mean, 6.5 % at most).

The last line is one JSON object: `ratio` is the lowest measured CPU efficiency; `measured` and `predicted` hold the rest.
"""

import sys
from pathlib import Path

# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
if __name__ == "__main__":  # a test imports this as well
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._common import print_environment
from benchmarks.weak_scaling_predicted import GPUS, predict
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WARM_UP = 1
MODEL = ModelConfig(
    num_layers=8,
    d_model=256,
    num_heads=8,
    d_ff=704,
    seq_len=256,
    vocab_size=4096,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
)
TINY = replace(MODEL, num_layers=2, d_model=64, num_heads=2, d_ff=128, seq_len=64, vocab_size=256)
MICRO_BATCH_SIZE, MICRO_BATCHES = 2, 2
"""Of one rank alone."""
AXES = ("data", "tensor", "pipeline")
SPOKEN = {"data": "DP", "tensor": "TP", "pipeline": "PP"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, predict, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5, help="measured steps")
    parser.add_argument("--no-measured", action="store_true", help="only predict")
    parser.add_argument("-o", "--output", type=Path, help="PNG or SVG of both parts")
    parser.add_argument("--quick", action="store_true", help="a tiny model on 1 and 2 ranks: does it run?")
    args = parser.parse_args(argv)
    environment = print_environment("megatron-core")
    model, ranks, rounds = (TINY, [1, 2], 1) if args.quick else (MODEL, sorted({1, *args.ranks}), args.rounds)
    measured = {} if args.no_measured else measure(model, ranks, rounds=rounds, cores=environment["cores"])
    predicted = predict()
    efficiencies = [point["cpu_efficiency"] for points in measured.values() for point in points]
    if args.output is not None:
        draw(measured, predicted, cores=environment["cores"], path=args.output)
        print(f"\n{args.output}: measured and predicted, side by side")
    result = {"ratio": min(efficiencies, default=None), "rounds": rounds, "environment": environment}
    print(json.dumps({**result, "measured": measured, "predicted": predicted}))
    return 0


def measure(model: ModelConfig, ranks: Sequence[int], *, rounds: int, cores: int) -> dict[str, list[dict[str, Any]]]:
    """Efficiency by axis and ranks; prints a table."""
    from steerscale.testing.ranks import RankPool

    print(
        f"\nMEASURED on {cores} cores: {model.num_parameters():,} parameters, "
        f"{MICRO_BATCH_SIZE * MICRO_BATCHES * model.seq_len} tokens a rank and step, float32, medians of {rounds} steps\n"
        f"{'axis':<6}{'ranks':>6}{'tokens/s':>10}{'CPU s a step':>14}{'wall efficiency':>17}{'CPU efficiency':>16}"
    )
    pool = RankPool()
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        alone = pool.run(train, model, layout_of("data", 1), rounds, ranks=1)
        for axis in AXES:
            found[SPOKEN[axis]] = []
            for count in ranks:
                if count > 1 and axis != "data" and (model.num_heads % count or model.num_layers % count):
                    print(f"{SPOKEN[axis]:<6}{count:>6}  left out: {count} does not divide heads or layers")
                    continue
                answers = alone if count == 1 else pool.run(train, model, layout_of(axis, count), rounds, ranks=count)
                point = efficiency(answers, alone, tokens=tokens_of(model), cores=cores)
                found[SPOKEN[axis]].append(point)
                print(
                    f"{SPOKEN[axis]:<6}{count:>6}{point['tokens_per_second']:>10,.0f}{point['cpu_seconds']:>14.3f}"
                    f"{point['wall_efficiency']:>17.3f}{point['cpu_efficiency']:>16.3f}",
                    flush=True,
                )
    finally:
        pool.close()
    return found


def layout_of(axis: str, ranks: int) -> ParallelConfig:
    """`ranks` along one axis, with as much work for each of them as one alone has."""
    more = 1 if axis == "data" else ranks
    degrees = {axis: ranks}
    return ParallelConfig(
        micro_batch_size=MICRO_BATCH_SIZE, gradient_accumulation_steps=MICRO_BATCHES * more, **degrees
    )


def tokens_of(model: ModelConfig) -> int:
    """Tokens of a step for each rank."""
    return MICRO_BATCH_SIZE * MICRO_BATCHES * model.seq_len


Steps = list[tuple[float, float]]
"""Seconds and CPU seconds of each step of a rank."""


def efficiency(ranks: Sequence[Steps], alone: Sequence[Steps], *, tokens: int, cores: int) -> dict[str, Any]:
    """Figures of P ranks against one; see the module's docstring."""
    count = len(ranks)
    (wall, cpu), (wall_alone, cpu_alone) = (
        (
            statistics.median(max(rank[step][0] for rank in some) for step in range(len(some[0]))),
            statistics.median(sum(rank[step][1] for rank in some) for step in range(len(some[0]))),
        )
        for some in (ranks, alone)
    )
    return {
        "ranks": count,
        "seconds": round(wall, 4),
        "cpu_seconds": round(cpu, 4),
        "tokens_per_second": round(count * tokens / wall, 1),
        "wall_efficiency": round(count * wall_alone / (wall * min(count, cores)), 4),
        "cpu_efficiency": round(count * cpu_alone / cpu, 4),
    }


def train(model: ModelConfig, parallel: ParallelConfig, rounds: int) -> Steps:
    """On every rank: steps of the engine."""
    import torch

    from steerscale.data.loader import MicroBatch, make_micro_batch
    from steerscale.optim import OptimConfig
    from steerscale.parallel.context import initialize
    from steerscale.train.config import RunConfig, TrainConfig
    from steerscale.train.gpt import build_engine, sum_losses

    config = RunConfig(
        name="weak_scaling",
        run_dir="unused",
        model=model,
        train=TrainConfig(steps=1000),
        parallel=parallel,
        optim=OptimConfig(lr=1e-4),
    )
    layout, steps = config.layout(), []

    def forward(batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        output = chunk(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.labels_BS)
        return output, lambda losses_BS: sum_losses(losses_BS, batch.loss_mask_BS)

    with initialize(layout) as context, closing(build_engine(config, context)) as engine:
        generator = np.random.default_rng(context.at.data)
        shape = (layout.micro_batch_size, model.seq_len + 1)
        batches = [
            make_micro_batch(generator.integers(3, model.tokens, shape), eos_id=2)
            for _ in range(layout.gradient_accumulation_steps)
        ]
        for number in range(WARM_UP + rounds):
            torch.distributed.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            assert engine.train_step(batches, forward, lr=1e-4).applied
            if number >= WARM_UP:
                steps.append((time.perf_counter() - wall, time.process_time() - cpu))
    return steps


def draw(measured: dict[str, Any], predicted: dict[str, Any], *, cores: int, path: Path) -> None:
    """Both parts beside each other, each under its own heading."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.8), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    for number, (axis, points) in enumerate(measured.items()):
        ranks, color = [point["ranks"] for point in points], f"C{number}"
        left.plot(ranks, [point["cpu_efficiency"] for point in points], "o-", color=color, label=f"{axis}, CPU time")
        left.plot(ranks, [point["wall_efficiency"] for point in points], "s:", color=color, label=f"{axis}, wall time")
    left.set_title(f"MEASURED: ranks on {cores} CPU cores (says nothing about GPUs)", fontsize=10)
    for title, case in predicted.items():
        points = case["points"]
        gpus = [point["gpus"] for point in points]
        degrees = case["layout"].split(" DP")[0]
        right.plot(gpus, [point["efficiency"] for point in points], "--", label=f"{title}; {degrees}")
    right.set_title("PREDICTED by the planner: A100 nodes (nobody ran these)", fontsize=10)
    _finish(left, "ranks", sorted({point["ranks"] for points in measured.values() for point in points}))
    _finish(right, "GPUs", list(GPUS))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _finish(axis: "Axes", label: str, ticks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(0, 1.15)
    axis.set_xlabel(f"{label}, as much work for each")
    axis.set_ylabel("efficiency")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(frameon=False, fontsize=8, loc="lower left")


if __name__ == "__main__":
    sys.exit(main())
