"""Triton kernels of the sparse products, for CUDA; under TRITON_INTERPRET=1 they run on the CPU, slowly, for tests.

Inputs may be bfloat16, float16 or float32; sums are float32. One program owns one output: no atomics, the same bits each time.
Entries are taken in tiles, so that a latent active on every token costs its program hundreds of steps, not thousands.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from steerscale.parallel.select import Selection

TILE = 16
"""Entries a program looks at together."""
BLOCK_D = 256
"""Columns of a row that a program looks at together."""


@triton.jit
def _bag(
    values,
    order,
    rows,
    offsets,
    source,
    out,
    along,
    weight,
    d,
    HAS_ORDER: tl.constexpr,
    ADD: tl.constexpr,
    PROJECT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[p] (+)= sum over p's entries of v source[row] (- along[p] weight[p])."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = columns < d
    begin, end = tl.load(offsets + program), tl.load(offsets + program + 1)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(begin, end, TILE):
        entries = start + tl.arange(0, TILE)
        there = entries < end
        row = tl.load(rows + entries, mask=there, other=0)
        place = tl.load(order + entries, mask=there, other=0) if HAS_ORDER else entries
        value = tl.load(values + place, mask=there, other=0.0).to(tl.float32)
        mask = there[:, None] & in_row[None, :]
        part = tl.load(source + row[:, None] * d + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * part, axis=0)
    target = out + program * d + columns
    if PROJECT:
        own = tl.load(weight + program * d + columns, mask=in_row, other=0.0).to(tl.float32)
        total -= tl.load(along + program).to(tl.float32) * own
    if ADD:
        if begin < end:
            tl.store(target, tl.load(target, mask=in_row) + total, mask=in_row)
    else:
        tl.store(target, total, mask=in_row)


@triton.jit
def _pairs(y, weight, latents, offsets, out, d, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[e] = y[b] . weight[j] for the entries of token b, this program."""
    token = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    for start in range(begin, end, TILE):
        entries = start + tl.arange(0, TILE)
        there = entries < end
        latent = tl.load(latents + entries, mask=there, other=0)
        total = tl.zeros([TILE], dtype=tl.float32)
        for first in range(0, d, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            in_row = columns < d
            left = tl.load(y + token * d + columns, mask=in_row, other=0.0).to(tl.float32)
            mask = there[:, None] & in_row[None, :]
            right = tl.load(weight + latent[:, None] * d + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(left[None, :] * right, axis=1)
        tl.store(out + entries, total, mask=there)


def sum_rows(values: torch.Tensor, selection: Selection, W_ND: torch.Tensor) -> torch.Tensor:
    """[B, d] in W's type: `kernels.sum_rows`."""
    out = W_ND.new_empty(selection.num_tokens, W_ND.shape[1])
    _launch_bag(values, None, selection.latents, selection.offsets, W_ND, out)
    return out


def sum_tokens(
    values: torch.Tensor,
    selection: Selection,
    y_BD: torch.Tensor,
    *,
    dtype: torch.dtype,
    into: torch.Tensor | None,
    along: torch.Tensor | None = None,
    W_ND: torch.Tensor | None = None,
) -> torch.Tensor:
    """[N, d] in `dtype`, or added to `into`: `kernels.sum_tokens`, less `along` [N] times the rows of W where given."""
    transpose = selection.by_latent
    shape = (selection.num_latents, y_BD.shape[1])
    out = torch.empty(shape, dtype=dtype, device=y_BD.device) if into is None else into
    add = into is not None
    _launch_bag(
        values, transpose.order, transpose.tokens, transpose.offsets, y_BD, out, add=add, along=along, W_ND=W_ND
    )
    return out


def pair_products(y_BD: torch.Tensor, selection: Selection, W_ND: torch.Tensor) -> torch.Tensor:
    """[nnz] float32: `kernels.pair_products`."""
    y_BD, W_ND = y_BD.contiguous(), W_ND.contiguous()
    out = torch.empty(selection.nnz, dtype=torch.float32, device=y_BD.device)
    if selection.nnz:
        d = y_BD.shape[1]
        grid = (selection.num_tokens,)
        launch: Any = _pairs[grid]
        launch(y_BD, W_ND, selection.latents, selection.offsets, out, d, TILE=TILE, BLOCK_D=_columns(d))
    return out


def _launch_bag(
    values: torch.Tensor,
    order: torch.Tensor | None,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    source: torch.Tensor,
    out: torch.Tensor,
    *,
    add: bool = False,
    along: torch.Tensor | None = None,
    W_ND: torch.Tensor | None = None,
) -> None:
    values, source = values.contiguous(), source.contiguous()
    count, d = out.shape
    if not count:
        return
    block = _columns(d)
    # Arguments that a variant does not read still have to be tensors.
    launch: Any = _bag[(count, triton.cdiv(d, block))]
    launch(
        values,
        rows if order is None else order,
        rows,
        offsets,
        source,
        out,
        values if along is None else along,
        source if W_ND is None else W_ND.contiguous(),
        d,
        HAS_ORDER=order is not None,
        ADD=add,
        PROJECT=along is not None,
        TILE=TILE,
        BLOCK_D=block,
    )


def _columns(d: int) -> int:
    return min(BLOCK_D, triton.next_power_of_2(d))
