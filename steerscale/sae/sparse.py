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

from steerscale.parallel.main_grad import GradientTarget
from steerscale.parallel.select import Selection
from steerscale.sae import kernels


@torch.no_grad()
def pre_activations(
    x_BD: torch.Tensor, W_enc_ND: torch.Tensor, b_enc_N: torch.Tensor | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, N] pre-activations to select from; outside autograd, so that no dense gradient can arise.

    Args:
        out: where to write them. On the CPU a buffer kept from step to step saves a tenth of the product's time, which goes
            into handing out fresh pages otherwise.
    """
    if out is None:
        return torch.nn.functional.linear(x_BD, W_enc_ND, b_enc_N)
    if b_enc_N is None:
        return torch.mm(x_BD, W_enc_ND.t(), out=out)
    return torch.addmm(b_enc_N, x_BD, W_enc_ND.t(), out=out)


def selected_pre_activations(
    pre_BN: torch.Tensor,
    selection: Selection,
    *,
    x_BD: torch.Tensor,
    W_enc_ND: torch.Tensor,
    b_enc_N: torch.Tensor | None = None,
    into_main_grad: bool = False,
) -> torch.Tensor:
    """[nnz] pre-activations at the entries of `selection`, differentiable by x, W_enc and b_enc.

    Args:
        pre_BN: `pre_activations` of the other arguments; only read.
        into_main_grad: as in `decode`, for W_enc.
    The gradient of x is that through this shard's latents alone: a tensor group has to sum it.
    """
    return _Encode.apply(x_BD, W_enc_ND, b_enc_N, pre_BN, selection, into_main_grad)


def decode(
    values: torch.Tensor,
    selection: Selection,
    W_dec_ND: torch.Tensor,
    *,
    project: bool = False,
    into_main_grad: bool = False,
) -> torch.Tensor:
    """[B, d] sums of this shard's decoder rows, weighted by `values` [nnz]; differentiable by values and W_dec.

    The sums of a tensor group's shards add up to the reconstruction (without b_dec).

    Args:
        project: take from each row of W_dec's gradient its component along that row: the gradient for a decoder kept at unit
            norm. Rows must have norm 1. Costs next to nothing, since d_W_dec[j] . W_dec[j] = sum of v d_v.
        into_main_grad: add the gradient of W_dec straight to its `main_grad`, where Megatron-Core's DDP has given it one: no
            [N, d] gradient is written, cleared and added. The parameter itself has to be given, and no other use of it may
            have a gradient that does not go this way: it would be dropped.
    """
    return _Decode.apply(values, W_dec_ND, selection, project, into_main_grad)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: torch.Tensor,
        W_enc_ND: torch.Tensor,
        b_enc_N: torch.Tensor | None,
        pre_BN: torch.Tensor,
        selection: Selection,
        into_main_grad: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_BD, W_enc_ND)
        ctx.selection, ctx.target = selection, GradientTarget(W_enc_ND, into_main_grad)
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
            d_W = ctx.target.done(
                kernels.sum_tokens(d_values, selection, x_BD, dtype=W_enc_ND.dtype, into=ctx.target.buffer)
            )
        if ctx.needs_input_grad[2]:
            d_b = kernels.sum_entries(d_values, selection).to(ctx.bias_dtype)
        return d_x, d_W, d_b, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        W_dec_ND: torch.Tensor,
        selection: Selection,
        project: bool,
        into_main_grad: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(values, W_dec_ND)
        ctx.selection, ctx.project, ctx.target = selection, project, GradientTarget(W_dec_ND, into_main_grad)
        return kernels.sum_rows(values, selection, W_dec_ND)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_out_BD,) = grads
        values, W_dec_ND = ctx.saved_tensors
        selection: Selection = ctx.selection
        if not ctx.needs_input_grad[1]:
            return kernels.pair_products(d_out_BD, selection, W_dec_ND).to(values.dtype), None, None, None, None
        d_values, d_W = kernels.decode_gradients(
            d_out_BD, values, selection, W_dec_ND, project=ctx.project, into=ctx.target.buffer
        )
        return d_values.to(values.dtype), ctx.target.done(d_W), None, None, None
