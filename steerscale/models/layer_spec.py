"""The blocks of our GPT: Megatron-Core's transformer layer with a norm and a core attention of our own.

Shapes: S sequence, B batch, H heads on this rank, G key/value heads on this rank, D head width.

The norm works under sequence parallelism (Megatron-Core's torch norm refuses it) and the attention calls
`scaled_dot_product_attention`, so that fused kernels run on CPU and GPU alike without another dependency.
"""

from typing import Any

import torch
import torch.nn.functional as F

from steerscale.models.layer import ColumnLinear, Layer, LayerParts, RowLinear
from steerscale.parallel.megatron import (
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    tensor_parallel,
)


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension, as `config.normalization` says.

    Under sequence parallelism each rank normalises its own slice of the sequence, so the parameters' gradients are partial
    sums: the attribute `sequence_parallel` makes Megatron-Core all-reduce them over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        kwargs = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **kwargs))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, **kwargs))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBM: torch.Tensor) -> torch.Tensor:
        shape = (x_SBM.shape[-1],)
        if self.bias is None:
            return F.rms_norm(x_SBM, shape, self.weight, self.eps)
        return F.layer_norm(x_SBM, shape, self.weight, self.bias, self.eps)


class CoreAttention(torch.nn.Module):
    """Causal attention over this rank's heads. No communication: heads are independent.

    forward(q_SBHD, k_SBGD, v_SBGD, mask) -> [S, B, H * D]. `mask` is None (plain causal) or a boolean
    [B, 1, S, S] where True means "may attend", causality included.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, **unused: Any) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.sequence_parallel = config.sequence_parallel
        self.cache: Any = None
        """`models.kv_cache.LayerCache` while text is generated."""

    def forward(
        self,
        q_SBHD: torch.Tensor,
        k_SBGD: torch.Tensor,
        v_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHD, k_SBGD, v_SBGD))
        if self.cache is not None:
            k, v = self.cache.extend(k, v)
            attention_mask = self.cache.mask
        if self.dropout and self.training and not self.sequence_parallel:
            # Heads differ between tensor ranks, so must their dropout; the sequence-parallel block has forked already.
            with tensor_parallel.get_cuda_rng_tracker().fork():  # type: ignore[union-attr]
                out_BHSD = self._attend(q, k, v, attention_mask)
        else:
            out_BHSD = self._attend(q, k, v, attention_mask)
        return out_BHSD.permute(2, 0, 1, 3).flatten(start_dim=2)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.shape[1] != k.shape[1],
        )


TORCH_PARTS = LayerParts(norm=Norm, column=ColumnLinear, row=RowLinear, core_attention=CoreAttention)


def block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """Specification of `num_layers` transformer layers (one model chunk)."""
    norm: Any = TORCH_PARTS.norm
    layer = ModuleSpec(module=Layer, params={"parts": TORCH_PARTS})
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
