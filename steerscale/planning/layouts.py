"""Every layout of a model on a number of GPUs: rejected with the reason, or with its memory and its predicted time."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from steerscale.config import require
from steerscale.errors import LayoutError
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelConfig, ParallelLayout
from steerscale.planning.fit import Fit
from steerscale.planning.flops import Recompute
from steerscale.planning.hardware import Precision
from steerscale.planning.iteration import IterationTime, predict_iteration
from steerscale.planning.machine import Machine
from steerscale.planning.memory import estimate_memory
from steerscale.planning.throughput import Throughput, throughput

LARGEST_MICRO_BATCH = 32
"""Micro-batches of 1, 2, 4, ... up to this are tried where the search names none."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Values to try; None: all that can make sense."""

    tensor: Sequence[int] | None = None
    pipeline: Sequence[int] | None = None
    virtual_pipeline: Sequence[int] | None = None
    micro_batch_size: Sequence[int] | None = None
    gradient_accumulation_steps: Sequence[int] | None = None
    sequence: Sequence[bool] | None = None
    recompute: Sequence[Recompute] | None = None
    distributed_optimizer: Sequence[bool] | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be trained, on what."""

    model: ModelConfig
    """With a known vocabulary."""
    global_batch_size: int
    """Sequences in one optimizer step."""
    gpus: int
    """Ranks in all."""
    machine: Machine
    """Their kind and their links."""
    precision: Precision = "bf16"
    """Of weights and products."""
    overlap: bool = True
    """As engine.overlap."""
    fused_attention: bool = True
    """False: an attention that stores its scores."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "gpus"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout that can be run, and what it is predicted to need."""

    layout: ParallelLayout
    recompute: Recompute
    distributed_optimizer: bool
    precision: Precision
    fit: Fit
    time: IterationTime
    throughput: Throughput
    notes: list[str] = field(default_factory=list)
    """What speaks against it."""

    def __str__(self) -> str:
        return candidate_name(self.layout, self.recompute, self.distributed_optimizer)

    def overrides(self) -> list[str]:
        """Settings of `python -m launch.train` that run it."""
        layout = self.layout
        return [
            f"parallel.tensor={layout.tensor}",
            f"parallel.pipeline={layout.pipeline}",
            f"parallel.virtual_pipeline={layout.virtual_pipeline}",
            f"parallel.data={layout.data}",
            f"parallel.sequence={str(layout.sequence).lower()}",
            f"parallel.micro_batch_size={layout.micro_batch_size}",
            f"parallel.global_batch_size={layout.global_batch_size}",
            f"engine.precision={self.precision}",
            f"engine.recompute={self.recompute}",
            f"engine.distributed_optimizer={str(self.distributed_optimizer).lower()}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "layout": {
                **asdict(self.layout),
                "recompute": self.recompute,
                "distributed_optimizer": self.distributed_optimizer,
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
class Rejection:
    """A layout, or all layouts that share something, that cannot be run."""

    what: str
    """The part that decides, e.g. TP3 or a whole layout."""
    reason: str
    """One of a few sentences, to count by."""
    text: str
    """The numbers."""


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
    modes = _recompute_modes(task, search, rejections)
    for layout in _layouts(task, search, rejections):
        for distributed in search.distributed_optimizer or ((True, False) if layout.data > 1 else (True,)):
            for recompute in modes:
                planned = plan_one(task, layout, recompute=recompute, distributed_optimizer=distributed)
                if planned.fit.fits:
                    plans.append(planned)
                else:
                    rejections.append(_oversized(planned))
    plans.sort(key=lambda plan: (plan.time.total, plan.fit.memory.total))
    return Planned(plans=plans, rejections=list(dict.fromkeys(rejections)))


def plan_one(task: Task, layout: ParallelLayout, *, recompute: Recompute, distributed_optimizer: bool) -> Plan:
    """Memory and time of one layout, whether or not it fits. Raises LayoutError if the model cannot be split this way."""
    memory = estimate_memory(
        task.model,
        layout,
        precision=task.precision,
        distributed_optimizer=distributed_optimizer,
        recompute=recompute,
        fused_attention=task.fused_attention,
    )
    time = predict_iteration(
        task.model,
        layout,
        task.machine,
        precision=task.precision,
        recompute=recompute,
        distributed_optimizer=distributed_optimizer,
        overlap=task.overlap and task.machine.overlaps,
        fused_attention=task.fused_attention,
    )
    beyond = layout.tensor > task.machine.gpus_per_node
    return Plan(
        layout=layout,
        recompute=recompute,
        distributed_optimizer=distributed_optimizer,
        precision=task.precision,
        fit=Fit(memory=memory, device_gib=task.machine.memory_gib),
        time=time,
        throughput=throughput(
            time.total, model=task.model, layout=layout, recompute=recompute, peak_tflops=task.machine.peak_tflops
        ),
        notes=[f"TP{layout.tensor} leaves the node of {task.machine.gpus_per_node}"] if beyond else [],
    )


def candidate_name(layout: ParallelLayout, recompute: Recompute, distributed_optimizer: bool) -> str:
    """A layout and its settings in short."""
    return f"{layout}{' ZeRO-1' if distributed_optimizer else ''} recompute {recompute}"


def _recompute_modes(task: Task, search: Search, rejections: list[Rejection]) -> Sequence[Recompute]:
    if search.recompute is not None:
        return search.recompute
    if not task.fused_attention:
        return ("none", "selective", "full")
    rejections.append(
        Rejection(
            what="recompute selective",
            reason="selective recomputation saves nothing",
            text="the fused attention keeps no scores: recomputing it costs time and saves no memory",
        )
    )
    return ("none", "full")


def _layouts(task: Task, search: Search, rejections: list[Rejection]) -> Iterator[ParallelLayout]:
    """Layouts that fit the model and the batch, if not yet the memory."""
    for t in search.tensor or _divisors(task.gpus):
        if not _fits_model(task, ParallelLayout(tensor=t), f"TP{t}", "the model is not divisible by TP", rejections):
            continue
        for p in search.pipeline or _divisors(task.gpus):
            if task.gpus % (t * p):
                if search.pipeline is not None or search.tensor is not None:
                    text = f"TP{t} x PP{p} = {t * p} does not divide {task.gpus} GPUs"
                    rejections.append(Rejection(what=f"TP{t} PP{p}", reason="TP x PP does not divide GPUs", text=text))
                continue
            name = f"TP{t} PP{p}"
            if _fits_model(task, ParallelLayout(pipeline=p), name, "layers are not divisible by PP", rejections):
                yield from _batches(task, search, t, p, rejections)


def _batches(task: Task, search: Search, t: int, p: int, rejections: list[Rejection]) -> Iterator[ParallelLayout]:
    data = task.gpus // (t * p)
    if task.global_batch_size % data:
        text = f"global batch {task.global_batch_size} is not divisible by DP = {data}"
        reason = "the global batch is not divisible by MBS x DP"
        rejections.append(Rejection(what=f"TP{t} PP{p} DP{data}", reason=reason, text=text))
        return
    share = task.global_batch_size // data
    for size in search.micro_batch_size or [2**n for n in range(LARGEST_MICRO_BATCH.bit_length()) if 2**n <= share]:
        for v in search.virtual_pipeline or _divisors(task.model.num_layers // p if p > 1 else 1):
            wanted = ParallelConfig(
                tensor=t,
                pipeline=p,
                virtual_pipeline=v,
                data=data,
                micro_batch_size=size,
                global_batch_size=task.global_batch_size,
            )
            what = f"TP{t} PP{p}{f'x{v}' if v > 1 else ''} DP{data} MBS{size}"
            try:
                layout = ParallelLayout.resolve(wanted)
            except LayoutError as error:
                indivisible = bool(share % size)
                reason = (
                    "the global batch is not divisible by MBS x DP"
                    if indivisible
                    else "interleaving needs PP > 1 and GAS divisible by PP"
                )
                rejections.append(Rejection(what=what, reason=reason, text=str(error)))
                if indivisible:
                    break
                continue
            steps = search.gradient_accumulation_steps
            if steps is not None and layout.gradient_accumulation_steps not in steps:
                text = f"GAS would be {layout.gradient_accumulation_steps}, asked for {', '.join(map(str, steps))}"
                rejections.append(Rejection(what=what, reason="another GAS was asked for", text=text))
                break
            chunks = ParallelLayout(pipeline=p, virtual_pipeline=v)
            if v > 1 and not _fits_model(task, chunks, what, "layers are not divisible by PP", rejections):
                continue
            yield from _sequence(task, search, layout, rejections)


def _sequence(
    task: Task, search: Search, layout: ParallelLayout, rejections: list[Rejection]
) -> Iterator[ParallelLayout]:
    for sequence in search.sequence or (False, True):
        if not sequence:
            yield layout
        elif layout.tensor > 1:
            split = ParallelLayout(tensor=layout.tensor, sequence=True)
            reason = "the sequence is not divisible by TP"
            if _fits_model(task, split, f"TP{layout.tensor}+SP", reason, rejections):
                yield replace(layout, sequence=True)


def _fits_model(task: Task, layout: ParallelLayout, what: str, reason: str, rejections: list[Rejection]) -> bool:
    try:
        layout.check_model(task.model)
    except LayoutError as error:
        rejections.append(Rejection(what=what, reason=reason, text=str(error)))
        return False
    return True


def _oversized(plan: Plan) -> Rejection:
    fit = plan.fit
    return Rejection(
        what=str(plan),
        reason=f"more than the {fit.usable_gib:.1f} GiB usable of {fit.device_gib:g}",
        text=f"{fit.over_gib:,.1f} GiB over: {fit.spoken_parts()}",
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
