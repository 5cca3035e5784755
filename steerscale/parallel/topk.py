"""The largest values of rows on one device, in the exact order of `select.py`, without sorting whole rows.

A row is cut into blocks. The k best values lie in the k blocks with the best (maximum, then position): an element of another
block is beaten by one element of each of these. So one pass over the rows finds the maxima, and the rest looks at k blocks.
"""

import torch

from steerscale import native

BLOCK = 64
"""Largest block: one pass reads everything, k blocks are then read again."""


def ordered_keys(values: torch.Tensor) -> torch.Tensor:
    """int32 that compare as the values do (float32 or narrower): NaN above +inf, -0 equal to +0."""
    if values.dtype == torch.float64:
        raise TypeError("pre-activations to select from must be float32, bfloat16 or float16, not float64")
    values = values.float()
    bits = torch.where(values.isnan(), torch.nan, values + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def key_values(keys: torch.Tensor) -> torch.Tensor:
    """The float32 values of `ordered_keys`."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def block_maxima(values_BN: torch.Tensor) -> torch.Tensor:
    """[B, N / width] maxima of blocks of the largest power of two that divides N, 64 at most."""
    rows, latents = values_BN.shape
    width = min(BLOCK, latents & -latents) if latents else 1
    return values_BN.reshape(rows, latents // width, width).amax(dim=-1)


@torch.no_grad()
def top_rows(values_BN: torch.Tensor, k: int) -> torch.Tensor:
    """[B, k] int64: each row's k best, the best first: larger value, then lower index. Needs k <= N."""
    if values_BN.dtype == torch.float64:
        return values_BN.sort(dim=1, descending=True, stable=True).indices[:, :k]
    rows, latents = values_BN.shape
    if rows == 0 or k == 0:
        return torch.empty(rows, k, dtype=torch.int64, device=values_BN.device)
    if values_BN.device.type == "cpu" and (library := native.library()):
        values = values_BN.float().contiguous()
        best = torch.empty(rows, k, dtype=torch.int64)
        library.top_rows(values.data_ptr(), rows, latents, k, best.data_ptr(), torch.get_num_threads())
        return best
    maxima = block_maxima(values_BN)
    blocks = maxima.shape[1]
    width = latents // max(blocks, 1)
    if k >= blocks:
        return _best(ordered_keys(values_BN), torch.arange(latents, device=values_BN.device), k)
    chosen = _best(ordered_keys(maxima), torch.arange(blocks, device=values_BN.device), k)
    flat = chosen + blocks * torch.arange(rows, device=chosen.device)[:, None]
    within = torch.arange(width, device=chosen.device)
    candidates = values_BN.reshape(-1, width)[flat.reshape(-1)].reshape(rows, k * width)
    positions = (chosen[:, :, None] * width + within).reshape(rows, k * width)
    return _best(ordered_keys(candidates), positions, k)


def _best(keys: torch.Tensor, positions: torch.Tensor, k: int) -> torch.Tensor:
    """[B, k] positions of the k best by (key descending, position ascending); `positions` broadcasts to `keys`."""
    # Key and position in one integer: no two are equal, so an unstable top-k has one answer.
    joint = (keys.long() << 32) | (0xFFFFFFFF - positions)
    return 0xFFFFFFFF - (joint.topk(k, dim=1).values & 0xFFFFFFFF)
