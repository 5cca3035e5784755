"""What may be run: every layout and engine setting of a task that model, batch and engine allow, and why others do not."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from steerscale.config import require
from steerscale.engines.config import EngineConfig, check_engine
from steerscale.errors import ConfigError, LayoutError
from steerscale.models.config import ModelConfig, Recompute
from steerscale.parallel.layout import ParallelConfig, ParallelLayout
from steerscale.planning.machine import Machine

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
    zero: Sequence[int] | None = None
    """ZeRO stages: Megatron-Core has 0 and 1, DeepSpeed 0 to 3."""

    def __post_init__(self) -> None:
        options = {
            "tp": self.tensor,
            "pp": self.pipeline,
            "vpp": self.virtual_pipeline,
            "mbs": self.micro_batch_size,
            "gas": self.gradient_accumulation_steps,
        }
        for option, values in options.items():
            for value in values or ():
                require(value >= 1, f"--{option} must be at least 1, got {value}")


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
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(precision="bf16"))
    """The engine; its ZeRO stage and recomputation are what is searched."""
    fused_attention: bool = True
    """False: an attention that stores its scores."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "gpus"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A layout, or all layouts that share something, that cannot be run."""

    what: str
    """The part that decides, e.g. TP3 or a whole layout."""
    reason: str
    """One of a few sentences, to count by."""
    text: str
    """The numbers."""


def candidates(
    task: Task, search: Search, rejections: list[Rejection]
) -> Iterator[tuple[ParallelLayout, EngineConfig]]:
    """Layouts that fit the model and the batch, if not yet the memory, with engines that can run them; what cannot be run goes
    to `rejections`."""
    modes = _recompute_modes(task, search, rejections)
    for layout in _layouts(task, search, rejections):
        for engine in _engines(task, search, layout, modes, rejections):
            yield layout, engine


def _recompute_modes(task: Task, search: Search, rejections: list[Rejection]) -> Sequence[Recompute]:
    if search.recompute is not None:
        return search.recompute
    if not task.fused_attention:
        return ("none", "pointwise", "selective", "full")
    rejections.append(
        Rejection(
            what="recompute selective",
            reason="selective recomputation saves nothing",
            text="the fused attention keeps no scores: recomputing it costs time and saves no memory",
        )
    )
    return ("none", "pointwise", "full")


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
        elif search.sequence is not None and False not in search.sequence:
            text = "sequence parallelism splits along the tensor group: --sequence off, or --tp 2"
            rejections.append(Rejection(what="TP1+SP", reason="sequence parallelism needs TP > 1", text=text))


def _fits_model(task: Task, layout: ParallelLayout, what: str, reason: str, rejections: list[Rejection]) -> bool:
    try:
        layout.check_model(task.model)
    except LayoutError as error:
        rejections.append(Rejection(what=what, reason=reason, text=str(error)))
        return False
    return True


def _engines(
    task: Task, search: Search, layout: ParallelLayout, modes: Sequence[Recompute], rejections: list[Rejection]
) -> Iterator[EngineConfig]:
    """The task's engine with each ZeRO stage and recomputation that it can run this layout with."""
    base = task.engine
    known = (1, 0, 2, 3) if base.name == "deepspeed" else (1, 0)
    for stage in search.zero or (known if layout.data > 1 else (1,)):
        changes = {"zero_stage": stage} if base.name == "deepspeed" else {"distributed_optimizer": stage > 0}
        try:
            require(stage in known, f"--zero {stage}: Megatron-Core shards the optimizer state only, ZeRO-1")
            engines = [replace(base, recompute=mode, **changes) for mode in modes]
            check_engine(engines[0], layout)
        except LayoutError as error:
            reason = "the engine cannot run the layout"
            rejections.append(Rejection(what=f"{layout} ZeRO-{stage}", reason=reason, text=str(error)))
        except ConfigError as error:
            what = f"ZeRO-{stage} in {base.precision}"
            rejections.append(Rejection(what=what, reason="the engine has no such ZeRO stage", text=str(error)))
        else:
            yield from engines


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
