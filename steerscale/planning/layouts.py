"""Every layout of a model on a number of GPUs: rejected with the reason, or with its memory and its predicted time."""

from dataclasses import asdict, dataclass, field
from typing import Any

from steerscale.engines.config import EngineConfig
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.fit import Fit
from steerscale.planning.iteration import IterationTime, predict_iteration
from steerscale.planning.memory import estimate_memory
from steerscale.planning.search import Rejection, Search, Task, candidates
from steerscale.planning.throughput import Throughput, throughput


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout that can be run, and what it is predicted to need."""

    layout: ParallelLayout
    engine: EngineConfig
    fit: Fit
    time: IterationTime
    throughput: Throughput
    notes: list[str] = field(default_factory=list)
    """What speaks against it."""

    def __str__(self) -> str:
        return candidate_name(self.layout, self.engine)

    def overrides(self) -> list[str]:
        """Settings of `python -m launch.train` that run it."""
        layout, engine = self.layout, self.engine
        zero = (
            [f"engine.distributed_optimizer={str(engine.zero > 0).lower()}"]
            if engine.name == "megatron"
            else ["engine=deepspeed", f"engine.zero_stage={engine.zero}"]
        )
        return [
            f"parallel.tensor={layout.tensor}",
            f"parallel.pipeline={layout.pipeline}",
            f"parallel.virtual_pipeline={layout.virtual_pipeline}",
            f"parallel.data={layout.data}",
            f"parallel.sequence={str(layout.sequence).lower()}",
            f"parallel.micro_batch_size={layout.micro_batch_size}",
            f"parallel.global_batch_size={layout.global_batch_size}",
            f"engine.precision={engine.precision}",
            f"engine.recompute={engine.recompute}",
            *zero,
            *(["engine.offload_optimizer=true"] if engine.offload_optimizer else []),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "layout": {
                **asdict(self.layout),
                "engine": self.engine.name,
                "recompute": self.engine.recompute,
                "zero": self.engine.zero,
                "offload_optimizer": self.engine.offload_optimizer,
            },
            "seconds_per_iteration": self.time.total,
            "seconds": asdict(self.time),
            "bubble_fraction": self.layout.bubble_fraction,
            "memory": self.fit.as_dict(),
            "throughput": asdict(self.throughput),
            "notes": self.notes,
            "overrides": self.overrides(),
        }


@dataclass(frozen=True, kw_only=True)
class Planned:
    """All layouts of a task."""

    plans: list[Plan]
    """Those that fit, the fastest first; the less memory first where two are equally fast."""
    rejections: list[Rejection]
    """The others."""

    def reasons(self) -> dict[str, int]:
        """How many rejections there are for each reason, the most frequent first."""
        counts: dict[str, int] = {}
        for rejection in self.rejections:
            counts[rejection.reason] = counts.get(rejection.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def plan_layouts(task: Task, search: Search | None = None) -> Planned:
    """Try every layout. Raises ConfigError if the model's vocabulary is unknown."""
    search = search or Search()
    rejections: list[Rejection] = []
    plans = []
    for layout, engine in candidates(task, search, rejections):
        planned = plan_one(task, layout, engine)
        if planned.fit.fits:
            plans.append(planned)
        else:
            rejections.append(_oversized(planned))
    plans.sort(key=lambda plan: (plan.time.total, plan.fit.memory.total))
    return Planned(plans=plans, rejections=list(dict.fromkeys(rejections)))


def plan_one(task: Task, layout: ParallelLayout, engine: EngineConfig) -> Plan:
    """Memory and time of one layout, whether or not it fits. Raises LayoutError if the model cannot be split this way."""
    memory = estimate_memory(task.model, layout, engine=engine, fused_attention=task.fused_attention)
    time = predict_iteration(task.model, layout, task.machine, engine=engine, fused_attention=task.fused_attention)
    beyond = layout.tensor > task.machine.gpus_per_node
    return Plan(
        layout=layout,
        engine=engine,
        fit=Fit(memory=memory, device_gib=task.machine.memory_gib),
        time=time,
        throughput=throughput(
            time.total,
            model=task.model,
            layout=layout,
            recompute=engine.recompute,
            peak_tflops=task.machine.peak_tflops if task.machine.knows_peak else None,
        ),
        notes=[
            *([f"TP{layout.tensor} leaves the node of {task.machine.gpus_per_node}"] if beyond else []),
            *(["without the time of the optimizer on the host"] if engine.offload_optimizer else []),
        ],
    )


def candidate_name(layout: ParallelLayout, engine: EngineConfig) -> str:
    """A layout and its settings in short."""
    sharded = f" {sharding_name(engine)}" if engine.zero or engine.name == "deepspeed" else ""
    return f"{layout}{sharded} recompute {engine.recompute}"


def sharding_name(engine: EngineConfig) -> str:
    """What is shared out over the replicas, in a word; the engine's own name for it, since DeepSpeed's holds more."""
    stage = f"ZeRO-{engine.zero}"
    if engine.name == "deepspeed":
        return f"DS {stage}{' offload' if engine.offload_optimizer else ''}"
    return stage if engine.zero else "whole"


def _oversized(plan: Plan) -> Rejection:
    fit = plan.fit
    return Rejection(
        what=str(plan),
        reason=f"more than the {fit.usable_gib:.1f} GiB usable of {fit.device_gib:g}",
        text=f"{fit.over_gib:,.1f} GiB over: {fit.spoken_parts()}",
    )
