"""Selection over sharded latents equals sorting the whole, entry by entry, ties included."""

import pytest
import torch
import torch.distributed as dist

from steerscale import native
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.parallel.select import Selection, batch_topk_across, select_where, topk_across
from steerscale.parallel.topk import BLOCK, key_values, ordered_keys, top_rows
from steerscale.testing.ranks import RankPool

Entries = list[tuple[int, int]]
"""(token, latent), sorted."""


def make_values(rows: int, latents: int, kind: str, seed: int = 0) -> torch.Tensor:
    """Pre-activations: `fine` has no ties, `bf16` and `coarse` have many, `flat` only ties."""
    values = torch.randn(rows, latents, generator=torch.Generator().manual_seed(seed))
    if kind == "bf16":
        return values.bfloat16()
    if kind == "coarse":
        return (values * 2).round() / 2
    if kind == "flat":
        return torch.zeros_like(values)
    if kind == "lopsided":  # nearly all of the best lie in the first shard: offers of 2k/P are used up
        values[: rows // 2, : latents // 4] += 10
    return values


def reference_topk(values: torch.Tensor, k: int) -> Entries:
    best = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return sorted((row, latent) for row, latents in enumerate(best.tolist()) for latent in latents)


def reference_batch_topk(values: torch.Tensor, total: int) -> Entries:
    best = values.reshape(-1).sort(descending=True, stable=True).indices[:total]
    return sorted(divmod(index, values.shape[1]) for index in best.tolist())


def entries(selection: Selection, *, first_token: int = 0, first_latent: int = 0) -> Entries:
    """Entries with global numbers, in the order of the selection."""
    tokens, latents = selection.tokens + first_token, selection.latents + first_latent
    return list(zip(tokens.tolist(), latents.tolist()))


SHAPES = [(5, 64, 3), (1, 7, 7), (9, 2048, 32), (4, 130, 5), (6, 1, 1), (3, 192, 100), (4, 64, 0), (0, 8, 2), (3, 5, 9)]


@pytest.mark.parametrize("kind", ["fine", "bf16", "coarse", "flat"])
@pytest.mark.parametrize(("rows", "latents", "k"), SHAPES)
def test_topk_of_one_process_is_a_stable_sort(rows: int, latents: int, k: int, kind: str) -> None:
    values = make_values(rows, latents, kind)
    selection = topk_across(values, k)
    assert entries(selection) == reference_topk(values, k)
    assert selection.counts.tolist() == [min(k, latents)] * rows


@pytest.mark.parametrize("kind", ["fine", "bf16", "coarse", "flat"])
@pytest.mark.parametrize(("rows", "latents", "k"), SHAPES)
def test_batch_topk_of_one_process_is_a_stable_sort(rows: int, latents: int, k: int, kind: str) -> None:
    values = make_values(rows, latents, kind)
    for total in {1, max(rows * k, 1), max(rows * latents - 1, 1), rows * latents + 3}:
        selection, threshold = batch_topk_across(values, total)
        chosen = reference_batch_topk(values, total)
        assert entries(selection) == chosen
        if total <= values.numel():
            assert threshold == min(values[entry].float() for entry in chosen)
        else:
            assert threshold == -torch.inf


def test_topk_negative_zero_ties_with_zero() -> None:
    values = torch.tensor([[-1.0, -0.0, 0.0, -0.0, -2.0]])
    assert entries(topk_across(values, 2)) == [(0, 1), (0, 2)]
    assert entries(batch_topk_across(values, 2)[0]) == [(0, 1), (0, 2)]


@pytest.mark.parametrize("nan", [torch.nan, -torch.nan])
def test_topk_selects_nan_first(nan: float) -> None:
    values = torch.zeros(2, 256)
    values[1, 200] = torch.inf
    values[1, 30] = 5.0
    values[1, 201] = nan
    assert entries(topk_across(values, 2))[2:] == [(1, 200), (1, 201)]
    assert entries(batch_topk_across(values, 1)[0]) == [(1, 201)]


def test_topk_rows_are_sorted_best_first() -> None:
    values = make_values(4, 4 * BLOCK, "coarse")
    best = top_rows(values, 9)
    assert torch.equal(best, values.sort(dim=1, descending=True, stable=True).indices[:, :9])


def test_topk_of_a_view_that_is_not_contiguous() -> None:
    values = make_values(256, 6, "coarse").t()
    assert entries(topk_across(values, 4)) == reference_topk(values, 4)
    assert entries(batch_topk_across(values, 24)[0]) == reference_batch_topk(values, 24)


def test_batch_topk_refuses_double_precision() -> None:
    with pytest.raises(TypeError, match="float64"):
        batch_topk_across(torch.zeros(2, 4, dtype=torch.float64), 2)


def test_keys_order_as_values_do() -> None:
    values = torch.tensor([-torch.inf, -3.5, -1e-40, 0.0, 1e-40, 2.0, torch.inf, torch.nan])
    keys = ordered_keys(values)
    assert keys.diff().gt(0).all()
    assert torch.equal(key_values(keys[:-1]), values[:-1])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", [(6, 40), (3, 37), (1, 5), (0, 8), (4, 0)], ids=str)
def test_select_where_finds_every_entry(
    shape: tuple[int, int], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    for least in (-torch.inf, 0.0, 0.9, torch.inf):
        for mask in (make_values(*shape, "fine") > least, (make_values(*reversed(shape), "fine") > least).t()):
            assert entries(select_where(mask)) == [tuple(entry) for entry in mask.nonzero().tolist()]


def test_selection_forms_agree() -> None:
    values = make_values(6, 40, "fine")
    selection = select_where(values > 0.8)
    assert entries(selection) == [tuple(entry) for entry in (values > 0.8).nonzero().tolist()]
    chosen = selection.gather(values)
    assert torch.equal(selection.dense(chosen), torch.where(values > 0.8, values, 0.0))
    torch.testing.assert_close(selection.row_sums(chosen), torch.where(values > 0.8, values, 0.0).sum(1))
    larger = selection.keep(chosen > 1.5)
    assert entries(larger) == entries(select_where(values > 1.5))
    transpose = selection.by_latent
    assert torch.equal(transpose.tokens, (values > 0.8).t().nonzero()[:, 1])
    assert torch.equal(selection.latents[transpose.order], (values > 0.8).t().nonzero()[:, 0])
    assert torch.equal(transpose.offsets.diff(), (values > 0.8).sum(0))


def test_selection_values_are_differentiable() -> None:
    values = make_values(3, 10, "fine").requires_grad_()
    selection = topk_across(values, 2)
    selection.gather(values).square().sum().backward()
    mask = selection.dense(torch.ones(selection.nnz))
    torch.testing.assert_close(values.grad, 2 * values.detach() * mask)


def _topk_entries(cases: list[tuple[torch.Tensor, int]]) -> list[Entries]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    answers = []
    for values, k in cases:
        local = values.chunk(ranks, dim=1)[rank]
        selection = topk_across(local, k, dist.group.WORLD)
        answers.append(entries(selection, first_latent=rank * local.shape[1]))
    return answers


@pytest.mark.parametrize("ranks", [2, 4])
def test_topk_across_ranks_is_that_of_one_process(pool: RankPool, ranks: int) -> None:
    kinds = ["fine", "bf16", "coarse", "flat", "lopsided"]
    # B not divisible by P, fewer rows than ranks, k larger than a shard, k larger than everything, one row, no row.
    shapes = [(10, 64, 6), (3, 16, 7), (5, 16, 20), (7, 512, 32), (1, 256, 2), (0, 8, 2)]
    cases = [(make_values(rows, latents, kind), k) for kind in kinds for rows, latents, k in shapes]
    answers = pool.run(_topk_entries, cases, ranks=ranks)
    for number, (values, k) in enumerate(cases):
        together = sorted(entry for answer in answers for entry in answer[number])
        assert together == reference_topk(values, k), f"case {number}: {tuple(values.shape)}, k={k}, {values.dtype}"


def _batch_topk_entries(layout: ParallelLayout, cases: list[tuple[torch.Tensor, int]]) -> list[tuple[Entries, float]]:
    answers = []
    with initialize(layout) as context:
        at = context.at
        for values, total in cases:
            # Replicas of different size: the first takes what does not divide.
            rows = values.tensor_split(layout.data)
            local = rows[at.data].chunk(layout.tensor, dim=1)[at.tensor]
            selection, threshold = batch_topk_across(
                local, total, tensor_group=context.groups.tp, data_group=context.groups.dp
            )
            first_token = sum(len(part) for part in rows[: at.data])
            found = entries(selection, first_token=first_token, first_latent=at.tensor * local.shape[1])
            answers.append((found, threshold.item()))
    return answers


@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_batch_topk_across_ranks_is_that_of_one_process(pool: RankPool, tensor: int, data: int) -> None:
    kinds = ["fine", "bf16", "coarse", "flat", "lopsided"]
    shapes = [(9, 64, 40), (4, 256, 33), (2, 16, 1), (6, 8, 47), (6, 8, 50)]
    cases = [(make_values(rows, latents, kind), total) for kind in kinds for rows, latents, total in shapes]
    answers = pool.run(_batch_topk_entries, ParallelLayout(tensor=tensor, data=data), cases, ranks=tensor * data)
    for number, (values, total) in enumerate(cases):
        together = sorted(entry for answer in answers for entry in answer[number][0])
        assert together == reference_batch_topk(values, total), f"case {number}: {tuple(values.shape)}, {values.dtype}"
        assert len({answer[number][1] for answer in answers}) == 1
