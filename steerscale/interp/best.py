"""The best few of many candidates in many groups, kept while candidates stream by.

Shapes: N candidates, G groups, K kept of a group, W = 2 width + 1 tokens of a window, B sequences, S sequence, J latents.
"""

from typing import NamedTuple

import torch


class Contexts(NamedTuple):
    """Places in a text, K in each of G groups, the best first."""

    value_GK: torch.Tensor
    """Of the latent at the place, float32; -inf where there are fewer than K."""
    position_GK: torch.Tensor
    """row * S + place in the sequence, int64; -1 where there is none."""
    window_GKW: torch.Tensor
    """The latent's values around the place, bfloat16; 0 beyond the sequence's ends."""


class Best:
    """Keeps the K candidates with the highest scores of each group; of equal ones those that came first."""

    def __init__(self, num_groups: int, num_kept: int, width: int, device: torch.device) -> None:
        self._kept, self._width = num_kept, width
        shape = (num_groups, num_kept)
        self._score_GK = torch.full(shape, float("-inf"), device=device)
        self._value_GK = torch.full(shape, float("-inf"), device=device)
        self._position_GK = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._window_GKW = torch.zeros(*shape, 2 * width + 1, dtype=torch.bfloat16, device=device)

    def offer(
        self,
        group_N: torch.Tensor,
        score_N: torch.Tensor,
        values_BSJ: torch.Tensor,
        row_N: torch.Tensor,
        at_N: torch.Tensor,
        latent_N: torch.Tensor,
        *,
        first_row: int,
    ) -> None:
        """Candidates are entries (row, at, latent) of `values_BSJ`, whose rows begin at the text's `first_row`; in the
        text's order within a group."""
        if self._kept == 0:
            return
        may_N = (score_N > self._score_GK[group_N, -1]).nonzero().squeeze(-1)
        order_N = may_N[score_N[may_N].argsort(descending=True, stable=True)]
        order_N = order_N[group_N[order_N].argsort(stable=True)]
        if not len(order_N):
            return
        groups_U, inverse_N, counts_U = group_N[order_N].unique_consecutive(return_inverse=True, return_counts=True)
        rank_N = torch.arange(len(order_N), device=order_N.device) - (counts_U.cumsum(0) - counts_U)[inverse_N]
        kept_N = rank_N < self._kept
        order_N, where = order_N[kept_N], (inverse_N[kept_N], self._kept + rank_N[kept_N])
        row_N, at_N, latent_N = row_N[order_N], at_N[order_N], latent_N[order_N]
        fresh = (
            score_N[order_N],
            values_BSJ[row_N, at_N, latent_N],
            (row_N + first_row) * values_BSJ.shape[1] + at_N,
            self._windows(values_BSJ, row_N, at_N, latent_N),
        )
        # Beside what was kept, which comes first among equals; then the best of both.
        both = [torch.cat([old[groups_U], torch.empty_like(old[groups_U])], dim=1) for old in self._state()]
        both[0][:, self._kept :] = float("-inf")
        for old, new in zip(both, fresh):
            old[where] = new.to(old.dtype)
        best_UK = both[0].argsort(dim=1, descending=True, stable=True)[:, : self._kept]
        for state, candidates in zip(self._state(), both):
            index = best_UK if candidates.dim() == 2 else best_UK.unsqueeze(-1).expand(-1, -1, candidates.shape[-1])
            state[groups_U] = candidates.gather(1, index)

    def contexts(self) -> Contexts:
        """What is kept."""
        return Contexts(self._value_GK, self._position_GK, self._window_GKW)

    def _state(self) -> tuple[torch.Tensor, ...]:
        return self._score_GK, self._value_GK, self._position_GK, self._window_GKW

    def _windows(
        self, values_BSJ: torch.Tensor, row_N: torch.Tensor, at_N: torch.Tensor, latent_N: torch.Tensor
    ) -> torch.Tensor:
        offsets_W = torch.arange(-self._width, self._width + 1, device=at_N.device)
        at_NW = at_N.unsqueeze(-1) + offsets_W
        inside_NW = (at_NW >= 0) & (at_NW < values_BSJ.shape[1])
        at_NW = at_NW.clamp(0, values_BSJ.shape[1] - 1)
        found_NW = values_BSJ[row_N.unsqueeze(-1), at_NW, latent_N.unsqueeze(-1)]
        return torch.where(inside_NW, found_NW, 0).to(torch.bfloat16)


def scatter_hash(one_N: torch.Tensor, other_N: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1), float32, that looks drawn by chance and depends on two integers alone.

    A finalizer in the manner of MurmurHash3's, in 31 bits so that products stay within int64.
    """
    mixed = (one_N * 73_856_093) ^ (other_N * 19_349_663)
    for factor in (0x45D9F3B, 0x119DE1F3):
        mixed = mixed & 0x7FFFFFFF
        mixed = ((mixed >> 16) ^ mixed) * factor
    mixed = mixed & 0x7FFFFFFF
    return ((mixed >> 7) & 0xFFFFFF).float() / 2**24
