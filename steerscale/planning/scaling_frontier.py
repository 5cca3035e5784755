"""Best size by budget without a formula for the loss: IsoFLOP parabolas and the envelope of points (Hoffmann et al. 2022,
approaches 2 and 1). Both end in a line through log N over log C: `N = N_1 (C / 1e18)^a`, and `D = C / 6N ~ C^(1-a)`."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression

from steerscale.config import require
from steerscale.errors import DataError
from steerscale.planning.scaling_fit import percentiles
from steerscale.planning.scaling_laws import PowerLaw
from steerscale.planning.scaling_points import Point, check_points

ANCHOR_FLOPS = 1e18
"""Where fitted power laws are anchored."""
LEAST_SIZES = 4
"""Models of one budget: one more than a parabola's coefficients."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best size at one budget."""

    flops: float
    parameters: float
    loss: float
    points: int
    """It rests on so many."""
    parabola: tuple[float, float, float] | None = None
    """IsoFLOP: loss = c2 x^2 + c1 x + c0, x = ln N - ln(parameters)."""


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The best sizes, and the line through them."""

    law: PowerLaw
    best: list[Best]
    interval: tuple[float, float] | None
    """Of the exponent, by bootstrap; None without."""
    warnings: list[str]


def isoflop(
    points: Sequence[Point],
    *,
    tolerance: float = 0.1,
    bootstrap: int = 0,
    level: float = 0.9,
    seed: int = 0,
) -> Frontier:
    """Parabolas in log N through the models of each budget; their minima against the budget.

    Args:
        points: at least `LEAST_SIZES` models at each of two budgets.
        tolerance: points are of one budget if their 6 N D differ from the lowest of them by at most this share; each loss
            is taken as it is.
        bootstrap: draws with replacement within each budget, for an interval of the exponent; 0: none.
        level: of the interval.
        seed: of the draws.

    Raises DataError if fewer than two budgets have a minimum.
    """
    require(0 < tolerance < 1, f"--tolerance must be between 0 and 1, got {tolerance}")
    check_points(points, needed=2 * LEAST_SIZES, purpose="an IsoFLOP fit")
    groups = _budgets(points, tolerance)
    warnings: list[str] = []
    best = [found for group in groups if (found := _parabola(group, warnings)) is not None]
    if len(best) < 2:
        raise DataError(
            f"IsoFLOP needs two budgets with a minimum inside their sizes, got {len(best)} among {len(groups)} budgets "
            f"({'; '.join(warnings[:2]) or 'all points are of one'}): train more sizes a budget, or raise --tolerance"
        )

    def draw(chance: random.Random) -> list[Best]:
        drawn = ([chance.choice(group) for _ in group] for group in groups)
        return [one for group in drawn if (one := _parabola(group, [])) is not None]

    return _frontier(best, warnings, draw, bootstrap=bootstrap, level=level, seed=seed)


def envelope(
    points: Sequence[Point], *, per_decade: int = 4, bootstrap: int = 0, level: float = 0.9, seed: int = 0
) -> Frontier:
    """The best point of each budget class, as long as more compute brings less loss, against the budget.

    Points may be moments of training. A learning rate that had not decayed by then makes them worse than a run of that
    length would be (Hoffmann et al. 2022, appendix B), and the exponent with them.

    Args:
        points: models, or moments of their training.
        per_decade: budget classes in a factor of ten.
        bootstrap: draws of points with replacement, for an interval of the exponent; 0: none.
        level: of the interval.
        seed: of the draws.

    Raises DataError if fewer than three classes are on the envelope.
    """
    require(per_decade >= 1, f"--per-decade must be at least 1, got {per_decade}")
    check_points(points, needed=3, purpose="an envelope")
    best = _envelope(points, per_decade)
    if len(best) < 3:
        raise DataError(
            f"the envelope has {len(best)} points, and a line needs 3: give runs over more compute, or raise --per-decade"
        )
    sizes = sorted({point.parameters for point in points})
    warnings = []
    at_ends = sum(one.parameters in (sizes[0], sizes[-1]) for one in best)
    if 2 * at_ends > len(best):
        warnings.append(
            f"{at_ends} of {len(best)} best points are the smallest or the largest model: the line shows which sizes were "
            "trained, not which are best"
        )
    return _frontier(
        best,
        warnings,
        lambda chance: _envelope([chance.choice(points) for _ in points], per_decade),
        bootstrap=bootstrap,
        level=level,
        seed=seed,
    )


def _budgets(points: Sequence[Point], tolerance: float) -> list[list[Point]]:
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.flops):
        if groups and point.flops <= groups[-1][0].flops * (1 + tolerance):
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def _parabola(group: Sequence[Point], warnings: list[str]) -> Best | None:
    """The minimum of one budget; None, with the reason in `warnings`, if there is none to be seen."""
    import numpy as np

    flops = math.exp(fmean(math.log(point.flops) for point in group))
    sizes = {point.parameters for point in group}
    if len(sizes) < LEAST_SIZES:
        warnings.append(f"{flops:.3g} FLOPs: {len(sizes)} sizes, a parabola needs {LEAST_SIZES}")
        return None
    logs = np.log([point.parameters for point in group])
    middle = float(logs.mean())
    c2, c1, c0 = map(float, np.polyfit(logs - middle, [point.loss for point in group], 2))
    if c2 <= 0:
        warnings.append(f"{flops:.3g} FLOPs: the loss has no minimum in N")
        return None
    place = -c1 / (2 * c2)
    parameters = math.exp(middle + place)
    if not min(sizes) <= parameters <= max(sizes):
        warnings.append(f"{flops:.3g} FLOPs: the minimum, {parameters:.3g} parameters, lies outside the sizes trained")
        return None
    least = c0 - c1**2 / (4 * c2)
    return Best(flops=flops, parameters=parameters, loss=least, points=len(group), parabola=(c2, 0.0, least))


def _envelope(points: Sequence[Point], per_decade: int) -> list[Best]:
    classes: dict[int, list[Point]] = {}
    for point in points:
        classes.setdefault(math.floor(math.log10(point.flops) * per_decade), []).append(point)
    best: list[Best] = []
    for key in sorted(classes):
        lowest = min(classes[key], key=lambda point: point.loss)
        if not best or lowest.loss < best[-1].loss:
            count = len(classes[key])
            best.append(Best(flops=lowest.flops, parameters=lowest.parameters, loss=lowest.loss, points=count))
    return best


def _frontier(
    best: list[Best],
    warnings: list[str],
    draw: Callable[[random.Random], list[Best]],
    *,
    bootstrap: int,
    level: float,
    seed: int,
) -> Frontier:
    require(0 < level < 1, f"--level must be between 0 and 1, got {level}")
    require(bootstrap >= 0, f"--bootstrap must not be negative, got {bootstrap}")
    chance = random.Random(seed)
    exponents = []
    for _ in range(bootstrap):
        drawn = draw(chance)
        if len({one.flops for one in drawn}) >= 2:
            exponents.append(_line(drawn).exponent)
    return Frontier(law=_line(best), best=best, interval=percentiles(exponents, level), warnings=warnings)


def _line(best: Sequence[Best]) -> PowerLaw:
    logs_c = [math.log(one.flops / ANCHOR_FLOPS) for one in best]
    slope, intercept = linear_regression(logs_c, [math.log(one.parameters) for one in best])
    return PowerLaw(flops=ANCHOR_FLOPS, parameters=math.exp(intercept), exponent=slope)
