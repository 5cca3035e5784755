import math

import pytest

from steerscale.errors import ConfigError
from steerscale.planning.scaling_laws import (
    CHINCHILLA_1,
    CHINCHILLA_2,
    CHINCHILLA_3,
    CHINCHILLA_TABLE_3,
    KAPLAN,
    LAWS,
    PF_DAY,
    REFIT,
    Optimum,
    ParametricLaw,
    kaplan_batch_tokens,
    kaplan_loss,
    local_exponent,
    non_embedding_parameters,
    simulated_exponent,
    tokens_for,
    total_parameters,
)


def test_kaplans_laws_at_their_units() -> None:
    assert kaplan_loss(parameters=8.8e13) == kaplan_loss(tokens=5.4e13) == kaplan_loss(flops=3.1e8 * PF_DAY) == 1
    assert kaplan_loss(parameters=1.5e9) == pytest.approx((8.8e13 / 1.5e9) ** 0.076)
    assert kaplan_loss(tokens=1e9) == pytest.approx((5.4e13 / 1e9) ** 0.095)
    assert kaplan_loss(flops=PF_DAY) == pytest.approx(3.1e8**0.050)
    for days in (1, 100, 1e4):
        best = KAPLAN.optimum(days * PF_DAY)
        assert best.parameters == pytest.approx(1.3e9 * days**0.73)
        assert best.tokens == pytest.approx(2e10 * days**0.27)
        assert kaplan_batch_tokens(days * PF_DAY) == pytest.approx(2e6 * days**0.24)
    with pytest.raises(ConfigError, match="exactly one"):
        kaplan_loss(parameters=1e9, tokens=1e9)


def test_kaplan_at_the_critical_batch_costs_twice_his_budget() -> None:
    best = KAPLAN.optimum(1.66e22)
    assert best.flops / 1.66e22 == pytest.approx(1.8, abs=0.01)


@pytest.mark.parametrize(("parameters", "flops", "tokens"), CHINCHILLA_TABLE_3)
def test_chinchilla_1_passes_through_its_table(parameters: float, flops: float, tokens: float) -> None:
    assert 6 * parameters * tokens == pytest.approx(flops, rel=0.05)
    assert CHINCHILLA_1.optimum(flops).parameters == pytest.approx(parameters, rel=0.022)
    assert CHINCHILLA_1.optimum(flops).tokens == pytest.approx(tokens, rel=0.07)


def test_chinchilla_2_and_3_at_the_tables_of_the_appendix() -> None:
    second = CHINCHILLA_2.optimum(6 * 10e9 * 219.5e9)
    assert (second.parameters, second.tokens) == pytest.approx((10e9, 219.5e9))
    # The printed law and the printed table of approach 3 agree within 10 % only.
    assert CHINCHILLA_3.optimum(6 * 10e9 * 410.1e9).tokens == pytest.approx(410.1e9, rel=0.1)
    # 175B on 12.0T tokens is printed with 1.26e24 FLOPs: 6 N D says ten times that.
    assert Optimum(parameters=175e9, tokens=12.0e12).flops == pytest.approx(1.26e25, rel=0.001)


def test_exponents_of_the_papers() -> None:
    assert (CHINCHILLA_1.exponent, CHINCHILLA_2.exponent, KAPLAN.exponent) == (0.50, 0.49, 0.73)
    assert CHINCHILLA_3.exponent == pytest.approx(0.46, abs=0.005)
    assert REFIT.exponent == pytest.approx(0.5126, abs=5e-5)


def test_rounding_chinchillas_exponents_changes_its_advice() -> None:
    rounded = ParametricLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
    assert CHINCHILLA_3.optimum(5.88e23).tokens_per_parameter == pytest.approx(59, abs=0.5)
    assert rounded.optimum(5.88e23).tokens_per_parameter == pytest.approx(93, abs=0.5)


def test_refit_at_chinchillas_budget() -> None:
    best = REFIT.optimum(5.76e23)
    assert best.parameters == pytest.approx(72.2e9, rel=0.001)
    assert best.tokens == pytest.approx(1.33e12, rel=0.002)
    assert best.tokens_per_parameter == pytest.approx(18.4, abs=0.05)


@pytest.mark.parametrize("law", [REFIT, CHINCHILLA_3])
def test_closed_form_is_the_minimum(law: ParametricLaw) -> None:
    best = law.optimum(1e21)
    assert best.flops == pytest.approx(1e21)
    least = law.loss(best.parameters, best.tokens)
    for factor in (0.9, 0.99, 1.01, 1.1):
        n = best.parameters * factor
        assert law.loss(n, tokens_for(1e21, n)) > least


def test_tokens_for_loss_inverts_the_law() -> None:
    tokens = REFIT.tokens_for_loss(2.2, 5e9)
    assert tokens is not None
    assert REFIT.loss(5e9, tokens) == pytest.approx(2.2)
    assert REFIT.tokens_for_loss(REFIT.E, 5e9) is None


def test_embeddings_by_pearce_and_song() -> None:
    assert total_parameters(1e9) == pytest.approx(1e9 + 47491 * 1000)
    for n in (768.0, 1e6, 1.5e9, 1e12):
        assert non_embedding_parameters(total_parameters(n)) == pytest.approx(n, rel=1e-6)


@pytest.mark.parametrize(("law", "without", "with_"), [(REFIT, 0.78, 0.515), (CHINCHILLA_3, 0.739, 0.459)])
def test_kaplans_study_simulated_gives_pearce_and_songs_exponents(
    law: ParametricLaw, without: float, with_: float
) -> None:
    assert simulated_exponent(law, embeddings=False) == pytest.approx(without, abs=0.01)
    assert simulated_exponent(law, embeddings=True) == pytest.approx(with_, abs=0.01)


def test_local_exponent_is_the_slope_of_the_best_sizes() -> None:
    """Against a search for the best size at two budgets, and the limit of large models."""

    def best(flops: float) -> float:
        sizes = [10 ** (6 + 3 * step / 30000) for step in range(30001)]
        return min(sizes, key=lambda n: REFIT.loss(total_parameters(n), tokens_for(flops, n)))

    low, high = best(1e17), best(1.2e17)
    slope = math.log(high / low) / math.log(1.2)
    assert local_exponent(REFIT, total_parameters(math.sqrt(low * high))) == pytest.approx(slope, abs=0.003)
    assert local_exponent(REFIT, 1e15) == pytest.approx(REFIT.exponent, abs=1e-4)


def test_laws_name_source_and_range() -> None:
    assert [entry.name for entry in LAWS] == ["kaplan", "chinchilla1", "chinchilla2", "chinchilla3", "refit"]
    assert all(entry.parameters[0] < entry.parameters[1] for entry in LAWS)


@pytest.mark.parametrize(("key", "value"), [("A", 0.0), ("alpha", -0.1), ("beta", math.nan), ("E", -1.0)])
def test_a_law_refuses_impossible_constants(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"law.{key} must"):
        ParametricLaw(**{**vars(REFIT), key: value})
