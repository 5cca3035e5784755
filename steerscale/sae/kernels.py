"""The sparse products of `sparse.py`, each by the fastest means the device has.

    sum_rows          out[b] = sum of v W[j]  over token b's entries       an embedding bag
    sum_tokens        out[j] = sum of v y[b]  over latent j's entries      the same on the transpose
    sum_entries       out[j] = sum of v       over latent j's entries
    pair_products     out[e] = y[b] . W[j]    of each entry
    decode_gradients  pair_products(y, W) and sum_tokens(v, y) in one pass

    v [nnz] values of the entries, y [B, d], W [N, d]

float32 on the CPU: kernels compiled from C++. CUDA: Triton. Everything else, and where those are missing: torch operations.
Sums over a latent's entries are taken in the order of tokens: repeated on the same device, they give the same bits.
"""

import functools
import importlib.util
import logging
from ctypes import CDLL
from types import ModuleType

import torch
import torch.nn.functional as F

from steerscale import native
from steerscale.parallel.select import Selection

logger = logging.getLogger(__name__)


def sum_rows(values: torch.Tensor, selection: Selection, W_ND: torch.Tensor) -> torch.Tensor:
    """[B, d] sum of the rows of W at each token's entries, weighted by `values` [nnz]."""
    if kernels := _triton(values, W_ND):
        return kernels.sum_rows(values, selection, W_ND)
    return _bag(values, selection.latents, selection.offsets, W_ND)


def sum_tokens(
    values: torch.Tensor,
    selection: Selection,
    y_BD: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """[N, d] sum of the rows of y at each latent's entries, weighted by `values` [nnz]; zeros for a latent without any.

    In `dtype`: that of the weight whose gradient this is (default: y's). Added to `into` where given, which is returned then.
    """
    transpose = selection.by_latent
    dtype = dtype or y_BD.dtype
    if kernels := _triton(values, y_BD):
        return kernels.sum_tokens(values, selection, y_BD, dtype=dtype, into=into)
    values, y_BD = values.to(dtype), y_BD.to(dtype)
    if library := _library(values, y_BD, into):
        out = _output(selection, y_BD, into)
        values, y_BD = values.contiguous(), y_BD.contiguous()
        library.sum_tokens(
            transpose.offsets.data_ptr(),
            transpose.tokens.data_ptr(),
            transpose.order.data_ptr(),
            values.data_ptr(),
            y_BD.data_ptr(),
            *out.shape,
            out.data_ptr(),
            into is not None,
            torch.get_num_threads(),
        )
        return out
    out = _bag(values[transpose.order], transpose.tokens, transpose.offsets, y_BD)
    return out if into is None else into.add_(out)


def sum_entries(values: torch.Tensor, selection: Selection) -> torch.Tensor:
    """[N] sum of `values` [nnz] over each latent's entries, in float32 at least."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    if values.device.type == "cpu":
        return torch.zeros(selection.num_latents, dtype=dtype).index_add_(0, selection.latents, values.to(dtype))
    # index_add_ on CUDA adds in an order that changes from run to run.
    transpose = selection.by_latent
    return _bag(
        values[transpose.order].to(dtype),
        torch.zeros_like(transpose.tokens),
        transpose.offsets,
        torch.ones(1, 1, dtype=dtype, device=values.device),
    ).squeeze(1)


def pair_products(y_BD: torch.Tensor, selection: Selection, W_ND: torch.Tensor) -> torch.Tensor:
    """[nnz] scalar products of the rows of y and W that meet in each entry."""
    if kernels := _triton(y_BD, W_ND):
        return kernels.pair_products(y_BD, selection, W_ND)
    # The derivative of an embedding bag by its weights, which torch has without gathering nnz rows of either side.
    weights = torch.zeros(selection.nnz, dtype=W_ND.dtype, device=W_ND.device, requires_grad=True)
    with torch.enable_grad():
        out = _bag(weights, selection.latents, selection.offsets, W_ND.detach())
    if not selection.nnz:
        return weights.detach()
    return torch.autograd.grad(out, weights, y_BD.to(W_ND.dtype))[0]


def decode_gradients(
    y_BD: torch.Tensor,
    values: torch.Tensor,
    selection: Selection,
    W_ND: torch.Tensor,
    *,
    project: bool,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([nnz] scalar products of the rows of y and W that meet in each entry, `sum_tokens` of values and y).

    With `project`, each row of the sums loses its component along W's, which has norm 1.
    """
    if library := _library(values, y_BD, into, W_ND):
        transpose = selection.by_latent
        out = _output(selection, y_BD, into)
        values, y_BD, W_ND = values.contiguous(), y_BD.contiguous(), W_ND.contiguous()
        d_values = torch.empty_like(values)
        library.decode_gradients(
            transpose.offsets.data_ptr(),
            transpose.tokens.data_ptr(),
            transpose.order.data_ptr(),
            values.data_ptr(),
            y_BD.data_ptr(),
            W_ND.data_ptr(),
            *out.shape,
            d_values.data_ptr(),
            out.data_ptr(),
            into is not None,
            project,
            torch.get_num_threads(),
        )
        return d_values, out
    d_values = pair_products(y_BD, selection, W_ND)
    # d_W[j] . W[j] = sum of v (y[b] . W[j]): the products are known already.
    along = sum_entries(values * d_values, selection) if project else None
    if kernels := _triton(values, y_BD, W_ND):
        out = kernels.sum_tokens(values, selection, y_BD, dtype=W_ND.dtype, into=into, along=along, W_ND=W_ND)
        return d_values, out
    out = sum_tokens(values, selection, y_BD, dtype=W_ND.dtype, into=into)
    if along is not None:
        out.addcmul_(W_ND.to(out.dtype), along[:, None].to(out.dtype), value=-1)
    return d_values, out


def _bag(values: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    if not rows.numel():
        return source.new_zeros(offsets.numel() - 1, source.shape[1])
    return F.embedding_bag(
        rows, source, offsets, mode="sum", per_sample_weights=values.to(source.dtype), include_last_offset=True
    )


def _library(values: torch.Tensor, y_BD: torch.Tensor, into: torch.Tensor | None, *others: torch.Tensor) -> CDLL | None:
    """The compiled kernels if they can work on these tensors: float32 on the CPU."""
    if into is not None and not into.is_contiguous():
        return None
    tensors = (values, y_BD, *others, *([] if into is None else [into]))
    on_cpu = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return native.library() if on_cpu else None


def _triton(*tensors: torch.Tensor) -> ModuleType | None:
    """The Triton kernels if they can work on these tensors: on CUDA, not float64."""
    if all(tensor.is_cuda and tensor.dtype != torch.float64 for tensor in tensors):
        return _load_triton()
    return None


@functools.cache
def _load_triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        logger.warning("Triton is not installed, torch operations are used instead (slower): pip install triton")
        return None
    from steerscale.sae import kernels_triton

    return kernels_triton


def _output(selection: Selection, y_BD: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    return y_BD.new_empty(selection.num_latents, y_BD.shape[1]) if into is None else into
