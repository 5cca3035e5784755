"""Predicted time of one iteration: compute, memory traffic, bubble and communication, each by its formula.

Symbols as in `planning.flops` and docs/planning.md; t, p, v, d: tensor, pipeline, virtual pipeline and data-parallel
degrees, m micro-batches a step, b micro-batch size. P peak, W memory bandwidth, N link bandwidth, each times the share
of it that is reached (`machine.Efficiency`). Sources: Narayanan et al. 2021 (SC21, arXiv 2104.04473) for schedules and
communication volumes; Korthikanti et al. 2022 (arXiv 2205.05198) for sequence parallelism and recomputation.

Every matrix product costs its FLOPs and, on top, its memory traffic: that is what makes narrow models, large tensor
groups and small micro-batches less efficient, without a constant for each. Everything else is memory traffic, or
traffic on a link. Left out: loading data, logging, checkpoints, stragglers, and the congestion of shared networks.
"""

from dataclasses import dataclass, fields

from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig, Recompute
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.flops import forward_flops_per_token
from steerscale.planning.hardware import Precision
from steerscale.planning.machine import Machine, group_bandwidth
from steerscale.planning.memory import MASK_BYTES, shard_parameters
from steerscale.planning.states import FP32_BYTES, WEIGHT_BYTES, reduction_bytes

FUSED_ATTENTION_BACKWARD = 2.5
"""Products of a fused attention's backward pass to those of its forward pass: the scores are computed again."""
LOGIT_BYTES = 40
"""Memory traffic of a logit in cross-entropy, forward and backward: casts, maximum, exponential, sum, gradient, fp32."""
ACCUMULATION_BYTES = 8
"""Traffic of a parameter in each backward pass: its fp32 gradient is read and written."""
OPTIMIZER_TRAFFIC = 42
"""Traffic of a parameter in the optimizer step, by the rank that updates it: norm and clipping (12), AdamW in fp32 (28:
gradient, main parameter and both moments read, the latter three written), the new 16-bit weight (2)."""


@dataclass(frozen=True, kw_only=True)
class IterationTime:
    """Seconds of one iteration on the critical path, by what they are spent on."""

    matmul: float
    """Matrix products and attention of the slowest stage, recomputation included."""
    memory_traffic: float
    """Norms, activation functions, stored scores, cross-entropy and gradient accumulation of that stage."""
    tensor_communication: float
    """Collectives of its tensor group."""
    pipeline_communication: float
    """Sending activations and gradients between stages."""
    bubble: float
    """The slowest stage waits while the pipeline fills and drains."""
    data_communication: float
    """Reducing gradients and gathering parameters over the replicas, as far as nothing hides it."""
    optimizer: float
    """Clipping and AdamW."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(getattr(self, spec.name) for spec in fields(self))


@dataclass(frozen=True)
class _Pass:
    """Seconds of one pass through something."""

    matmul: float
    traffic: float
    communication: float = 0.0

    @property
    def total(self) -> float:
        return self.matmul + self.traffic + self.communication

    def __add__(self, other: "_Pass") -> "_Pass":
        return _Pass(
            self.matmul + other.matmul,
            self.traffic + other.traffic,
            self.communication + other.communication,
        )

    def times(self, factor: float) -> "_Pass":
        return _Pass(self.matmul * factor, self.traffic * factor, self.communication * factor)


def predict_iteration(
    model: ModelConfig,
    layout: ParallelLayout,
    machine: Machine,
    *,
    engine: EngineConfig,
    fused_attention: bool = True,
    split_boundaries: bool = False,
) -> IterationTime:
    """Seconds of one iteration of `layout.global_batch_size` sequences.

    Args:
        model: with a known vocabulary.
        layout: must fit the model; not checked again.
        engine: its precision must be the one that `machine.peak_tflops` is for. With `overlap`, on machines that can, gradient
            reduction runs beside the last backward pass, parameter gathering beside the first forward pass, and the
            interleaved schedule's sends beside computation; of DeepSpeed's see `_deepspeed_data_parallel`.
        fused_attention: PyTorch's SDPA; False for an attention that stores its scores and computes the masked half.
        split_boundaries: tensor ranks send a part of the boundary each and gather it (SC21, section 4.1), as Megatron-LM
            did; Megatron-Core does so under sequence parallelism only.
    """
    precision, overlap = engine.precision, engine.overlap and machine.overlaps
    forward, backward = _layer(model, layout, machine, precision, engine.recompute, fused_attention)
    p, v, m = layout.pipeline, layout.virtual_pipeline, layout.gradient_accumulation_steps
    layers = model.num_layers // p
    last = shard_parameters(model, layout, layout.world_size - 1)
    first = shard_parameters(model, layout, 0) if p > 1 else last
    accumulation = _Pass(0.0, ACCUMULATION_BYTES / _bytes_per_second(machine))
    inner = (forward + backward).times(layers)
    tail = inner + accumulation.times(last) + _head(model, layout, machine, precision)
    head = inner + accumulation.times(first) + _embedding(model, layout, machine, precision) if p > 1 else tail
    slowest = max(head, tail, key=lambda stage: stage.total)
    others = inner.total * max(p - 2, 0) + min(head.total, tail.total) if p > 1 else 0.0
    boundary = _boundary(model, layout, machine, precision, split_boundaries) if p > 1 else 0.0
    # Each micro-batch goes forward and backward through each chunk: two exchanges. Beside computation they cost their start.
    sends = 2 * m * v * (machine.efficiency.collective_seconds if v > 1 and overlap else boundary) if p > 1 else 0.0
    hidden = (forward.times(layers / v).total, backward.times(layers / v).total) if overlap else (0.0, 0.0)
    held = max(first, last)
    data_parallel = _deepspeed_data_parallel if engine.name == "deepspeed" else _data_parallel
    return IterationTime(
        matmul=m * slowest.matmul,
        memory_traffic=m * slowest.traffic,
        tensor_communication=m * slowest.communication,
        pipeline_communication=sends,
        bubble=others / v + (2 * boundary * (p - 1) if p > 1 else 0.0),
        data_communication=data_parallel(layout, machine, engine, held, hidden),
        optimizer=_optimizer(layout, machine, held, engine),
    )


def _layer(
    model: ModelConfig,
    layout: ParallelLayout,
    machine: Machine,
    precision: Precision,
    recompute: Recompute,
    fused_attention: bool,
) -> tuple[_Pass, _Pass]:
    """Forward and backward (recomputation included) of one layer on one micro-batch."""
    tokens, t, unit = layout.micro_batch_size * model.seq_len, layout.tensor, WEIGHT_BYTES[precision]
    flops = forward_flops_per_token(model, vocab_size=0)
    efficiency, layers = machine.efficiency, model.num_layers
    products = _product(
        machine,
        flops=tokens * flops.matrices / layers / t,
        moved=unit * (flops.matrices / layers / 2 + tokens * _product_width(model, t)) / t,
    )
    attention_seconds = tokens * flops.attention / layers / t / (machine.peak_tflops * 1e12)
    scores = 0.0
    if fused_attention:
        attention = attention_seconds / efficiency.attention
    else:
        attention = 2 * attention_seconds / efficiency.matmul
        # Written, read and written by the softmax, with dropout once more and its mask, read by the product.
        each = 4 * unit + (2 * unit + 2 * MASK_BYTES if model.attention_dropout else 0)
        scores = tokens * each * model.num_heads * model.seq_len / t / _bytes_per_second(machine)
    core = _Pass(attention, scores)
    around = _Pass(0.0, _elementwise(model, layout, precision) * tokens / _bytes_per_second(machine))
    fixed = _Pass(0.0, efficiency.layer_seconds)
    sequence = unit * tokens * model.d_model
    # Two all-reduces, or under sequence parallelism two all-gathers and two reduce-scatters: the same volume.
    collectives = _Pass(0.0, 0.0, 2 * _ring(machine, sequence, size=t, stride=1, passes=2))
    forward = products + core + around + fixed + collectives
    core_backward = core.times(FUSED_ATTENTION_BACKWARD if fused_attention else 2)
    backward = (products + around + fixed).times(2) + core_backward + collectives
    if recompute == "full":
        backward += forward
    elif recompute == "selective":
        backward += core
    elif recompute == "pointwise":
        backward += _Pass(0.0, _pointwise(model, layout, precision) * tokens / _bytes_per_second(machine))
    return forward, backward


def _product_width(model: ModelConfig, t: int) -> float:
    """Elements a token that a layer's four products read and write, times t: the residual stream is whole on each rank."""
    heads, groups = model.num_heads * model.head_width, 2 * model.kv_groups * model.head_width
    return 4 * model.d_model * t + 2 * heads + groups + (3 if model.gated else 2) * model.ffn_width


def _elementwise(model: ModelConfig, layout: ParallelLayout, precision: Precision) -> float:
    """Bytes a token that a layer's forward pass moves outside of products and core attention.

    Beside `_pointwise`: along the residual stream two additions of bias and residual (read both, write, with dropout its
    mask); split over the tensor group rotating queries and keys.
    """
    unit, t, sequence = WEIGHT_BYTES[precision], layout.tensor, layout.tensor if layout.sequence else 1
    residual = (6 * unit + (2 * MASK_BYTES if model.dropout else 0)) * model.d_model
    rotated = model.num_heads + model.kv_groups if model.position == "rotary" else 0
    return _pointwise(model, layout, precision) + residual / sequence + 2 * unit * rotated * model.head_width / t


def _pointwise(model: ModelConfig, layout: ParallelLayout, precision: Precision) -> float:
    """Bytes a token that two norms and, split over the tensor group, the activation function read and write."""
    unit, t, sequence = WEIGHT_BYTES[precision], layout.tensor, layout.tensor if layout.sequence else 1
    return 4 * unit * model.d_model / sequence + (3 if model.gated else 2) * unit * model.ffn_width / t


def _head(model: ModelConfig, layout: ParallelLayout, machine: Machine, precision: Precision) -> _Pass:
    """Output head and loss, forward and backward, of one micro-batch."""
    tokens, t, unit = layout.micro_batch_size * model.seq_len, layout.tensor, WEIGHT_BYTES[precision]
    vocabulary, h = model.padded_vocab, model.d_model
    product = _product(
        machine,
        flops=tokens * forward_flops_per_token(model, vocab_size=vocabulary).logits / t,
        moved=unit * (vocabulary * h / t + tokens * (h + vocabulary / t)),
    )
    loss = _Pass(0.0, LOGIT_BYTES * tokens * vocabulary / t / _bytes_per_second(machine))
    return product.times(3) + loss + _embedding(model, layout, machine, precision)


def _embedding(model: ModelConfig, layout: ParallelLayout, machine: Machine, precision: Precision) -> _Pass:
    """The tensor group's all-reduce behind the embedding, or that of the gradient behind the head."""
    size = WEIGHT_BYTES[precision] * layout.micro_batch_size * model.seq_len * model.d_model
    return _Pass(0.0, 0.0, _ring(machine, size, size=layout.tensor, stride=1, passes=2))


def _boundary(
    model: ModelConfig, layout: ParallelLayout, machine: Machine, precision: Precision, split_boundaries: bool
) -> float:
    """Sending one micro-batch's hidden states, `s b h`, to the next stage: the slowest of the boundaries."""
    size = WEIGHT_BYTES[precision] * layout.micro_batch_size * model.seq_len * model.d_model
    if layout.sequence or split_boundaries:
        size /= layout.tensor
    near = layout.world_size <= machine.gpus_per_node
    bandwidth = machine.intra_node_gb_per_second if near else machine.inter_node_gb_per_second
    return machine.efficiency.collective_seconds + size / (bandwidth * 1e9 * machine.efficiency.network)


def _data_parallel(
    layout: ParallelLayout, machine: Machine, engine: EngineConfig, parameters: int, hidden: tuple[float, float]
) -> float:
    """Gradients (fp32) reduced, and with the distributed optimizer parameters gathered, less what is hidden.

    Args:
        hidden: seconds of the forward and of the backward pass beside which gathering and reducing run.
    """
    size, stride = layout.data, layout.tensor
    forward, backward = hidden
    if not engine.zero:
        reduced = _ring(machine, FP32_BYTES * parameters, size=size, stride=stride, passes=2)
        return max(reduced - backward, 0.0)
    scattered = _ring(machine, FP32_BYTES * parameters, size=size, stride=stride, passes=1)
    gathered = _ring(machine, WEIGHT_BYTES[engine.precision] * parameters, size=size, stride=stride, passes=1)
    return max(scattered - backward, 0.0) + max(gathered - forward, 0.0)


def _deepspeed_data_parallel(
    layout: ParallelLayout, machine: Machine, engine: EngineConfig, parameters: int, hidden: tuple[float, float]
) -> float:
    """As `_data_parallel`, of DeepSpeed.

    ZeRO-0 to 2 all-reduce gradients, so with the gathered parameters they move 3 N where the paper's ZeRO moves 2 N;
    ZeRO-2 does it for each micro-batch. ZeRO-3 gathers parameters in each micro-batch's forward and backward pass and
    reduce-scatters its gradients: 3 N a micro-batch (arXiv 1910.02054, section 7.2.2). Beside computation run: with ZeRO-3 all
    of it, with ZeRO-1 and 2 the reduction, unless there are several stages or it is ZeRO-1 in bf16.
    """
    size, stride, m = layout.data, layout.tensor, layout.gradient_accumulation_steps
    forward, backward = hidden
    reduction = reduction_bytes(engine.precision) * parameters
    gathered = _ring(machine, WEIGHT_BYTES[engine.precision] * parameters, size=size, stride=stride, passes=1)
    if engine.zero == 3:
        scattered = _ring(machine, reduction, size=size, stride=stride, passes=1)
        return m * (max(gathered - forward, 0.0) + max(gathered + scattered - backward, 0.0))
    reduced = _ring(machine, reduction, size=size, stride=stride, passes=2)
    if engine.zero == 2:
        return m * max(reduced - backward, 0.0) + gathered
    overlaps = engine.zero == 1 and engine.precision != "bf16" and layout.pipeline == 1
    return max(reduced - (backward if overlaps else 0.0), 0.0) + (gathered if engine.zero else 0.0)


def _optimizer(layout: ParallelLayout, machine: Machine, parameters: int, engine: EngineConfig) -> float:
    """AdamW on this rank's share, gradients zeroed. An optimizer on the host is not timed: that is its CPU's to say."""
    owned = 0.0 if engine.offload_optimizer else parameters / (layout.data if engine.zero else 1)
    return (OPTIMIZER_TRAFFIC * owned + FP32_BYTES * parameters) / _bytes_per_second(machine)


def _product(machine: Machine, *, flops: float, moved: float) -> _Pass:
    """A matrix product: its FLOPs, and on top its memory traffic of `moved` bytes."""
    seconds = flops / (machine.peak_tflops * 1e12 * machine.efficiency.matmul)
    return _Pass(seconds + moved / _bytes_per_second(machine), 0.0)


def _ring(machine: Machine, size_bytes: float, *, size: int, stride: int, passes: int) -> float:
    """A ring collective: `passes` (all-reduce 2, else 1) times `(size-1)/size` of the bytes over the slowest link."""
    if size == 1:
        return 0.0
    bandwidth = group_bandwidth(machine, size=size, stride=stride) * 1e9 * machine.efficiency.network
    return machine.efficiency.collective_seconds + passes * (size - 1) / size * size_bytes / bandwidth


def _bytes_per_second(machine: Machine) -> float:
    return machine.bandwidth_gb_per_second * 1e9 * machine.efficiency.memory
