import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from steerscale.errors import ConfigError, DataError
from steerscale.planning.scaling_fit import NAMES, fit_law, percentiles
from steerscale.planning.scaling_laws import ParametricLaw
from steerscale.planning.scaling_points import Point, read_points, without_highest

TRUTH = ParametricLaw(E=1.8, A=400, B=2000, alpha=0.35, beta=0.37)
SIZES = (1e7, 3e7, 1e8, 3e8, 1e9)
PUBLISHED = ParametricLaw(E=1.81724, A=477.84, B=2143.86, alpha=0.34731, beta=0.36718)
"""What Besiroglu et al.'s method gives on their points."""
CHINCHILLA = Path(__file__).parent / "chinchilla_points.csv"


def trained(
    law: ParametricLaw = TRUTH,
    *,
    sizes: tuple[float, ...] = SIZES,
    ratios: tuple[float, ...] = (5, 20, 80),
    noise: float = 0.0,
    seed: int = 0,
) -> list[Point]:
    """Models of a world that obeys `law`, their losses off by `noise` (a share of them, normally distributed)."""
    chance = random.Random(seed)
    return [
        Point(parameters=n, tokens=n * ratio, loss=law.loss(n, n * ratio) * math.exp(chance.gauss(0, noise)))
        for n in sizes
        for ratio in ratios
    ]


def huber(law: ParametricLaw, points: list[Point]) -> float:
    """The objective, written down once more."""
    errors = [abs(math.log(law.loss(point.parameters, point.tokens) / point.loss)) for point in points]
    return sum(error**2 / 2 if error <= 1e-3 else 1e-3 * (error - 5e-4) for error in errors)


def test_points_beyond_numbers_and_negative_seeds_are_refused() -> None:
    points = trained()
    with pytest.raises(DataError, match="flops must be a positive number, got inf"):
        fit_law([*points, Point(parameters=1e300, tokens=1e300, loss=2.0)])
    with pytest.raises(ConfigError, match="--seed must not be negative, got -1"):
        fit_law(points, seed=-1)


@pytest.fixture(scope="module")
def published() -> list[Point]:
    """The 240 points that Besiroglu et al. fit: without the five of highest loss."""
    points = read_points(CHINCHILLA)
    assert len(points) == 245
    return without_highest(points, 5)


def test_refit_of_the_published_points(published: list[Point]) -> None:
    fit = fit_law(published)
    assert fit.points == 240
    assert vars(fit.law) == pytest.approx(vars(PUBLISHED), rel=3e-4)
    assert fit.objective == pytest.approx(huber(fit.law, published), rel=1e-6)
    assert fit.objective <= huber(PUBLISHED, published)
    assert fit.warnings == []


@pytest.mark.parametrize(
    "starts",
    [
        [(0.3, 0.3, 0.6)],
        [(1.0, 0.1, 0.3), (0.1, 1.0, 0.9)],
        [(alpha, beta, share) for alpha in (0.05, 0.5, 2.0) for beta in (0.05, 0.5, 2.0) for share in (0.1, 0.5, 0.95)],
    ],
)
def test_start_grids_lead_to_one_optimum(published: list[Point], starts: list[tuple[float, float, float]]) -> None:
    fit, usual = fit_law(published, starts=starts), fit_law(published)
    assert fit.objective == pytest.approx(usual.objective, rel=1e-6)
    for name in NAMES:
        assert getattr(fit.law, name) == pytest.approx(getattr(usual.law, name), rel=1e-4)


def test_constants_are_recovered_without_noise() -> None:
    fit = fit_law(trained())
    for name in NAMES:
        assert getattr(fit.law, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3)
    assert fit.rms < 1e-5


def test_intervals_hold_the_constants_of_noisy_runs() -> None:
    fit = fit_law(trained(noise=0.004, seed=3), bootstrap=60, level=0.98)
    for name in (*NAMES, "exponent"):
        interval = fit.interval(name)
        assert interval is not None
        assert interval[0] <= getattr(TRUTH, name) <= interval[1]
        assert interval[0] < interval[1]
    assert fit.rms == pytest.approx(0.004, rel=0.5)
    again = fit_law(trained(noise=0.004, seed=3), bootstrap=60, level=0.98)
    assert again.interval("E") == fit.interval("E")


def test_one_diverged_run_does_not_move_the_fit() -> None:
    points = trained(noise=0.002)
    points[4] = replace(points[4], loss=2 * points[4].loss)
    assert fit_law(points).law.exponent == pytest.approx(TRUTH.exponent, abs=0.05)


def test_a_larger_run_is_predicted_within_its_interval() -> None:
    fit = fit_law(trained(noise=0.003, seed=1), bootstrap=60)
    predicted, interval = fit.predict(5e9, 1e11)
    assert interval is not None
    assert interval[0] <= predicted <= interval[1]
    assert interval[0] <= TRUTH.loss(5e9, 1e11) <= interval[1]
    near = fit.predict(1e8, 2e9)[1]
    assert near is not None
    far = fit.predict(1e11, 2e12)[1]
    assert far is not None
    assert math.log(far[1] / far[0]) > math.log(near[1] / near[0])
    assert fit_law(trained()).predict(5e9, 1e11)[1] is None


@pytest.mark.parametrize(
    ("points", "text"),
    [
        (trained()[:5], "a parametric fit needs at least 6 points, got 5"),
        (trained(sizes=(1e8, 2e8)), "at least 3 different sizes, got 2"),
        (
            [replace(point, tokens=1e9) for point in trained()],
            "at least 3 different numbers of tokens, got 1",
        ),
        ([*trained(), Point(parameters=1e8, tokens=1e9, loss=math.nan, name="x")], "x: loss must be a positive number"),
        ([*trained(), Point(parameters=1e8, tokens=math.inf, loss=2.0, name="x")], "x: tokens must be a positive"),
    ],
)
def test_points_that_carry_no_fit_are_refused(points: list[Point], text: str) -> None:
    with pytest.raises(DataError) as caught:
        fit_law(points)
    assert text in str(caught.value)


def test_options_are_checked() -> None:
    for options, text in (
        ({"delta": 0.0}, "--delta must be positive"),
        ({"bootstrap": -1}, "--bootstrap must not be negative"),
        ({"level": 1.0}, "--level must be between 0 and 1"),
        ({"starts": []}, "at least one start"),
    ):
        with pytest.raises(ConfigError, match=text):
            fit_law(trained(), **options)  # pyright: ignore[reportArgumentType]


def test_doubtful_fits_say_so() -> None:
    narrow = fit_law(trained(sizes=(1e8, 1.3e8, 1.6e8), noise=0.004), bootstrap=12)
    assert any("N spans a factor of 1.6 only: alpha is a guess" in text for text in narrow.warnings)
    assert any("alpha is poorly determined" in text for text in narrow.warnings)
    no_gain = [
        replace(point, loss=2 + 2000 / point.tokens**0.37 + 0.02 * math.log(point.parameters)) for point in trained()
    ]
    assert any("these points do not show how loss falls with N" in text for text in fit_law(no_gain).warnings)
    pure = ParametricLaw(E=0, A=20, B=60, alpha=0.1, beta=0.15)
    assert any("E vanished" in text for text in fit_law(trained(pure)).warnings)


def test_percentiles_are_interpolated() -> None:
    assert percentiles([3.0, 1.0, 2.0, 0.0, 4.0], 0.5) == (1.0, 3.0)
    assert percentiles([0.0, 1.0], 0.9) == pytest.approx((0.05, 0.95))
    assert percentiles([1.0], 0.9) is None
