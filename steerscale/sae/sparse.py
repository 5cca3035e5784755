"""Sparse compute of an autoencoder: after the encoder's matrix product everything costs O(nnz d).

    pre    = x W_enc^T + b_enc                 dense product, outside autograd: `pre_activations`
    s      = selection of entries of pre       `steerscale.parallel.select`
    values = pre at s                          `selected_pre_activations`, differentiable with sparse products
    x_hat  = sum over entries of v W_dec[j]    `decode`

The derivatives touch the entries only: those by value are products of pairs of rows (d_v = d_x_hat[b] . W_dec[j]), those by
weight are sums over the entries of one latent (d_W_dec[j] = sum of v d_x_hat[b]), taken over entries sorted by latent. No
[B, N] gradient exists. Weights are latent-major, [N, d]: a latent's row is contiguous in weight and gradient.

    B tokens, d width, N latents of this shard, nnz entries of the selection
"""

from typing import Any

import torch

from steerscale.parallel.select import Selection
from steerscale.sae import kernels


@torch.no_grad()
def pre_activations(x_BD: torch.Tensor, W_enc_ND: torch.Tensor, b_enc_N: torch.Tensor | None = None) -> torch.Tensor:
    """[B, N] pre-activations to select from; outside autograd, so that no dense gradient can arise."""
    return torch.nn.functional.linear(x_BD, W_enc_ND, b_enc_N)


def selected_pre_activations(
    pre_BN: torch.Tensor,
    selection: Selection,
    *,
    x_BD: torch.Tensor,
    W_enc_ND: torch.Tensor,
    b_enc_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """[nnz] pre-activations at the entries of `selection`, differentiable by x, W_enc and b_enc.

    Args:
        pre_BN: `pre_activations` of the other arguments; only read.
    The gradient of x is that through this shard's latents alone: a tensor group has to sum it.
    """
    return _Encode.apply(x_BD, W_enc_ND, b_enc_N, pre_BN, selection)


def decode(
    values: torch.Tensor, selection: Selection, W_dec_ND: torch.Tensor, *, project: bool = False
) -> torch.Tensor:
    """[B, d] sums of this shard's decoder rows, weighted by `values` [nnz]; differentiable by values and W_dec.

    The sums of a tensor group's shards add up to the reconstruction (without b_dec).

    Args:
        project: take from each row of W_dec's gradient its component along that row: the gradient for a decoder kept at unit
            norm. Rows must have norm 1. Costs O(nnz) beside a pass over the rows, since d_W_dec[j] . W_dec[j] = sum of v d_v.
    """
    return _Decode.apply(values, W_dec_ND, selection, project)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: torch.Tensor,
        W_enc_ND: torch.Tensor,
        b_enc_N: torch.Tensor | None,
        pre_BN: torch.Tensor,
        selection: Selection,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_BD, W_enc_ND)
        ctx.selection = selection
        ctx.bias_dtype = None if b_enc_N is None else b_enc_N.dtype
        return selection.gather(pre_BN)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_values,) = grads
        x_BD, W_enc_ND = ctx.saved_tensors
        selection: Selection = ctx.selection
        d_x = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_x = kernels.sum_rows(d_values, selection, W_enc_ND).to(x_BD.dtype)
        if ctx.needs_input_grad[1]:
            d_W = kernels.sum_tokens(d_values, selection, x_BD).to(W_enc_ND.dtype)
        if ctx.needs_input_grad[2]:
            d_b = kernels.sum_entries(d_values, selection).to(ctx.bias_dtype)
        return d_x, d_W, d_b, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, W_dec_ND: torch.Tensor, selection: Selection, project: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(values, W_dec_ND)
        ctx.selection, ctx.project = selection, project
        return kernels.sum_rows(values, selection, W_dec_ND)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_out_BD,) = grads
        values, W_dec_ND = ctx.saved_tensors
        selection: Selection = ctx.selection
        d_values = kernels.pair_products(d_out_BD, selection, W_dec_ND)
        d_W = None
        if ctx.needs_input_grad[1]:
            d_W = kernels.sum_tokens(values, selection, d_out_BD)
            if ctx.project:
                along = kernels.sum_entries(values * d_values, selection)
                d_W.addcmul_(W_dec_ND.to(d_W.dtype), along[:, None].to(d_W.dtype), value=-1)
            d_W = d_W.to(W_dec_ND.dtype)
        return d_values.to(values.dtype), d_W, None, None
