"""What the layers of our GPT are made of: norms, linear layers, core attention and activation, torch's or another library's.

Shapes: S sequence, B batch, H heads on this rank, G key/value heads on this rank, D head width, N documents in a micro-batch,
T = B S tokens.

By themselves norm and attention are torch's: the norm works under sequence parallelism (Megatron-Core's torch norm refuses
it) and the attention calls `scaled_dot_product_attention`, so that fused kernels run on CPU and GPU alike without another
dependency. `BlockConfig.kernels` puts other libraries' kernels in their place (docs/kernels.md). Whichever they are, parameters
have the same names, shapes and attributes: checkpoints, imports and exports do not see the difference.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from steerscale.accelerators import TORCH, KernelChoice, Library
from steerscale.models.functions import rms_norm, swiglu
from steerscale.models.layer import ColumnLinear, Layer, LayerParts, RowLinear
from steerscale.parallel.megatron import (
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    te_layers,
    tensor_parallel,
)


@dataclass
class BlockConfig(TransformerConfig):
    """Megatron-Core's configuration and whose kernels the layers take."""

    kernels: KernelChoice = TORCH


def kernels_of(config: TransformerConfig) -> KernelChoice:
    """Whose kernels the layers of a model with `config` take."""
    return config.kernels if isinstance(config, BlockConfig) else TORCH


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
        mark_sequence_parallel(self, config)
        self._normalize = normalization(kernels_of(config).norm)

    def forward(self, x_SBM: torch.Tensor) -> torch.Tensor:
        return self._normalize(x_SBM, self.weight, self.bias, self.eps)


Normalization = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
"""(x, weight, bias or None, eps) -> x normalised over its last dimension: with a bias LayerNorm, without RMSNorm."""


@cache  # one function for all layers: torch.compile would take each for another
def normalization(library: Library | None) -> Normalization:
    """The function by which `Norm` normalises: torch's, Apex's or Liger's."""
    if library == "apex":
        apex = importlib.import_module("apex.normalization.fused_layer_norm")

        def by_apex(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
            if bias is None:
                return apex.fused_rms_norm_affine(x, weight, weight.shape, eps)
            return apex.fused_layer_norm_affine(x, weight, bias, weight.shape, eps)

        return by_apex
    if library == "liger":
        rms_norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        layer_norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction

        def by_liger(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
            if bias is None:
                # "gemma": all in fp32 until the end, as torch does. Not in place: the gradient may be someone else's too.
                return rms_norm.apply(x, weight, eps, 0.0, "gemma", False)
            return layer_norm.apply(x, weight, bias, eps)

        return by_liger
    return _by_torch


def _by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    if bias is None:
        return rms_norm(x, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class TENorm:
    """Transformer Engine's norm, with parameters as `Norm` has them. A class, since Megatron-Core calls no functions."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> Any:
        norm = te_layers().TENorm(config=config, hidden_size=hidden_size, eps=eps)
        mark_sequence_parallel(norm, config)
        return norm


def mark_sequence_parallel(norm: torch.nn.Module, config: TransformerConfig) -> None:
    """Say on a norm's parameters whether their gradients are partial sums (see `Norm`)."""
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


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
        if not q.is_cuda:
            # The CPU's kernel is a sixth faster, forward and backward, where a head's positions lie side by side.
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.shape[1] != k.shape[1],
        )


Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(q [T, H, D], k [T, G, D], v, begins int32 [N + 1], longest) -> [T, H, D]: causal attention within each sequence."""


class VarlenAttention(CoreAttention):
    """Causal attention within documents, by a kernel that takes where they begin instead of an S x S mask.

    `mask` may then be what `document_begins` gives, int32 [N + 1]; with any other it does as `CoreAttention` does.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, **unused: Any) -> None:
        super().__init__(config, layer_number, attn_mask_type)
        self._varlen = varlen(kernels_of(config).attention)

    def forward(
        self,
        q_SBHD: torch.Tensor,
        k_SBGD: torch.Tensor,
        v_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        if attention_mask is None or attention_mask.ndim != 1 or self.cache is not None:
            return super().forward(q_SBHD, k_SBGD, v_SBGD, attention_mask)
        length, batch_size = q_SBHD.shape[:2]
        q_THD, k_TGD, v_TGD = (x.transpose(0, 1).flatten(end_dim=1).contiguous() for x in (q_SBHD, k_SBGD, v_SBGD))
        out_THD = self._varlen(q_THD, k_TGD, v_TGD, attention_mask, length)
        return out_THD.unflatten(0, (batch_size, length)).transpose(0, 1).flatten(start_dim=2).contiguous()


@cache
def varlen(library: Library | None) -> Varlen:
    """The kernel of `VarlenAttention`: flash-attention's own, or torch's copy of it."""
    if library == "flash":
        flash = importlib.import_module("flash_attn").flash_attn_varlen_func
        return lambda q, k, v, begins, longest: flash(q, k, v, begins, begins, longest, longest, causal=True)
    torchs = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begins: torch.Tensor, longest: int) -> torch.Tensor:
        groups = q.shape[1] != k.shape[1]
        return torchs(q, k, v, begins, begins, longest, longest, window_size=(-1, 0), enable_gqa=groups)

    return by_torch


LEAST_BEGINS = 32
"""Shortest answer of `document_begins`."""


def document_begins(documents_BS: torch.Tensor) -> torch.Tensor:
    """Where documents begin in the rows laid end to end, and T at the end: int32 [N + 1], on the device of `documents_BS`.

    A row's beginning is one as well. N depends on the numbers themselves: on CUDA this would wait for the device, so give it
    documents that are still on the host. Empty documents at the end make N + 1 a power of two: compiled layers meet a few
    shapes, not a new one every time.
    """
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    begins_N = begins_BS.flatten().nonzero().squeeze(1)
    length = max(LEAST_BEGINS, 1 << len(begins_N).bit_length())
    return F.pad(begins_N, (0, length - len(begins_N)), value=documents_BS.numel()).to(torch.int32)


class TEAttention(CoreAttention):
    """Transformer Engine's attention where it is plainly causal.

    Masks and key/value caches stay with `CoreAttention`: Transformer Engine has no fused kernel for an arbitrary mask, and
    under the mask type "causal" it does not look at one that it is given.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, **others: Any) -> None:
        super().__init__(config, layer_number, attn_mask_type)
        self.fused = te_layers().TEDotProductAttention(
            config=config, layer_number=layer_number, attn_mask_type=attn_mask_type, **others
        )
        self._mask_type = attn_mask_type

    def forward(
        self,
        q_SBHD: torch.Tensor,
        k_SBGD: torch.Tensor,
        v_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        if attention_mask is not None or self.cache is not None:
            return super().forward(q_SBHD, k_SBGD, v_SBGD, attention_mask)
        return self.fused(q_SBHD, k_SBGD, v_SBGD, None, attn_mask_type=self._mask_type)


def liger_swiglu() -> Callable[[torch.Tensor], torch.Tensor]:
    """[..., gate and up] -> silu(gate) * up by Liger's kernel."""
    function = importlib.import_module("liger_kernel.ops.swiglu").LigerFusedGateUpSiLUMulFunction

    def by_liger(gate_up: torch.Tensor) -> torch.Tensor:
        # Flat: Liger's gradient comes back as a matrix whatever the shape was (0.8.5).
        return function.apply(gate_up.flatten(end_dim=-2)).unflatten(0, gate_up.shape[:-1])

    return by_liger


def layer_parts(kernels: KernelChoice) -> LayerParts:
    """The classes and functions that `kernels` stands for."""
    column: Callable[..., torch.nn.Module] = ColumnLinear
    row: Callable[..., torch.nn.Module] = RowLinear
    if kernels.linear == "te":
        te = te_layers()
        column, row = te.TEColumnParallelLinear, te.TERowParallelLinear
    return LayerParts(
        norm=TENorm if kernels.norm == "te" else Norm,
        column=column,
        row=row,
        core_attention=(
            VarlenAttention if kernels.varlen else TEAttention if kernels.attention == "te" else CoreAttention
        ),
        gated_activation=liger_swiglu() if kernels.activation == "liger" else swiglu,
    )


def block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """Specification of `num_layers` transformer layers (one model chunk) with the kernels that `config` names."""
    parts = layer_parts(kernels_of(config))
    layer = ModuleSpec(module=Layer, params={"parts": parts})
    norm: Any = parts.norm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
