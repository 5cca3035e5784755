"""The predicted part of weak_scaling.py: the planner on models on A100 nodes. Nothing here was measured. Torch-free."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steerscale.config import from_mapping, load_yaml
from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.fit import usable_gib
from steerscale.planning.iteration import predict_iteration
from steerscale.planning.machine import Machine, machine_of
from steerscale.planning.memory import estimate_memory
from steerscale.planning.throughput import throughput

MODELS = Path(__file__).resolve().parent.parent / "configs" / "model"
VOCABULARY = 51200
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Prediction:
    """A model on A100s of 40 GB, 8 a node, with so much bandwidth out of a node for each."""

    model: str
    micro_batch_size: int
    micro_batches: int
    inter_node_gb_per_second: float
    note: str

    @property
    def title(self) -> str:
        """For people."""
        batch = f"MBS {self.micro_batch_size}, GAS {self.micro_batches}"
        return f"{self.model}, {batch}, {self.inter_node_gb_per_second:g} GB/s a GPU"


PREDICTIONS = (
    Prediction("6.7b", 2, 128, 25.0, "the talk's run on nodes with a 200 Gb/s port a GPU"),
    Prediction("6.7b", 2, 128, 6.25, "the talk's run on nodes with two such ports, as Alpha Centauri has them"),
    Prediction("6.7b", 2, 8, 6.25, "the same with little accumulation"),
    Prediction("175b", 1, 64, 25.0, "GPT-3's size"),
    Prediction("175b", 1, 64, 6.25, "the same with two ports a node"),
)


def predict() -> dict[str, dict[str, Any]]:
    """Predicted throughput by case and number of GPUs; prints a table each."""
    found = {}
    for case in PREDICTIONS:
        model = read_model(case.model)
        machine = machine_of("a100-sxm-40gb", inter_node_gb_per_second=case.inter_node_gb_per_second)
        gpus, layout, engine = smallest(case, model, machine)
        print(
            f"\nPREDICTED, not measured: {case.title} ({case.note})\n"
            f"  {layout}, recompute {engine.recompute}: the fastest that fits {gpus} A100s of 40 GB; from there on more "
            "replicas\n"
            f"  {'GPUs':>6}{'GBS':>8}{'s a step':>10}{'tokens/s/GPU':>14}{'MFU':>8}{'efficiency':>12}{'not hidden':>12}"
        )
        points = []
        for count in (number for number in GPUS if number >= gpus):
            points.append(predicted_point(model, replace(layout, data=count * layout.data // gpus), machine, engine))
            point = points[-1]
            point["efficiency"] = round(point["tokens_per_second_per_gpu"] / points[0]["tokens_per_second_per_gpu"], 4)
            print(
                f"  {point['gpus']:>6,}{point['global_batch_size']:>8,}{point['seconds']:>10.2f}"
                f"{point['tokens_per_second_per_gpu']:>14,.0f}{point['mfu']:>8.1%}{point['efficiency']:>12.3f}"
                f"{point['data_communication_share']:>12.1%}"
            )
        found[case.title] = {"layout": str(layout), "recompute": engine.recompute, "note": case.note, "points": points}
    print('  "not hidden": the share of a step in which gradients and parameters travel and nothing is computed')
    return found


def read_model(name: str) -> ModelConfig:
    """A model of configs/model with the papers' vocabulary."""
    path = MODELS / f"{name}.yaml"
    return from_mapping(ModelConfig, {**load_yaml(path), "vocab_size": VOCABULARY}, at=str(path))


def smallest(case: Prediction, model: ModelConfig, machine: Machine) -> tuple[int, ParallelLayout, EngineConfig]:
    """The least of `GPUS` that the model fits on, and what is fastest there. Raises SystemExit if there is none."""
    for gpus in GPUS:
        fitting = [
            (layout, engine) for layout, engine in candidates(case, model, gpus) if fits(model, layout, machine, engine)
        ]
        if fitting:
            best = min(
                fitting,
                key=lambda pair: predict_iteration(model, pair[0], machine, engine=pair[1]).total / pair[0].data,
            )
            return gpus, *best
    raise SystemExit(f"{case.model} does not fit {GPUS[-1]} GPUs")


def candidates(case: Prediction, model: ModelConfig, gpus: int) -> list[tuple[ParallelLayout, EngineConfig]]:
    """Every layout of so many GPUs with tensor groups within a node, with and without recomputation."""
    return [
        (
            ParallelLayout(
                tensor=tensor,
                pipeline=pipeline,
                data=gpus // (tensor * pipeline),
                sequence=tensor > 1,
                micro_batch_size=case.micro_batch_size,
                gradient_accumulation_steps=case.micro_batches,
            ),
            EngineConfig(precision="bf16", recompute=recompute),  # type: ignore[arg-type]
        )
        for tensor in (1, 2, 4, 8)
        for pipeline in (1, 2, 4, 8, 16, 32)
        for recompute in ("none", "pointwise", "selective", "full")
        if gpus % (tensor * pipeline) == 0 and model.num_layers % pipeline == 0
    ]


def fits(model: ModelConfig, layout: ParallelLayout, machine: Machine, engine: EngineConfig) -> bool:
    """Whether the fullest rank fits."""
    return estimate_memory(model, layout, engine=engine).total_gib <= usable_gib(machine.memory_gib)


def predicted_point(
    model: ModelConfig, layout: ParallelLayout, machine: Machine, engine: EngineConfig
) -> dict[str, Any]:
    """What the planner says of one number of GPUs."""
    times = predict_iteration(model, layout, machine, engine=engine)
    rates = throughput(
        times.total, model=model, layout=layout, recompute=engine.recompute, peak_tflops=machine.peak_tflops
    )
    assert rates.mfu is not None
    return {
        "gpus": layout.world_size,
        "layout": str(layout),
        "global_batch_size": layout.global_batch_size,
        "seconds": round(times.total, 3),
        "tokens_per_second_per_gpu": round(rates.tokens_per_second_per_gpu, 1),
        "mfu": round(rates.mfu, 4),
        "data_communication_share": round(times.data_communication / times.total, 4),
    }
