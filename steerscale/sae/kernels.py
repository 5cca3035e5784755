"""The four sparse products, in torch operations that every device and type has.

sum_rows       out[b] = sum of v W[j]  over token b's entries       an embedding bag
sum_tokens     out[j] = sum of v y[b]  over latent j's entries      the same on the transpose
pair_products  out[e] = y[b] . W[j]    of each entry
sum_entries    out[j] = sum of v       over latent j's entries

v [nnz] values of the entries, y [B, d], W [N, d]
"""

import torch
import torch.nn.functional as F

from steerscale.parallel.select import Selection

CHUNK = 8192
"""Entries whose rows `pair_products` gathers at a time: 2 x 8192 x d numbers of scratch memory."""


def sum_rows(values: torch.Tensor, selection: Selection, W_ND: torch.Tensor) -> torch.Tensor:
    """[B, d] sum of the rows of W at each token's entries, weighted by `values` [nnz]."""
    return _bag(values, selection.latents, selection.offsets, W_ND)


def sum_tokens(values: torch.Tensor, selection: Selection, y_BD: torch.Tensor) -> torch.Tensor:
    """[N, d] sum of the rows of y at each latent's entries, weighted by `values` [nnz]; zeros for a latent without any."""
    transpose = selection.by_latent
    return _bag(values[transpose.order], transpose.tokens, transpose.offsets, y_BD)


def pair_products(y_BD: torch.Tensor, selection: Selection, W_ND: torch.Tensor) -> torch.Tensor:
    """[nnz] scalar products of the rows of y and W that meet in each entry."""
    out = torch.empty(selection.nnz, dtype=torch.promote_types(y_BD.dtype, torch.float32), device=y_BD.device)
    for start in range(0, selection.nnz, CHUNK):
        part = slice(start, start + CHUNK)
        rows, columns = y_BD[selection.tokens[part]], W_ND[selection.latents[part]]
        out[part] = torch.linalg.vecdot(rows.to(out.dtype), columns.to(out.dtype))
    return out


def sum_entries(values: torch.Tensor, selection: Selection) -> torch.Tensor:
    """[N] sum of `values` [nnz] over each latent's entries."""
    # Sorted by latent, each sum has a fixed order of terms also where threads or blocks share the work.
    transpose = selection.by_latent
    dtype = torch.promote_types(values.dtype, torch.float32)
    return _bag(
        values[transpose.order].to(dtype),
        torch.zeros_like(transpose.tokens),
        transpose.offsets,
        torch.ones(1, 1, dtype=dtype, device=values.device),
    ).squeeze(1)


def _bag(values: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    if not rows.numel():
        return source.new_zeros(offsets.numel() - 1, source.shape[1])
    return F.embedding_bag(
        rows, source, offsets, mode="sum", per_sample_weights=values.to(source.dtype), include_last_offset=True
    )
