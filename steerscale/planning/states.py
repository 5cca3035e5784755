"""Bytes that an engine holds for a rank's parameters: weights, gradients, optimizer state, and its own buffers.

Megatron-Core: its mixed precision and its distributed optimizer. DeepSpeed 0.19: read off its optimizers (stage_1_and_2.py,
stage3.py, bf16_optimizer.py) and compared with what its engines hold (tests/planning/test_states_ranks.py). ZeRO is
Rajbhandari et al. 2020 (arXiv 1910.02054).
"""

from dataclasses import dataclass

from steerscale.engines.config import EngineConfig
from steerscale.planning.hardware import Precision

FP32_BYTES = 4
WEIGHT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
MOMENTS_BYTES = 8
"""Adam's two moments, fp32."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's `reduce_bucket_size`, unless the rank has fewer parameters (`engines.deepspeed_config`)."""
LIVE_ELEMENTS = 1_000_000_000
"""ZeRO-3 keeps gathered parameters up to this number (`stage3_max_live_parameters`, `stage3_max_reuse_distance`)."""


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes on one rank."""

    weights: int
    """Parameters in the precision of the products, with ZeRO-3 its part of them and what is gathered."""
    gradients: int
    """When the last backward pass of a step ends."""
    optimizer: int
    """Moments and main parameters."""
    buckets: int
    """Where gradients are collected to be reduced."""
    copies: int
    """Of a bucket, while it is reduced."""
    reduced_after: bool
    """Whether that is when the last backward pass has ended, and nothing is kept for one."""
    host: int
    """In the host's memory: an offloaded optimizer, and its gradients."""


def model_states(
    parameters: int, *, replicas: int, engine: EngineConfig, accumulates: bool = True, pipeline: bool = False
) -> ModelStates:
    """What the engine holds for `parameters` of a rank.

    Left out: padding to equal parts, and that DeepSpeed keeps the gradient of a parameter whole where the border between two
    replicas' parts runs through it.

    Args:
        replicas: ranks that share these parameters out, as the engine's ZeRO stage says.
        accumulates: several micro-batches a step.
        pipeline: there are several stages.
    """
    part = parameters // replicas
    if engine.name == "megatron":
        return _megatron(parameters, part if engine.zero else parameters, engine.precision)
    if engine.zero == 3:
        return _zero_3(parameters, part, engine)
    if engine.zero == 2:
        return _zero_2(parameters, part, engine, accumulates=accumulates)
    if engine.zero == 1:
        return _zero_1(parameters, part, engine, accumulates=accumulates, pipeline=pipeline)
    return ModelStates(
        weights=FP32_BYTES * parameters,
        gradients=FP32_BYTES * parameters,
        optimizer=MOMENTS_BYTES * parameters,
        buckets=0,
        copies=FP32_BYTES * bucket_elements(parameters),
        reduced_after=True,
        host=0,
    )


def bucket_elements(parameters: int) -> int:
    """Elements of a bucket in which DeepSpeed reduces the gradients of a rank with so many parameters."""
    return min(parameters, BUCKET_ELEMENTS)


def reduction_bytes(precision: Precision) -> int:
    """Bytes of a gradient on its way between replicas: fp32, but for DeepSpeed's fp16."""
    return 2 if precision == "fp16" else FP32_BYTES


def _megatron(parameters: int, owned: int, precision: Precision) -> ModelStates:
    """Gradients accumulate in fp32, whole; they are reduced and parameters gathered in place: no buffer of their own."""
    main = FP32_BYTES if precision != "fp32" else 0
    return ModelStates(
        weights=WEIGHT_BYTES[precision] * parameters,
        gradients=FP32_BYTES * parameters,
        optimizer=(MOMENTS_BYTES + main) * owned,
        buckets=0,
        copies=0,
        reduced_after=True,
        host=0,
    )


def _zero_1(parameters: int, part: int, engine: EngineConfig, *, accumulates: bool, pipeline: bool) -> ModelStates:
    """Main parameters exist beside the weights in fp32 too.

    Gradients stay whole until the last micro-batch, in bf16 those added up in fp32; they are moved to a bucket to be reduced
    (two of them where that overlaps with the backward pass). With a pipeline a bucket more than is used is there when the
    reduced part is copied from it. In bf16 without offload another optimizer does it, whose bucket is a copy. Offload
    takes the reduced part to the host.
    """
    unit, bucket = WEIGHT_BYTES[engine.precision], bucket_elements(parameters)
    held = FP32_BYTES if engine.precision == "bf16" else unit
    copied = engine.precision == "bf16" and not engine.offload_optimizer
    buckets = 0 if copied else 2 if engine.overlap and not pipeline else 1
    gradients = held * (parameters + (part if pipeline and not copied else 0))
    optimizer = (FP32_BYTES + MOMENTS_BYTES) * part
    host = optimizer + _offloaded(part, engine, accumulates=accumulates) if engine.offload_optimizer else 0
    return ModelStates(
        weights=unit * parameters,
        gradients=gradients,
        optimizer=0 if host else optimizer,
        buckets=buckets * held * bucket,
        copies=held * bucket if copied else 0,
        reduced_after=True,
        host=host,
    )


def _zero_2(parameters: int, part: int, engine: EngineConfig, *, accumulates: bool) -> ModelStates:
    """Each micro-batch's gradients go to a bucket, are reduced, and added to the rank's part.

    In bf16 that part is fp32 and stays on the device; otherwise it has the gradients' precision, twice while a micro-batch's
    is added to the earlier ones', and on the host if the optimizer is there. Reducing takes a copy of the bucket.
    """
    unit, bucket = WEIGHT_BYTES[engine.precision], bucket_elements(parameters)
    optimizer, host = (FP32_BYTES + MOMENTS_BYTES) * part, 0
    gradients = FP32_BYTES * part if engine.precision == "bf16" else (2 if accumulates else 1) * unit * part
    if engine.offload_optimizer:
        host = optimizer + _offloaded(part, engine, accumulates=accumulates)
        gradients = gradients if engine.precision == "bf16" else 0
    return ModelStates(
        weights=unit * parameters,
        gradients=gradients,
        optimizer=0 if host else optimizer,
        buckets=(2 if engine.overlap else 1) * unit * bucket,
        copies=reduction_bytes(engine.precision) * bucket,
        reduced_after=bucket == parameters,
        host=host,
    )


def _offloaded(part: int, engine: EngineConfig, *, accumulates: bool) -> int:
    """Beside main parameters and moments: fp32 gradients, updated weights on their way back, and where gradients do not stay on
    the device, those of the micro-batches so far."""
    unit = WEIGHT_BYTES[engine.precision]
    kept = unit if accumulates and engine.precision != "bf16" else 0
    return (FP32_BYTES + unit + kept) * part


def _zero_3(parameters: int, part: int, engine: EngineConfig) -> ModelStates:
    """A part of each parameter, and parameters gathered: all of them, of a rank with fewer than `LIVE_ELEMENTS`.

    Gradients are reduced in a bucket that is always there, by way of a copy.
    """
    unit, precision = WEIGHT_BYTES[engine.precision], engine.precision
    optimizer = (FP32_BYTES + MOMENTS_BYTES) * part
    gradients = reduction_bytes(precision) * part
    offload, bucket = engine.offload_optimizer, reduction_bytes(precision) * bucket_elements(parameters)
    return ModelStates(
        weights=unit * (part + min(parameters, LIVE_ELEMENTS)),
        gradients=0 if offload else gradients,
        optimizer=0 if offload else optimizer,
        buckets=bucket,
        copies=bucket,
        reduced_after=parameters <= BUCKET_ELEMENTS,
        host=optimizer + gradients + FP32_BYTES * part if offload else 0,
    )
