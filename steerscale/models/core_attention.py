"""Causal attention over this rank's heads: torch's, ours for CPUs, or another library's; `core_attention` says which.

Shapes: S sequence, B batch, H heads on this rank, G key/value heads on this rank, D head width, N documents in a micro-batch,
T = B S tokens.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from steerscale.accelerators import KernelChoice, Library
from steerscale.models import cpu_attention
from steerscale.models.block_config import kernels_of
from steerscale.parallel.megatron import TransformerConfig, te_layers, tensor_parallel


class CoreAttention(torch.nn.Module):
    """Causal attention over this rank's heads. No communication: heads are independent.

    forward(q_SBHD, k_SBGD, v_SBGD, mask) -> [S, B, H * D]. `mask` is None (plain causal) or a boolean
    [B, 1, S, S] where True means "may attend", causality included.

    A subclass says by `_takes` what its kernel can do, and does that by `_kernel`. Everything else, and whatever has a
    key/value cache, is torch's.
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
        if self.cache is None and self._takes(q_SBHD, attention_mask):
            return self._kernel(q_SBHD, k_SBGD, v_SBGD, attention_mask)
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

    def _takes(self, q_SBHD: torch.Tensor, mask: torch.Tensor | None) -> bool:
        return False

    def _kernel(self, q_SBHD: torch.Tensor, k_SBGD: torch.Tensor, v_SBGD: torch.Tensor, mask: Any) -> torch.Tensor:
        raise NotImplementedError

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


class NativeAttention(CoreAttention):
    """Plain causal attention by our own kernels, for float32 on a CPU."""

    def _takes(self, q_SBHD: torch.Tensor, mask: torch.Tensor | None) -> bool:
        return mask is None and cpu_attention.is_possible(q_SBHD)

    def _kernel(self, q_SBHD: torch.Tensor, k_SBGD: torch.Tensor, v_SBGD: torch.Tensor, mask: Any) -> torch.Tensor:
        return cpu_attention.causal_attention(q_SBHD, k_SBGD, v_SBGD).flatten(start_dim=2)


Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(q [T, H, D], k [T, G, D], v, begins int32 [N + 1], longest) -> [T, H, D]: causal attention within each sequence."""


class VarlenAttention(CoreAttention):
    """Causal attention within documents, by a kernel that takes where they begin instead of an S x S mask.

    `mask` may then be what `document_begins` gives, int32 [N + 1].
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, **unused: Any) -> None:
        super().__init__(config, layer_number, attn_mask_type)
        self._varlen = varlen(kernels_of(config).attention)

    def _takes(self, q_SBHD: torch.Tensor, mask: torch.Tensor | None) -> bool:
        return mask is not None and mask.ndim == 1

    def _kernel(self, q_SBHD: torch.Tensor, k_SBGD: torch.Tensor, v_SBGD: torch.Tensor, mask: Any) -> torch.Tensor:
        length, batch_size = q_SBHD.shape[:2]
        q_THD, k_TGD, v_TGD = (x.transpose(0, 1).flatten(end_dim=1).contiguous() for x in (q_SBHD, k_SBGD, v_SBGD))
        out_THD = self._varlen(q_THD, k_TGD, v_TGD, mask, length)
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

    Masks stay with torch: Transformer Engine has no fused kernel for an arbitrary one, and under the mask type "causal" it does
    not look at one that it is given.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, **others: Any) -> None:
        super().__init__(config, layer_number, attn_mask_type)
        self.fused = te_layers().TEDotProductAttention(
            config=config, layer_number=layer_number, attn_mask_type=attn_mask_type, **others
        )
        self._mask_type = attn_mask_type

    def _takes(self, q_SBHD: torch.Tensor, mask: torch.Tensor | None) -> bool:
        return mask is None

    def _kernel(self, q_SBHD: torch.Tensor, k_SBGD: torch.Tensor, v_SBGD: torch.Tensor, mask: Any) -> torch.Tensor:
        return self.fused(q_SBHD, k_SBGD, v_SBGD, None, attn_mask_type=self._mask_type)


def core_attention(kernels: KernelChoice) -> type[CoreAttention]:
    """The class that `kernels` stands for."""
    if kernels.varlen:
        return VarlenAttention
    return {"te": TEAttention, "native": NativeAttention}.get(kernels.attention or "torch", CoreAttention)
