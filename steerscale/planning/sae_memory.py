"""Estimated memory of a rank that streams a frozen language model, trains SAEs on it, or both. Bytes by part.

Left out, as in `planning.memory`: the CUDA context, NCCL's buffers and fragmentation (`planning.fit`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.hardware import Precision
from steerscale.planning.memory import shard_parameters
from steerscale.planning.states import FP32_BYTES, WEIGHT_BYTES, model_states


@dataclass(frozen=True, kw_only=True)
class SAEShape:
    """What the memory of an SAE depends on."""

    d_in: int
    d_out: int
    width: int

    @property
    def parameters(self) -> int:
        """Encoder, decoder, both biases."""
        return self.width * (self.d_in + self.d_out + 1) + self.d_out


def frozen_model_bytes(
    model: ModelConfig, layout: ParallelLayout, *, precision: Precision, sequences: int, stage: int
) -> dict[str, int]:
    """Of a stage's rank: weights; and the fullest moment of a forward pass of `sequences` sequences without gradients.

    That is a block (residual, norm, attention's or the MLP's inner width twice) or, in evaluations on the last stage, logits
    in fp32.
    """
    tokens, size = sequences * model.seq_len, WEIGHT_BYTES[precision]
    inner = 2 * model.ffn_width * (2 if model.activation == "swiglu" else 1) // layout.tensor
    block = tokens * (4 * model.d_model + inner) * size
    logits = tokens * model.padded_vocab // layout.tensor * FP32_BYTES if stage == layout.pipeline - 1 else 0
    rank = layout.tensor * layout.data * stage
    return {"model": shard_parameters(model, layout, rank) * size, "passes": max(block, logits)}


def sae_bytes(
    saes: Sequence[SAEShape],
    layout: ParallelLayout,
    *,
    engine: EngineConfig,
    averaged: bool,
    buffer_bytes: int,
) -> dict[str, int]:
    """Of a rank that holds its shard of these SAEs: states in fp32, its part of the buffer, a micro-batch's latents.

    Args:
        engine: what it shares out over the replicas.
        averaged: an average of the weights is kept as well.
        buffer_bytes: of the shuffle buffer of all ranks together.
    """
    held = sum(sae.parameters for sae in saes) // layout.tensor
    # Parameters are float32 whatever the products are computed in, and nothing overlaps.
    states = model_states(
        held,
        replicas=layout.data,
        engine=replace(engine, precision="fp32", overlap=False),
        accumulates=layout.gradient_accumulation_steps > 1,
    )
    latents = max((sae.width for sae in saes), default=0) // layout.tensor
    return {
        "SAEs": states.weights + (held * FP32_BYTES if averaged else 0),
        "gradients": states.gradients + states.buckets + states.copies,
        "optimizer": states.optimizer,
        "latents": 2 * layout.micro_batch_size * latents * FP32_BYTES,
        "buffer": buffer_bytes // (layout.tensor * layout.data),
    }
