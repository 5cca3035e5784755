"""The planner against published points: time and memory of 14 models between 1.7 and 1,008 billion parameters.

    python benchmarks/planner_accuracy.py

- arXiv 2205.05198 (Korthikanti et al. 2022): iteration times of table 5, full recomputation, and sequence parallelism with
  selective recomputation, of 22B, 175B, 530B and 1T; GiB of parameters and optimizer, and of activations, of figure 1;
  activations as a share of those of tensor parallelism alone, figure 7. The figures' values are as calculon
  (github.com/calculon-ai/calculon, calculon/llm/validation.py) read them off the paper.
- SC21 (Narayanan et al. 2021, arXiv 2104.04473), table 1: TFLOP/s per GPU of ten models, turned into seconds by the paper's
  equation 3; micro-batch sizes and interleaving from Megatron-LM, examples/sc21/run_table_1.sh.

Both ran on A100s of 80 GB, 8 a node with NVLink and a 200 Gb/s port each, with an attention that stores its scores, dropout
of 0.1, whole optimizer states, nothing overlapped, boundaries split over the tensor group. One constant, the efficiency of
matrix products, is fitted to all 18 times; the columns "unseen" fit it to the other paper alone. The last line is one JSON
object.
"""

import sys
from pathlib import Path

# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
if __name__ == "__main__":  # a test imports this as well
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks._common import against, print_environment
from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig, Recompute
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.flops import narayanan_2021_hardware_flops
from steerscale.planning.iteration import predict_iteration
from steerscale.planning.machine import Efficiency, Machine, machine_of
from steerscale.planning.memory import GIB, chunks_in_flight, estimate_memory, layer_activation_bytes

GOAL = 0.10
"""Mean error of times, and of memory."""


@dataclass(frozen=True)
class Point:
    """A published iteration time."""

    source: str
    name: str
    model: ModelConfig
    layout: ParallelLayout
    recompute: Recompute
    seconds: float


def gpt(num_layers: int, d_model: int, num_heads: int) -> ModelConfig:
    """A model of these papers."""
    return ModelConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        seq_len=2048,
        vocab_size=51200,
        dropout=0.1,
        attention_dropout=0.1,
    )


# name: L, h, a, PP, chunks a stage, MBS, global batch; TP8, one replica
KORTHIKANTI = {
    "22B": (48, 6144, 64, 1, 1, 4, 4),
    "175B": (96, 12288, 96, 8, 3, 1, 64),
    "530B": (105, 20480, 128, 35, 3, 1, 280),
    "1T": (128, 25600, 160, 64, 1, 1, 512),
}
TABLE_5 = {"22B": (1.42, 1.10), "175B": (18.13, 13.75), "530B": (49.05, 37.83), "1T": (94.42, 71.49)}
"""Seconds: full recomputation; sequence parallelism and selective recomputation."""
FIGURE_1 = {  # GiB: parameters and optimizer; activations of tensor parallelism alone; of SP + selective
    "22B": (45.5625, 59.25, 9.5625),
    "175B": (45.5625, 66.84375, 12.3515625),
    "530B": (31.640625, 114.0234375, 23.076171875),
    "1T": (32.958984375, 131.25, 26.5625),
}
FIGURE_7 = {  # activations in % of tensor parallelism alone: SP; selective; SP + selective; full
    "22B": (66.84, 49.42, 16.18, 7.64),
    "175B": (62.04, 56.53, 18.49, 8.71),
    "530B": (58.31, 62.04, 20.27, 9.42),
    "1T": (58.31, 62.04, 20.27, 9.42),
}
FIGURE_7_MODES: list[tuple[str, bool, Recompute]] = [
    ("SP", True, "none"),
    ("selective", False, "selective"),
    ("SP + selective", True, "selective"),
    ("full", False, "full"),
]
# name: L, h, a, TP, PP, chunks a stage, MBS, global batch, GPUs, TFLOP/s per GPU
SC21 = {
    "1.7B": (24, 2304, 24, 1, 1, 1, 16, 512, 32, 137),
    "3.6B": (30, 3072, 32, 2, 1, 1, 16, 512, 64, 138),
    "7.5B": (36, 4096, 32, 4, 1, 1, 16, 512, 128, 142),
    "18B": (40, 6144, 48, 8, 1, 1, 8, 1024, 256, 135),
    "39B": (48, 8192, 64, 8, 2, 1, 4, 1536, 512, 138),
    "76B": (60, 10240, 80, 8, 4, 3, 2, 1792, 1024, 140),
    "145B": (80, 12288, 96, 8, 8, 2, 2, 2304, 1536, 148),
    "310B": (96, 16384, 128, 8, 16, 2, 1, 2160, 1920, 155),
    "530B": (105, 20480, 128, 8, 35, 3, 1, 2520, 2520, 163),
    "1T": (128, 25600, 160, 8, 64, 1, 1, 3072, 3072, 163),
}


def korthikanti_layout(name: str, *, sequence: bool) -> ParallelLayout:
    """Table 3 of arXiv 2205.05198."""
    *_, stages, chunks, size, batch = KORTHIKANTI[name]
    return ParallelLayout(
        tensor=8,
        pipeline=stages,
        virtual_pipeline=chunks,
        sequence=sequence,
        micro_batch_size=size,
        gradient_accumulation_steps=batch // size,
    )


def published_times() -> list[Point]:
    """All 18."""
    points = []
    for name, (full, selective) in TABLE_5.items():
        model = gpt(*KORTHIKANTI[name][:3])
        for recompute, sequence, seconds in (("full", False, full), ("selective", True, selective)):
            layout = korthikanti_layout(name, sequence=sequence)
            points.append(Point("2205.05198", f"{name} {recompute}", model, layout, recompute, seconds))  # type: ignore[arg-type]
    for name, (layers, width, heads, tensor, stages, chunks, size, batch, gpus, tflops) in SC21.items():
        model, data = gpt(layers, width, heads), gpus // (tensor * stages)
        layout = ParallelLayout(
            tensor=tensor,
            pipeline=stages,
            virtual_pipeline=chunks,
            data=data,
            micro_batch_size=size,
            gradient_accumulation_steps=batch // (size * data),
        )
        seconds = narayanan_2021_hardware_flops(model, batch_size=batch) / (tflops * 1e12 * gpus)
        points.append(Point("SC21", f"{name} full", model, layout, "full", seconds))
    return points


def predicted(point: Point, machine: Machine) -> float:
    """Seconds of an iteration as these papers ran it."""
    return predict_iteration(
        point.model,
        point.layout,
        machine,
        engine=EngineConfig(precision="bf16", recompute=point.recompute, distributed_optimizer=False, overlap=False),
        fused_attention=False,
        split_boundaries=True,
    ).total


def with_matmul(machine: Machine, matmul: float) -> Machine:
    """The machine with this one constant."""
    return replace(machine, efficiency=replace(machine.efficiency, matmul=matmul))


def fit_matmul(points: Sequence[Point], machine: Machine) -> float:
    """The efficiency of matrix products with the least squared error of log(predicted / published)."""

    def loss(matmul: float) -> float:
        fitted = with_matmul(machine, matmul)
        return sum(math.log(predicted(point, fitted) / point.seconds) ** 2 for point in points)

    return min((step / 500 for step in range(250, 550)), key=loss)


def times(points: Sequence[Point]) -> dict[str, float]:
    """Print the table of times; its errors."""
    start = machine_of("a100-sxm-80gb")
    matmul = fit_matmul(points, start)
    both = with_matmul(start, matmul)
    blind = {
        source: with_matmul(start, fit_matmul([point for point in points if point.source != source], start))
        for source in {point.source for point in points}
    }
    print(f"seconds of an iteration; matmul efficiency fitted to all: {matmul:.3f}, shipped: {Efficiency().matmul}")
    print(f"{'source':<12}{'model':<16}{'layout':<34}{'published':>10}{'predicted':>10}{'error':>8}{'unseen':>8}")
    errors, unseen = [], []
    for point in points:
        seconds = predicted(point, both)
        errors.append(seconds / point.seconds - 1)
        unseen.append(predicted(point, blind[point.source]) / point.seconds - 1)
        print(
            f"{point.source:<12}{point.name:<16}{point.layout!s:<34}{point.seconds:>10.2f}{seconds:>10.2f}"
            f"{errors[-1]:>+8.1%}{unseen[-1]:>+8.1%}"
        )
    summary = {"matmul": matmul, **summarize("time", errors), **summarize("time_unseen", unseen)}
    for source in ("2205.05198", "SC21"):
        part = [error for point, error in zip(points, errors) if point.source == source]
        summary |= summarize(f"time_{source}", part)
    return summary


def memory() -> dict[str, float]:
    """Print the tables of memory; their errors."""
    print(f"\n{'GiB, figure 1 of 2205.05198':<34}{'published':>10}{'predicted':>10}{'error':>8}")
    states, activations = [], []
    for name, (held, alone, both) in FIGURE_1.items():
        rows = [("parameters and optimizer", held, model_states(name), states)]
        rows.append(("activations, TP", alone, activation_gib(name, False, "none"), activations))
        rows.append(("activations, SP + selective", both, activation_gib(name, True, "selective"), activations))
        for what, published, estimate, errors in rows:
            errors.append(estimate / published - 1)
            print(f"{name + ' ' + what:<34}{published:>10.2f}{estimate:>10.2f}{errors[-1]:>+8.1%}")
    print(f"\n{'% of TP alone, figure 7':<34}{'published':>10}{'predicted':>10}{'error':>8}")
    shares = []
    for name, published in FIGURE_7.items():
        alone = kept_gib(name, False, "none")
        for (mode, sequence, recompute), share in zip(FIGURE_7_MODES, published):
            estimate = 100 * kept_gib(name, sequence, recompute) / alone
            shares.append(estimate / share - 1)
            print(f"{name + ' ' + mode:<34}{share:>10.2f}{estimate:>10.2f}{shares[-1]:>+8.1%}")
    parts = (("states", states), ("activations", activations), ("shares", shares))
    summary = {key: value for part, errors in parts for key, value in summarize(part, errors).items()}
    return summary | summarize("memory", [*states, *activations])


def model_states(name: str) -> float:
    """GiB of weights, gradients and whole optimizer states on the first stage, as the paper counts: N / (t p) parameters."""
    model, layout = gpt(*KORTHIKANTI[name][:3]), korthikanti_layout(name, sequence=False)
    return 18 * model.num_parameters() / (layout.tensor * layout.pipeline) / GIB


def activation_gib(name: str, sequence: bool, recompute: Recompute) -> float:
    """GiB of activations of the first stage, stored scores and what one layer rebuilds included."""
    return (
        estimate_memory(
            gpt(*KORTHIKANTI[name][:3]),
            korthikanti_layout(name, sequence=sequence),
            engine=EngineConfig(precision="bf16", distributed_optimizer=False, recompute=recompute),
            fused_attention=False,
            stage=0,
        ).activations
        / GIB
    )


def kept_gib(name: str, sequence: bool, recompute: Recompute) -> float:
    """GiB that the layers of the first stage keep: without what one of them rebuilds, which figure 7 leaves out."""
    model, layout = gpt(*KORTHIKANTI[name][:3]), korthikanti_layout(name, sequence=sequence)
    layer = layer_activation_bytes(model, layout, precision="bf16", recompute=recompute, fused_attention=False)
    chunk = model.num_layers / (layout.pipeline * layout.virtual_pipeline)
    return layer * chunk * chunks_in_flight(layout, 0) / GIB


def summarize(name: str, errors: Sequence[float]) -> dict[str, float]:
    """Mean and largest absolute error."""
    measures: dict[str, Callable[[list[float]], float]] = {"mean": statistics.fmean, "max": max}
    return {f"{name}_{key}": round(measure([abs(error) for error in errors]), 4) for key, measure in measures.items()}


def main() -> None:
    """Print both comparisons."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    environment = print_environment()
    summary = times(published_times()) | memory()
    print()
    for name in ("time", "time_unseen", "states", "activations", "shares"):
        print(f"{name:<14}mean error {summary[f'{name}_mean']:.1%}, largest {summary[f'{name}_max']:.1%}")
    for name in ("time", "memory"):
        print(f"{name}, mean error: {against(summary[f'{name}_mean'], GOAL, at_most=True)}")
    print(json.dumps({**summary, "environment": environment}))


if __name__ == "__main__":
    main()
