import math
import random
from dataclasses import replace

import pytest

from steerscale.errors import ConfigError, DataError
from steerscale.planning.scaling_fit import percentiles
from steerscale.planning.scaling_frontier import envelope, isoflop
from steerscale.planning.scaling_laws import CHINCHILLA_3, REFIT, ParametricLaw, tokens_for
from steerscale.planning.scaling_points import Point, read_points, without_highest
from tests.planning.test_scaling_fit import CHINCHILLA

BUDGETS = (1e18, 1e19, 1e20, 1e21)


def ladder(
    law: ParametricLaw, *, budgets: tuple[float, ...] = BUDGETS, shift: float = 1.0, noise: float = 0.0
) -> list[Point]:
    """Five sizes a budget, around `shift` times the best one."""
    chance = random.Random(0)
    points = []
    for flops in budgets:
        for factor in (0.25, 0.5, 1, 2, 4):
            n = law.optimum(flops).parameters * factor * shift
            loss = law.loss(n, tokens_for(flops, n)) * math.exp(chance.gauss(0, noise))
            points.append(Point(parameters=n, tokens=tokens_for(flops, n), loss=loss))
    return points


@pytest.mark.parametrize("law", [REFIT, CHINCHILLA_3])
def test_isoflop_finds_the_exponent_and_the_sizes(law: ParametricLaw) -> None:
    found = isoflop(ladder(law))
    assert found.law.exponent == pytest.approx(law.exponent, abs=1e-6)
    assert [one.flops for one in found.best] == pytest.approx(BUDGETS)
    for one in found.best:
        # A parabola in log N is an approximation of the law: its minimum is a little off.
        assert one.parameters == pytest.approx(law.optimum(one.flops).parameters, rel=0.2)
        assert one.points == 5
    assert found.law.optimum(1e20).parameters == pytest.approx(found.best[2].parameters, rel=1e-6)
    assert found.warnings == []


def test_isoflop_interval_holds_the_exponent() -> None:
    found = isoflop(ladder(REFIT, noise=0.002), bootstrap=100, level=0.95)
    assert found.interval is not None
    assert found.interval[0] <= REFIT.exponent <= found.interval[1]
    assert 0 < found.interval[1] - found.interval[0] < 0.3


def test_isoflop_leaves_budgets_without_a_minimum_out_and_says_so() -> None:
    outside = [point for point in ladder(REFIT, shift=32) if 5e18 < point.flops < 2e19]
    few = ladder(REFIT, budgets=(1e22,))[:3]
    hill = [replace(point, loss=10 - point.loss) for point in ladder(REFIT, budgets=(1e23,))]
    good = [point for point in ladder(REFIT) if not 5e18 < point.flops < 2e19]
    found = isoflop([*good, *outside, *few, *hill])
    assert len(found.best) == 3
    assert "1e+19 FLOPs: the minimum" in found.warnings[0]
    assert "lies outside the sizes trained" in found.warnings[0]
    assert found.warnings[1:] == [
        "1e+22 FLOPs: 3 sizes, a parabola needs 4",
        "1e+23 FLOPs: the loss has no minimum in N",
    ]
    with pytest.raises(DataError, match="two budgets with a minimum inside their sizes, got 0 among 4 budgets"):
        isoflop(ladder(REFIT, shift=32))


def test_envelope_follows_the_best_points() -> None:
    found = envelope(ladder(REFIT))
    assert found.law.exponent == pytest.approx(REFIT.exponent, abs=1e-6)
    assert [one.parameters for one in found.best] == pytest.approx([REFIT.optimum(c).parameters for c in BUDGETS])
    assert found.warnings == []


def test_envelope_keeps_to_falling_losses_and_doubts_the_edges() -> None:
    points = ladder(REFIT)
    worse = Point(parameters=3e8, tokens=tokens_for(4e19, 3e8), loss=9.0)
    assert len(envelope([*points, worse]).best) == len(BUDGETS)
    one_size = [
        Point(parameters=1e8, tokens=tokens_for(flops, 1e8), loss=REFIT.loss(1e8, tokens_for(flops, 1e8)))
        for flops in BUDGETS
    ]
    assert any("shows which sizes were trained, not which are best" in text for text in envelope(one_size).warnings)
    with pytest.raises(DataError, match="the envelope has 1 points, and a line needs 3"):
        envelope([worse, worse, worse])


def test_three_methods_agree_on_chinchillas_points() -> None:
    """Chinchilla's approaches 1 and 2 gave .50 and .49 on all of its runs; these are the 240 of them that are public."""
    points = without_highest(read_points(CHINCHILLA), 5)
    for found in (isoflop(points, bootstrap=50), envelope(points, bootstrap=50)):
        assert found.law.exponent == pytest.approx(0.50, abs=0.03)
        assert found.interval is not None
        assert found.interval[0] < 0.50 < found.interval[1]


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="--tolerance must be between 0 and 1"):
        isoflop(ladder(REFIT), tolerance=0)
    with pytest.raises(ConfigError, match="--per-decade must be at least 1"):
        envelope(ladder(REFIT), per_decade=0)
    with pytest.raises(DataError, match="an IsoFLOP fit needs at least 8 points, got 5"):
        isoflop(ladder(REFIT, budgets=(1e20,)))
    assert percentiles([], 0.9) is None
