import math
from itertools import pairwise

import pytest

from steerscale.errors import ConfigError
from steerscale.planning.scaling_laws import CHINCHILLA_3, KAPLAN, REFIT, Optimum, tokens_for
from steerscale.planning.scaling_plan import (
    Budget,
    choice,
    inference_optimum,
    law_rows,
    over_training,
    pick,
    spread,
)

HOURS = 46_000
# TFLOP/s; C; N, D at 20 tokens a parameter; by the refit; by Chinchilla 3; N at 250B and 300B tokens
TABLE = [
    (100, 1.66e22, (11.8, 235), (11.7, 236), (8.0, 346), (11.0, 9.2)),
    (120, 1.99e22, (12.9, 257), (12.9, 258), (8.7, 382), (13.2, 11.0)),
    (140, 2.32e22, (13.9, 278), (13.9, 278), (9.3, 415), (15.5, 12.9)),
    (156, 2.58e22, (14.7, 293), (14.7, 293), (9.8, 440), (17.2, 14.4)),
]


def billions(best: Optimum) -> tuple[float, float]:
    return best.parameters / 1e9, best.tokens / 1e9


@pytest.mark.parametrize(("tflops", "flops", "twenty", "refit", "third", "fixed"), TABLE)
def test_46000_hours_of_a100(
    tflops: float,
    flops: float,
    twenty: tuple[float, float],
    refit: tuple[float, float],
    third: tuple[float, float],
    fixed: tuple[float, float],
) -> None:
    budget = Budget(gpu_hours=HOURS, peak_tflops=312, mfu=tflops / 312)
    assert budget.flops == pytest.approx(flops, rel=0.003)
    n = math.sqrt(budget.flops / 120)
    assert (n / 1e9, 20 * n / 1e9) == pytest.approx(twenty, rel=0.005)
    assert billions(REFIT.optimum(budget.flops)) == pytest.approx(refit, rel=0.005)
    assert billions(CHINCHILLA_3.optimum(budget.flops)) == pytest.approx(third, rel=0.006)
    assert [tokens_for(budget.flops, tokens) / 1e9 for tokens in (250e9, 300e9)] == pytest.approx(fixed, rel=0.005)


def test_kaplan_alone_asks_for_60_to_83_billion() -> None:
    low, high = (KAPLAN.optimum(Budget(gpu_hours=HOURS, peak_tflops=1, mfu=1).flops * tflops) for tflops in (100, 156))
    assert billions(low) == pytest.approx((60, 83), abs=0.5)
    assert billions(high) == pytest.approx((83, 93), abs=0.5)


def test_what_6_7_billion_on_the_talks_tokens_take() -> None:
    budget = Budget(gpu_hours=HOURS, peak_tflops=106, mfu=1)
    hours = [budget.hours_for(6 * 6.7e9 * tokens) for tokens in (250e9, 300e9)]
    assert hours == pytest.approx([26_300, 31_600], rel=0.003)
    assert budget.days(64) == pytest.approx(HOURS / 64 / 24)


def test_rows_spend_the_budget_and_are_compared_by_one_law() -> None:
    rows = {row.law: row for row in law_rows(2.32e22)}
    assert list(rows) == ["Kaplan", "Chinchilla 1", "Chinchilla 2", "Chinchilla 3", "refit", "reconciled"]
    for name, row in rows.items():
        assert row.flops_over_budget == pytest.approx(1.806 if name == "Kaplan" else 1, abs=0.001)
        assert row.loss == REFIT.loss(row.parameters, row.tokens)
        assert row.non_embedding < row.parameters
    assert rows["Kaplan"].non_embedding == pytest.approx(KAPLAN.optimum(2.32e22).parameters)
    assert rows["refit"].loss == min(row.loss for name, row in rows.items() if name != "Kaplan")
    assert rows["Chinchilla 1"].own_loss is None
    assert "at most 1.5B" in rows["Kaplan"].note
    assert "C^0.513" in rows["reconciled"].note
    found = spread(list(rows.values()))
    assert found["parameters"] == (rows["Chinchilla 3"].parameters, rows["refit"].parameters)
    assert found["tokens"] == (rows["refit"].tokens, rows["Chinchilla 3"].tokens)


def test_over_training_costs_loss_and_says_how_much_budget_makes_up_for_it() -> None:
    choices = over_training(1e22)
    assert choices[0].extra_loss == pytest.approx(0)
    assert choices[0].budget_factor == pytest.approx(1)
    least = choices[0].loss
    for one, smaller in pairwise(choices):
        assert smaller.loss > one.loss
        assert smaller.tokens_per_parameter > one.tokens_per_parameter
    for one in choices:
        assert one.budget_factor is not None
        assert REFIT.loss(one.parameters, one.tokens * one.budget_factor) == pytest.approx(least)
    assert choice(1e22, REFIT.optimum(1e22).parameters / 20).budget_factor is None


def test_inference_moves_the_optimum_to_smaller_models() -> None:
    flops, used = 1e22, 1e12
    best = inference_optimum(flops, used)
    assert 6 * best.parameters * best.tokens + 2 * best.parameters * used == pytest.approx(flops)
    least = REFIT.loss(best.parameters, best.tokens)
    for factor in (0.9, 1.1):
        n = best.parameters * factor
        assert REFIT.loss(n, (flops / n - 2 * used) / 6) > least
    assert inference_optimum(flops, 0).parameters == pytest.approx(REFIT.optimum(flops).parameters, rel=1e-3)
    assert best.parameters < inference_optimum(flops, used / 10).parameters
    with pytest.raises(ConfigError, match="would take the whole budget"):
        inference_optimum(flops, 1e18)


def test_pick_stays_within_the_tokens_there_are() -> None:
    best = REFIT.optimum(2.32e22)
    assert pick(2.32e22, None) == best
    assert pick(2.32e22, (250e9, 300e9)) == pytest.approx(best)
    assert pick(2.32e22, (100e9, 200e9)).tokens == 200e9
    assert pick(2.32e22, (400e9, 500e9)).parameters == pytest.approx(2.32e22 / 6 / 400e9)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gpu_hours": 0.0}, "--gpu-hours must be a positive number, got 0"),
        ({"gpu_hours": math.nan}, "--gpu-hours must be a positive number, got nan"),
        ({"mfu": 45.0}, "at most 1, got 45: a share of the peak, 0.45 for 45 %"),
        ({"peak_tflops": -1.0}, "--peak-tflops must be a positive number, got -1"),
    ],
)
def test_impossible_budgets_are_refused(change: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Budget(**{"gpu_hours": 1.0, "peak_tflops": 312.0, "mfu": 0.4, **change})
    assert text in str(caught.value)


def test_impossible_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--tokens 3e\+11..2e\+11 is no range"):
        pick(1e22, (3e11, 2e11))
    with pytest.raises(ConfigError, match=r"leaves 1.67e\+05 parameters for 1e\+13 tokens"):
        pick(1e19, (1e13, 1e13))
