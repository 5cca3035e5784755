"""One pipeline stage's chunk of a GPT: embedding (first stage), transformer block, head and loss (last stage).

Shapes: B batch, S sequence, M d_model, V vocabulary; `_local` marks a tensor-parallel shard. Inside the block Megatron-Core
keeps activations as [S, B, M] ([S / TP, B, M] under sequence parallelism).

This module knows no degree of parallelism: Megatron-Core's layers do, and the groups they were given.
"""

import math
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

from steerscale.accelerators import TORCH, KernelChoice
from steerscale.models.block_config import BlockConfig
from steerscale.models.config import ModelConfig, Recompute
from steerscale.models.functions import cross_entropy
from steerscale.models.layer import ColumnLinear
from steerscale.models.layer_spec import block_spec
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.megatron import (
    LanguageModelEmbedding,
    LanguageModule,
    ModelType,
    TransformerBlock,
    TransformerConfig,
    tensor_parallel,
)


class GPT(LanguageModule):
    """A chunk of the decoder. `forward` returns hidden states, logits or per-token losses, depending on the stage.

    Args:
        model: the shape of the whole model.
        config: Megatron-Core's view of it, from `transformer_config`.
        context: where this process stands.
        chunk: virtual stage of this chunk (0 without interleaving).
    """

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, context: ParallelContext, *, chunk: int = 0
    ) -> None:
        super().__init__(config=config, pg_collection=context.groups)
        layout = context.layout
        self.model = model
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = chunk if layout.virtual_pipeline > 1 else None
        self.pre_process = context.is_first_stage and chunk == 0
        self.post_process = context.is_last_stage and chunk == layout.virtual_pipeline - 1
        self.share_embeddings_and_output_weights = model.tie_embeddings
        layers_per_chunk = model.num_layers // (layout.pipeline * layout.virtual_pipeline)
        self.first_layer = (chunk * layout.pipeline + context.at.pipeline) * layers_per_chunk
        if self.pre_process:
            # Megatron-Core names no device for learned positions: without this they would stay on the CPU.
            with context.device:
                self.embedding = LanguageModelEmbedding(
                    config=config,
                    vocab_size=model.padded_vocab,
                    max_sequence_length=model.seq_len,
                    position_embedding_type="learned_absolute" if model.position == "learned" else "rope",
                    tp_group=self.pg_collection.tp,
                )
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(config, layers_per_chunk),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=self.pg_collection,
            vp_stage=self.vp_stage,
        )
        if self.post_process:
            self.output_layer = ColumnLinear(
                model.d_model,
                model.padded_vocab,
                config=config,
                init_method=torch.nn.init.zeros_,  # never called: weights are drawn by `sharding`
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and model.tie_embeddings,
                tp_group=self.pg_collection.tp,
            )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        mark_tensor_parallel(self)

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None] | torch.Tensor | None) -> None:
        """Called by the pipeline schedules: hidden states received from the stage before, [S, B, M]."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.decoder.input_tensor = input_tensor

    def forward(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor | None = None,
        documents_BS: torch.Tensor | None = None,
        labels_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run this chunk.

        Args:
            tokens_BS: input tokens, int64.
            positions_BS: positions, for documents that restart at 0; None: 0 .. S-1.
            documents_BS: document numbers; attention stays within equal numbers. None: plain causal attention.
            labels_BS: next tokens, int64; on the last stage selects losses over logits.
        Returns:
            hidden states [S, B, M] before the last stage; on it losses [B, S] in float32 if labels are given, else
            logits [S, B, V_local] (padding columns at -inf).
        """
        hidden = None
        if self.pre_process:
            positions = positions_BS
            if positions is None:
                positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).unsqueeze(0)
            hidden = self.embedding(tokens_BS, positions)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None if documents_BS is None else document_mask(documents_BS),
            rotary_pos_emb=self._rotary(tokens_BS, positions_BS),
        )
        if not self.post_process:
            return hidden
        weight = self.shared_embedding_or_output_weight() if self.model.tie_embeddings else None
        logits, _ = self.output_layer(hidden, weight=weight)
        mask_padding(logits, self.model, self.pg_collection.tp)
        if labels_BS is None:
            return logits
        return losses_of(logits, labels_BS, self.pg_collection.tp)

    def _rotary(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None) -> torch.Tensor | None:
        if self.model.position != "rotary":
            return None
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).unsqueeze(0)
        return rotary_table(positions_BS, self.model.head_width, self.model.rope_theta, self.config.params_dtype)


def build_chunks(model: ModelConfig, config: TransformerConfig, context: ParallelContext) -> list[GPT]:
    """All chunks of this rank's stage, on its device, with weights still to be filled."""
    return [GPT(model, config, context, chunk=index) for index in range(context.layout.virtual_pipeline)]


def mask_padding(logits_SBV_local: torch.Tensor, model: ModelConfig, group: dist.ProcessGroup) -> None:
    """Set the logits of rows that pad the vocabulary to -inf, or losses would depend on the padding. `group`: tensor."""
    columns = logits_SBV_local.shape[-1]
    padding = group.rank() * columns + columns - model.tokens
    if padding > 0:
        logits_SBV_local[..., columns - min(padding, columns) :] = float("-inf")


def losses_of(logits_SBV_local: torch.Tensor, labels_BS: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Losses [B, S] in float32; the logits are used up (`functions.cross_entropy`). `group`: tensor."""
    return cross_entropy(logits_SBV_local, labels_BS.T.contiguous(), group).T.contiguous()


def mark_tensor_parallel(module: torch.nn.Module) -> None:
    """Record on each weight how it is cut: the gradient norm, checkpoints and `sharding` read it.

    Megatron-Core before 0.19 does so only while it draws the weights itself, which ours are not.
    """
    for layer in module.modules():
        dim = next((dim for kind, dim in _CUT_DIM.items() if isinstance(layer, kind)), None)
        weight = getattr(layer, "weight", None)
        if dim is not None and weight is not None:
            weight.tensor_model_parallel, weight.partition_dim = True, dim
            weight.partition_stride = getattr(layer, "stride", 1)


_CUT_DIM = {
    tensor_parallel.VocabParallelEmbedding: 0,
    tensor_parallel.ColumnParallelLinear: 0,
    tensor_parallel.RowParallelLinear: 1,
}


def rotary_table(positions_BS: torch.Tensor, head_width: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines [2, S, B, 1, D / 2] of position x theta^(-2i / D), computed in float32 (Su et al. 2021)."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions_BS.device) / head_width
    angles = positions_BS.T.unsqueeze(-1).float() * theta**-exponents
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(3).to(dtype)


def document_mask(documents_BS: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, S], True where query and key lie in one document and the key is not in the future.

    What `core_attention.document_begins` gave instead of numbers, int32 [N + 1], is left as it is: for a kernel that takes it.
    """
    if documents_BS.ndim == 1:
        return documents_BS
    same = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    return same.tril().unsqueeze(1)


def transformer_config(
    model: ModelConfig,
    context: ParallelContext,
    *,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    recompute: Recompute = "none",
    kernels: KernelChoice = TORCH,
    fp8: Literal["none", "hybrid", "e4m3"] = "none",
) -> BlockConfig:
    """Megatron-Core's configuration of `model` on the layout of `context`.

    Args:
        precision: "fp32", "bf16" or "fp16": parameters and activations.
        recompute: what the backward pass computes again.
        kernels: whose kernels the layers take.
        fp8: format of the linear layers' operands, for `kernels` with Transformer Engine's.
    """
    layout, on_cuda = context.layout, context.device.type == "cuda"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    interleaved = layout.virtual_pipeline > 1
    full = recompute == "full"
    return BlockConfig(
        kernels=kernels,
        fp8=None if fp8 == "none" else fp8,
        # Scales from the tensor at hand: no history of them would have to be in checkpoints for a resume to be exact.
        fp8_recipe="tensorwise",
        num_layers=model.num_layers,
        hidden_size=model.d_model,
        num_attention_heads=model.num_heads,
        num_query_groups=model.kv_groups,
        kv_channels=model.head_width,
        ffn_hidden_size=model.ffn_width,
        normalization="LayerNorm" if model.norm == "layernorm" else "RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=model.gated,
        activation_func=_ACTIVATIONS[model.activation],
        add_bias_linear=model.bias,
        add_qkv_bias=model.has_qkv_bias,
        hidden_dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        # Weights are drawn by `sharding.initialize_parameters`: equal for every layout, which Megatron-Core's are not.
        perform_initialization=False,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        sequence_parallel=layout.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        # Losses are summed over tokens and divided once by their number in the whole global batch: exact for any
        # split into micro-batches and replicas, masked tokens included.
        calculate_per_token_loss=True,
        recompute_pointwise=recompute == "pointwise",
        recompute_granularity=recompute if recompute in ("selective", "full") else None,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        # An output's memory is freed once it is on its way to the next stage. Overlapped gloo sends still read it
        # after the call returned (NCCL's are ordered by streams): freeing it there corrupts what arrives.
        deallocate_pipeline_outputs=on_cuda or not interleaved,
        # Batched p2p under the interleaved schedule with two stages matches sends in the wrong order: gradients are
        # silently wrong. Overlapped, unbatched p2p is right (and faster) for every number of stages.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Both are torch.compile'd upstream: worth it on a GPU, a compiler run for nothing on a CPU.
        bias_dropout_fusion=on_cuda,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "swiglu": F.silu}


def output_std(model: ModelConfig) -> float:
    """Standard deviation of the projections back into the residual stream (GPT-2: scaled by the number of sub-layers)."""
    return model.init_std / math.sqrt(2 * model.num_layers)
