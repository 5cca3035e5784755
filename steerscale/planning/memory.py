"""Estimated memory of one rank, and the exact number of parameters it holds.

States are the engine's (`planning.states`), activations Korthikanti et al. 2022 (arXiv 2205.05198), section 4, freed of
its assumptions (16-bit, f = 4h, g = a, dropout everywhere). What a device needs beside this (CUDA context, NCCL,
fragmentation) is in `planning.fit`.
"""

from dataclasses import dataclass

from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig, Recompute
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.hardware import Precision
from steerscale.planning.states import FP32_BYTES, WEIGHT_BYTES, model_states

GIB = 2**30
MASK_BYTES = 1
LOGIT_CHUNK = 2**27
"""Logits that are float32 at a time on a GPU (`models.functions.CHUNK_ELEMENTS`)."""

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
"""Fields of `MemoryEstimate` that add up to its total."""


@dataclass(frozen=True, kw_only=True)
class ShardParameters:
    """Parameters that one rank holds, by how they relate to those of other ranks."""

    split: int
    """Its part of matrices and biases that are split over the tensor group."""
    replicated: int
    """Norms, biases after row-parallel products and learned positions: the same on every tensor rank."""
    tied_copy: int
    """Its part of the last stage's own copy of the word embedding, where the head is tied and the stages differ."""

    @property
    def total(self) -> int:
        """All that the rank stores."""
        return self.split + self.replicated + self.tied_copy


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank at the fullest moment of an iteration."""

    weights: int
    """Parameters in the precision of the products."""
    gradients: int
    """Whole, or with ZeRO-2 and 3 this replica's part."""
    optimizer: int
    """Moments and main parameters; with ZeRO this replica's part; 0 if they are on the host."""
    activations: int
    """Kept for the backward passes of all micro-batches in flight."""
    logits: int
    """Of one micro-batch, on the last stage; their gradient takes their place."""
    buffers: int
    """Short-lived: gathered sequences, received boundaries, what a backward pass holds for a moment, DeepSpeed's buckets."""
    host: int = 0
    """Bytes in the host's memory, of an offloaded optimizer; not in the total."""

    @property
    def total(self) -> int:
        """All parts."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def total_gib(self) -> float:
        """All parts in GiB."""
        return self.total / GIB


def rank_parameters(model: ModelConfig, layout: ParallelLayout, rank: int) -> ShardParameters:
    """Exact parameters of a global rank by kind, padding rows of the vocabulary included.

    A stage holds L/p layers, in one chunk or several. Stage 0 adds the embeddings, the last stage the final norm and
    the head. Raises LayoutError if the layout does not fit the model or has no such rank.
    """
    layout.check_model(model)
    stage = layout.coordinates(rank).pipeline
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    layers, t = model.num_layers // layout.pipeline, layout.tensor
    split, replicated = (layers * count for count in _layer_parameters(model))
    vocabulary, tied_copy = model.padded_vocab * model.d_model, 0
    if is_first:
        split += vocabulary
        replicated += model.seq_len * model.d_model if model.position == "learned" else 0
    if is_last:
        replicated += _norm_parameters(model)
        if not model.tie_embeddings:
            split += vocabulary
        elif not is_first:
            tied_copy = vocabulary
    return ShardParameters(split=split // t, replicated=replicated, tied_copy=tied_copy // t)


def shard_parameters(model: ModelConfig, layout: ParallelLayout, rank: int) -> int:
    """Exact number of parameters that a global rank holds; see `rank_parameters`."""
    return rank_parameters(model, layout, rank).total


def unique_parameters(model: ModelConfig, layout: ParallelLayout) -> int:
    """Parameters over all ranks, whatever is held more than once counted once: `model.num_parameters()`."""
    total = 0
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        if place.data == 0:
            parameters = rank_parameters(model, layout, rank)
            total += parameters.split + (parameters.replicated if place.tensor == 0 else 0)
    return total


def estimate_memory(
    model: ModelConfig,
    layout: ParallelLayout,
    *,
    engine: EngineConfig,
    fused_attention: bool = True,
    stage: int | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a rank of pipeline stage `stage`; None: of the fullest stage.

    States are `states.model_states`: Megatron-Core's take 18 bytes a parameter in bf16 and 16 in fp32, of which its
    distributed optimizer divides 12 (8) by DP. Activations are `layer_activation_bytes` of L/(p v) layers for each chunk in
    flight, plus, under recomputation, what one layer rebuilds for its own backward pass.

    Args:
        model: with a known vocabulary.
        layout: must fit the model, or LayoutError is raised.
        engine: its precision, its recomputation, and what it shares out over the replicas.
        fused_attention: PyTorch's SDPA keeps no scores; False for an attention that stores them.
        stage: pipeline stage; LayoutError if there is none of this number.
    """
    precision = engine.precision
    modes: tuple[Recompute, Recompute] = (engine.recompute, "none")
    kept, whole = (
        layer_activation_bytes(model, layout, precision=precision, recompute=mode, fused_attention=fused_attention)
        for mode in modes
    )
    layers = model.num_layers // (layout.pipeline * layout.virtual_pipeline)
    logits = WEIGHT_BYTES[precision] * _tokens(model, layout) * model.padded_vocab // layout.tensor

    def on(index: int) -> MemoryEstimate:
        states = model_states(
            shard_parameters(model, layout, layout.tensor * layout.data * index),
            replicas=layout.data,
            engine=engine,
            accumulates=layout.gradient_accumulation_steps > 1,
            pipeline=layout.pipeline > 1,
        )
        outer = _outer_activation_bytes(model, layout, precision=precision, stage=index)
        activations = layers * chunks_in_flight(layout, index) * kept + (whole - kept) + outer
        stage_logits = logits if index == layout.pipeline - 1 else 0
        short_lived = buffer_bytes(model, layout, precision=precision, stage=index)
        if states.reduced_after:
            short_lived = max(short_lived, states.copies - activations - stage_logits)
        else:
            short_lived += states.copies
        return MemoryEstimate(
            weights=states.weights,
            gradients=states.gradients,
            optimizer=states.optimizer,
            activations=activations,
            logits=stage_logits,
            buffers=states.buckets + short_lived,
            host=states.host,
        )

    # The first stage has the embeddings and the most micro-batches in flight: only the last one can have more.
    stages = sorted({0, layout.pipeline - 1}) if stage is None else [stage]
    return max(map(on, stages), key=lambda estimate: estimate.total)


def buffer_bytes(model: ModelConfig, layout: ParallelLayout, *, precision: Precision, stage: int) -> int:
    """Bytes that a stage needs for a moment, on top of what it keeps.

    Under sequence parallelism the gathered sequence and the one being scattered, `s b h` each; between stages a received
    boundary and a received gradient. In a backward pass the gradients before and behind the widest product of a layer
    and that of its weight before it is accumulated; on the last stage, if that is more, `LOGIT_CHUNK` logits in fp32, in 16
    bits twice, or the head's weight gradient and its input's. What reducing gradients takes is in `states.model_states`.
    """
    unit, t, h = WEIGHT_BYTES[precision], layout.tensor, model.d_model
    width = unit * _tokens(model, layout) * h
    gathered = 2 * width if layout.sequence else 0
    received = 2 * width // (t if layout.sequence else 1) if layout.pipeline > 1 else 0
    widest = (2 if model.gated else 1) * model.ffn_width
    backward = unit * (2 * _tokens(model, layout) * widest + h * widest) // t
    if stage == layout.pipeline - 1:
        chunk = min(_tokens(model, layout) * model.padded_vocab // t, LOGIT_CHUNK)
        softmax = FP32_BYTES * chunk * (1 if precision == "fp32" else 2)
        head = unit * h * (model.padded_vocab // t + _tokens(model, layout))
        backward = max(backward, softmax, head)
    return gathered + received + backward


def chunks_in_flight(layout: ParallelLayout, stage: int) -> int:
    """Forward passes through a chunk of a stage whose backward passes are still to come, at most.

    1F1B: `min(m, p - i)`. Interleaved, Megatron's warm-up of `2 (p-i-1) + (v-1) p` chunks and the one after it, at most
    m v; at stage 0 that is `L (1 + (p-1)/(p v))` layers (arXiv 2205.05198, section 4.2.3).
    """
    p, v, m = layout.pipeline, layout.virtual_pipeline, layout.gradient_accumulation_steps
    if v == 1:
        return min(m, p - stage)
    return min(m * v, 2 * (p - stage - 1) + (v - 1) * p + 1)


def layer_activation_bytes(
    model: ModelConfig,
    layout: ParallelLayout,
    *,
    precision: Precision,
    recompute: Recompute,
    fused_attention: bool = True,
) -> int:
    """Bytes that one layer keeps of one micro-batch on one rank; with 16 bits, f = 4h, g = a and dropout the paper's
    `s b h (10 + 24/t + 5 a s/(h t))`, under sequence parallelism `(s b h/t) (34 + 5 a s/h)`, full: `2 s b h`.

    Along the residual stream (whole on each rank without sequence parallelism): inputs of two norms, of QKV and of the
    first MLP matrix, two dropout masks. Split: queries, keys, values, the attention's result; the first MLP product
    and the second's input, `4 f/h` of the 34, gated `6 f/h` as the fused SwiGLU rebuilds the rest. Scores, unless
    fused or selectively recomputed: softmax and, with dropout, its mask and its result. Pointwise: not the results of norms
    and activation function, which are the inputs of three matrices. The statistics of norms and softmax, below one part in
    a hundred, are left out.
    """
    tokens, unit, h = _tokens(model, layout), WEIGHT_BYTES[precision], model.d_model
    t, sequence = layout.tensor, layout.tensor if layout.sequence else 1
    if recompute == "full":
        return unit * tokens * h // sequence
    results = 0 if recompute == "pointwise" else 1
    residual = (2 + 2 * results) * unit * h + (2 * MASK_BYTES * h if model.dropout else 0)
    attention = 2 * unit * (model.num_heads + model.kv_groups) * model.head_width
    mlp = unit * ((2 if model.gated else 1) + results) * model.ffn_width
    scores = 0
    if recompute != "selective" and not fused_attention:
        each = 2 * unit + MASK_BYTES if model.attention_dropout else unit
        scores = each * model.num_heads * model.seq_len
    return tokens * residual // sequence + tokens * (attention + mlp + scores) // t


def _outer_activation_bytes(model: ModelConfig, layout: ParallelLayout, *, precision: Precision, stage: int) -> int:
    """Stage 0: the embedding's dropout masks, `s b h p`. Last stage: inputs of the final norm and head, `4 s b h`."""
    sequence = layout.tensor if layout.sequence else 1
    width = _tokens(model, layout) * model.d_model // sequence
    masks = min(layout.pipeline, layout.gradient_accumulation_steps) * MASK_BYTES * width
    return (masks if stage == 0 and model.dropout else 0) + (
        2 * WEIGHT_BYTES[precision] * width if stage == layout.pipeline - 1 else 0
    )


def _tokens(model: ModelConfig, layout: ParallelLayout) -> int:
    return layout.micro_batch_size * model.seq_len


def _layer_parameters(model: ModelConfig) -> tuple[int, int]:
    """Parameters of one layer that a tensor group splits, and those that each of its ranks repeats."""
    h, f, heads = model.d_model, model.ffn_width, model.num_heads * model.head_width
    qkv = heads + 2 * model.kv_groups * model.head_width
    up = 2 * f if model.gated else f
    split = h * qkv + heads * h + h * up + f * h
    split += (qkv if model.has_qkv_bias else 0) + (up if model.bias else 0)
    return split, 2 * _norm_parameters(model) + (2 * h if model.bias else 0)


def _norm_parameters(model: ModelConfig) -> int:
    return model.d_model if model.norm == "rmsnorm" else 2 * model.d_model
