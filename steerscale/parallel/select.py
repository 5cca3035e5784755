"""Exact selection of the largest latents when the latents are sharded over ranks.

One order holds everywhere: larger value first, then the lower global latent (tensor rank, then local index; for a whole
batch: token first, token = data rank, then local row). Ties, which bf16 makes the rule rather than the exception, are cut by
that order, so the number selected is exact and what is selected does not depend on the layout. A NaN counts as larger than
+inf and is selected: the loss shows it, and no host sync has to look for it. -0 equals +0.

    P tensor ranks, B tokens (rows) of this replica, N latents of this shard, k selected; nnz entries selected here
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from steerscale import native
from steerscale.parallel.topk import block_maxima, key_values, ordered_keys, top_rows

BINS = 2048
"""Bins of one round of radix selection: three rounds see all 32 bits."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which latents of this shard are active for each token, as a sparse matrix in CSR form; O(nnz) memory.

    Serves TopK, BatchTopK and thresholds alike: rows may have any number of entries, none included. The values belonging to
    the entries are separate tensors of shape [nnz], so that several (pre-activations, activations, gradients) share a pattern.
    """

    offsets: torch.Tensor
    """[B + 1] int64: row b's entries are offsets[b] to offsets[b + 1]."""
    latents: torch.Tensor
    """[nnz] int64: local latent of each entry, by token, ascending within one."""
    num_latents: int
    """N, latents of this shard."""

    @property
    def num_tokens(self) -> int:
        """B."""
        return self.offsets.numel() - 1

    @property
    def nnz(self) -> int:
        """Number of entries on this rank."""
        return self.latents.numel()

    @cached_property
    def counts(self) -> torch.Tensor:
        """[B] int64: entries of each token, L0 of this shard."""
        return self.offsets.diff()

    @cached_property
    def tokens(self) -> torch.Tensor:
        """[nnz] int64: token of each entry."""
        rows = torch.arange(self.num_tokens, device=self.latents.device)
        return torch.repeat_interleave(rows, self.counts, output_size=self.nnz)

    @cached_property
    def by_latent(self) -> "ByLatent":
        """The same entries sorted by latent, tokens ascending within one."""
        latents, order = torch.sort(self.latents, stable=True)
        bounds = torch.arange(self.num_latents + 1, device=latents.device)
        return ByLatent(offsets=torch.searchsorted(latents, bounds), tokens=self.tokens[order], order=order)

    def gather(self, values_BN: torch.Tensor) -> torch.Tensor:
        """[nnz] entries of a dense [B, N] tensor; differentiable, with a dense gradient."""
        return values_BN[self.tokens, self.latents]

    def dense(self, values: torch.Tensor) -> torch.Tensor:
        """[B, N] tensor with `values` [nnz] at the entries (repeated ones added) and zeros elsewhere; differentiable."""
        empty = values.new_zeros(self.num_tokens, self.num_latents)
        return empty.index_put((self.tokens, self.latents), values, accumulate=True)

    def row_sums(self, values: torch.Tensor) -> torch.Tensor:
        """[B] sums of `values` [nnz] over each token's entries; differentiable."""
        return values.new_zeros(self.num_tokens).index_add(0, self.tokens, values)

    def keep(self, mask: torch.Tensor) -> "Selection":
        """The entries where `mask` [nnz] holds; take `values[mask]` alongside. One host sync."""
        kept = torch.zeros_like(self.offsets)
        torch.cumsum(torch.zeros_like(self.counts).index_add_(0, self.tokens, mask.long()), 0, out=kept[1:])
        return Selection(offsets=kept, latents=self.latents[mask], num_latents=self.num_latents)


@dataclass(frozen=True, kw_only=True)
class ByLatent:
    """Entries of a `Selection` sorted by latent: the transpose, in CSR form."""

    offsets: torch.Tensor
    """[N + 1] int64: latent j's entries are offsets[j] to offsets[j + 1]."""
    tokens: torch.Tensor
    """[nnz] int64: token of each entry."""
    order: torch.Tensor
    """[nnz] int64: where the entry stands in the `Selection`."""


@torch.no_grad()
def select_where(mask_BN: torch.Tensor) -> Selection:
    """Entries where the mask holds: ReLU (`pre > 0`), JumpReLU (`pre > threshold`), Gated. Local; one host sync."""
    if mask_BN.device.type == "cpu" and (library := native.library()):
        mask_BN, (rows, columns) = mask_BN.contiguous(), mask_BN.shape
        offsets = torch.zeros(rows + 1, dtype=torch.int64)
        library.count_rows(mask_BN.data_ptr(), rows, columns, offsets.data_ptr(), torch.get_num_threads())
        offsets = offsets.cumsum(0)
        latents = torch.empty(int(offsets[-1]), dtype=torch.int64)
        library.find_rows(
            mask_BN.data_ptr(), rows, columns, offsets.data_ptr(), latents.data_ptr(), torch.get_num_threads()
        )
        return Selection(offsets=offsets, latents=latents, num_latents=columns)
    tokens, latents = mask_BN.nonzero(as_tuple=True)
    return _from_tokens(tokens, latents, mask_BN.shape)


@torch.no_grad()
def topk_across(values_BN: torch.Tensor, k: int, group: dist.ProcessGroup | None = None) -> Selection:
    """The k largest latents of each token over all shards of `group`; min(k, all latents) a token, ties included.

    Negative values are selected as any others where too few are positive: a ReLU after the selection makes them zero, as in
    OpenAI's and SAELens's TopK.

    Each rank offers its m best, see `offered_by_rank`; rank r decides for B/P tokens and answers with the number that each
    rank may keep. Only where a rank's offer is used up, and the rank has more, is the row decided again from k offers.
    Sent by a rank: 2 all-to-alls, of B m (P-1)/P values and B (P-1)/P int32 counts.

    Args:
        values_BN: pre-activations of this rank's latents, any floating type; tokens are the same on all ranks of the group.
        k: latents a token, over all shards.
        group: the ranks holding the shards, in order of their latents, each with the same N; None: one process.
    """
    latents = values_BN.shape[1]
    ranks = 1 if group is None else dist.get_world_size(group)
    if group is None or ranks == 1:
        return _from_rows(top_rows(values_BN, min(k, latents)), latents)
    offered = min(offered_by_rank(k, ranks), latents)
    best = top_rows(values_BN, offered)
    counts = _agree(values_BN.gather(1, best), k, more=offered < min(k, latents), group=group)
    undecided = (counts < 0).nonzero().squeeze(1)  # the same rows on every rank of the group
    if not undecided.numel():
        return _from_prefixes(best, counts, latents)
    again = top_rows(values_BN[undecided], min(k, latents))
    counts[undecided] = _agree(values_BN[undecided].gather(1, again), k, more=False, group=group)
    best = torch.nn.functional.pad(best, (0, again.shape[1] - offered))
    best[undecided] = again
    return _from_prefixes(best, counts, latents)


def offered_by_rank(k: int, ranks: int) -> int:
    """Candidates that each of P ranks offers for k places: three standard deviations above its expected k/P, at most k.

    Were they spread at random, about one row in twenty would have to be decided again.
    """
    return min(k, math.ceil(k / ranks + 3 * math.sqrt(k / ranks)))


def _agree(offers_BM: torch.Tensor, k: int, *, more: bool, group: dist.ProcessGroup) -> torch.Tensor:
    """[B] int64: how many of its sorted offers this rank keeps for each token; -1 where its group has to offer more.

    With `more`, ranks have further candidates behind an offer that is used up.
    """
    ranks, (rows, offered) = dist.get_world_size(group), offers_BM.shape
    share = -(-rows // ranks)
    sent = offers_BM.new_zeros(ranks * share, offered)
    sent[:rows] = offers_BM
    received = torch.empty_like(sent)
    _all_to_all(received, sent, group)
    # [rank, token, offer] -> [token, rank and offer]: in a stable sort, ties go to the lower rank, then to its earlier offer.
    merged = received.view(ranks, share, offered).transpose(0, 1).reshape(share, ranks * offered)
    order = merged.sort(dim=1, descending=True, stable=True).indices[:, :k]
    owners = order // offered
    counts = torch.zeros(share, ranks, dtype=torch.int32, device=merged.device)
    counts.scatter_add_(1, owners, torch.ones_like(owners, dtype=torch.int32))
    if more:
        counts.masked_fill_((counts == offered).any(dim=1, keepdim=True), -1)
    answers = counts.t().contiguous()
    answered = answers.new_empty(answers.shape)
    _all_to_all(answered, answers, group)
    return answered.reshape(-1)[:rows].long()


def _all_to_all(received: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup) -> None:
    # As bytes: gloo knows few types, and nothing is computed on the way.
    dist.all_to_all_single(received.view(-1).view(torch.uint8), sent.view(-1).view(torch.uint8), group=group)


def _from_rows(best_BK: torch.Tensor, num_latents: int) -> Selection:
    """Selection of all K latents of every row. Its size is known beforehand: nothing waits for the device."""
    rows, k = best_BK.shape
    offsets = torch.arange(rows + 1, device=best_BK.device) * k
    return Selection(offsets=offsets, latents=best_BK.sort(dim=1).values.flatten(), num_latents=num_latents)


def _from_prefixes(best_BM: torch.Tensor, counts: torch.Tensor, num_latents: int) -> Selection:
    """Selection of the first `counts[b]` of row b's latents."""
    width = best_BM.shape[1]
    position = torch.arange(width, device=best_BM.device)
    # What is not kept sorts behind what is.
    latents = torch.where(position < counts[:, None], best_BM, num_latents).sort(dim=1).values
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=best_BM.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return Selection(offsets=offsets, latents=latents[position < counts[:, None]], num_latents=num_latents)


def _from_tokens(tokens: torch.Tensor, latents: torch.Tensor, shape: torch.Size) -> Selection:
    """Selection of entries that are sorted by token, then latent."""
    bounds = torch.arange(shape[0] + 1, device=tokens.device)
    return Selection(offsets=torch.searchsorted(tokens, bounds), latents=latents, num_latents=shape[1])


@torch.no_grad()
def batch_topk_across(
    values_BN: torch.Tensor,
    total_k: int,
    *,
    tensor_group: dist.ProcessGroup | None = None,
    data_group: dist.ProcessGroup | None = None,
) -> tuple[Selection, torch.Tensor]:
    """The `total_k` largest of a whole global batch, over all tokens of all replicas and all latents: exact BatchTopK.

    A radix select, first over the maxima of blocks, which bounds the threshold from below and leaves about `total_k` blocks,
    then over what these hold. Sent by a rank: 6 all-reduces of 2048 int64 in each group, whatever B and k; for ties at the
    threshold one int64 a token over the tensor group, and one over the data group.

    Args:
        values_BN: this rank's latents for its replica's tokens; replicas may have different B.
        total_k: entries in all, normally k x global batch; everything is selected where there are fewer.
        tensor_group: the ranks holding the shards, in order of their latents; None: latents are not sharded.
        data_group: the replicas; None: one.
    Returns:
        This rank's part of the selection, and the smallest selected value: a float32 scalar (-inf where there are fewer).
    """
    groups = [group for group in (tensor_group, data_group) if group is not None]
    rows, latents = values_BN.shape
    maxima = block_maxima(values_BN)
    lower, _, _ = _radix_select(ordered_keys(maxima).reshape(-1), total_k, groups)
    bound = _value_of(lower)
    width = latents // max(maxima.shape[1], 1)
    # Written so that a NaN passes: it is larger than any bound.
    blocks = (~(maxima < bound)).reshape(-1).nonzero().squeeze(1)
    candidates = values_BN.reshape(-1, width)[blocks]
    block, within = (~(candidates < bound)).nonzero(as_tuple=True)
    flat = blocks[block] * width + within
    keys = ordered_keys(candidates[block, within])
    threshold, wanted, equal = _radix_select(keys, total_k, groups)
    reached = keys >= threshold
    flat, keys = flat[reached], keys[reached]
    tokens, local = flat // latents, flat % latents
    if wanted < equal:
        tied = keys == threshold
        kept = ~tied
        kept[tied] = _first_ties(tokens[tied], rows, wanted, tensor_group=tensor_group, data_group=data_group)
        tokens, local = tokens[kept], local[kept]
    selection = _from_tokens(tokens, local, values_BN.shape)
    return selection, torch.tensor(_value_of(threshold), device=values_BN.device)


def _value_of(key: int) -> float:
    """The value behind a key; -inf for the least, which stands for "everything"."""
    return -torch.inf if key == -(2**31) else float(key_values(torch.tensor(key, dtype=torch.int32)))


def _radix_select(keys: torch.Tensor, rank: int, groups: list[dist.ProcessGroup]) -> tuple[int, int, int]:
    """The `rank`-th largest of all ranks' int32 keys, by three all-reduced histograms.

    Returns that key, how many entries equal to it belong to the `rank` largest, and how many there are; the least int32 and
    two zeros where there are fewer than `rank` keys.
    """
    unsigned = keys.long() + 2**31
    prefix, wanted, equal = 0, rank, 0
    for shift in (21, 10, 0):
        bins = BINS if shift else BINS // 2
        counts = torch.bincount((unsigned >> shift) & (bins - 1), minlength=bins)
        for group in groups:
            dist.all_reduce(counts, group=group)
        from_top = counts.flip(0).cumsum(0)
        if shift == 21 and int(from_top[-1]) < rank:
            return -(2**31), 0, 0
        step = int(torch.searchsorted(from_top, wanted))
        chosen = bins - 1 - step
        equal = int(counts[chosen])
        wanted -= int(from_top[step]) - equal
        unsigned = unsigned[((unsigned >> shift) & (bins - 1)) == chosen]
        prefix |= chosen << shift
    return prefix - 2**31, wanted, equal


def _first_ties(
    tokens: torch.Tensor,
    rows: int,
    wanted: int,
    *,
    tensor_group: dist.ProcessGroup | None,
    data_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Mask over this rank's tied entries (their tokens, ascending): the first `wanted` of all, by global token and latent."""
    counts = torch.bincount(tokens, minlength=rows)
    in_token, lower = counts, torch.zeros_like(counts)
    if tensor_group is not None:
        shards = [torch.empty_like(counts) for _ in range(dist.get_world_size(tensor_group))]
        dist.all_gather(shards, counts, group=tensor_group)
        in_token = torch.stack(shards).sum(0)
        lower = torch.stack([*shards[: dist.get_rank(tensor_group)], lower]).sum(0)
    before = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    if data_group is not None:
        replicas = [torch.empty_like(before) for _ in range(dist.get_world_size(data_group))]
        dist.all_gather(replicas, in_token.sum(0, keepdim=True), group=data_group)
        before = torch.stack([*replicas[: dist.get_rank(data_group)], before]).sum(0)
    own_start = counts.cumsum(0) - counts
    start = before + in_token.cumsum(0) - in_token + lower
    position = torch.arange(len(tokens), device=tokens.device) - own_start[tokens] + start[tokens]
    return position < wanted
