"""`L = E + A / N^alpha + B / D^beta` fitted to trained models (Hoffmann et al. 2022, approach 3; Besiroglu et al. 2024).

The objective is the sum over points of Huber(log L_predicted - log L), delta = 1e-3, minimised by L-BFGS from a grid of
starts. Two things make it quick and the grid unimportant: the gradient is exact, and A and B are measured at the points'
mean (log A - alpha mean(log N)), where they hardly depend on the exponents; as papers write it, the valley is so narrow
that L-BFGS stops early and starts seem to find different optima.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steerscale.config import require
from steerscale.errors import DataError
from steerscale.planning.scaling_laws import ParametricLaw
from steerscale.planning.scaling_points import Point, check_points

if TYPE_CHECKING:
    import numpy as np

DELTA = 1e-3
"""Where the Huber loss turns from square to absolute, in log L: of Hoffmann et al. and Besiroglu et al."""
LEAST_POINTS = 6
"""One more than constants."""
EXPONENTS = (1e-3, 5.0)
"""Bounds of alpha and beta; an optimum at one is reported."""
NAMES = ("E", "A", "B", "alpha", "beta")
SAME = 1e-6
"""Optima whose objectives differ by less, relatively, are one."""

Start = tuple[float, float, float]
"""alpha, beta and E over the lowest loss; what is left of the mean loss is shared by the terms of N and D."""
STARTS: tuple[Start, ...] = tuple(itertools.product((0.1, 0.3, 0.6, 1.0), (0.1, 0.3, 0.6, 1.0), (0.3, 0.6, 0.9)))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law, and how far to trust it."""

    law: ParametricLaw
    points: int
    objective: float
    """Sum of Huber losses of log L at the optimum."""
    rms: float
    """Root mean square of log(predicted / measured)."""
    agreeing: int
    """Starts that ended at this optimum."""
    starts: int
    level: float
    """Of the intervals: 0.9 for 90 %."""
    draws: list[ParametricLaw]
    """Fits to points drawn with replacement; empty without bootstrap."""
    residuals: list[float]
    """log(measured / predicted) of each point."""
    warnings: list[str]

    def interval(self, name: str) -> tuple[float, float] | None:
        """Bootstrap interval of a constant or of `exponent`; None without draws."""
        return percentiles([getattr(draw, name) for draw in self.draws], self.level)

    def predict(self, parameters: float, tokens: float, *, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
        """Loss of another run, and the interval in which to expect it: the law's uncertainty and a run's own scatter."""
        import random

        chance = random.Random(seed)
        drawn = [draw.loss(parameters, tokens) * math.exp(chance.choice(self.residuals)) for draw in self.draws]
        return self.law.loss(parameters, tokens), percentiles(drawn, self.level)


def fit_law(
    points: Sequence[Point],
    *,
    starts: Sequence[Start] = STARTS,
    delta: float = DELTA,
    bootstrap: int = 0,
    level: float = 0.9,
    seed: int = 0,
) -> Fit:
    """Fit the parametric law.

    Args:
        points: at least `LEAST_POINTS`, of three sizes and three numbers of tokens or more.
        starts: where L-BFGS begins; see `Start`.
        delta: of the Huber loss.
        bootstrap: fits to points drawn with replacement, for intervals; 0: none.
        level: of the intervals.
        seed: of the draws.

    Raises DataError for points that cannot carry the fit, or if L-BFGS converges from no start.
    """
    import numpy as np

    require(len(starts) > 0, "fit_law needs at least one start")
    require(0 < level < 1, f"--level must be between 0 and 1, got {level}")
    require(bootstrap >= 0, f"--bootstrap must not be negative, got {bootstrap}")
    require(seed >= 0, f"--seed must not be negative, got {seed}")
    require(math.isfinite(delta) and delta > 0, f"--delta must be positive, got {delta}")
    check_points(points, needed=LEAST_POINTS, purpose="a parametric fit")
    for key, what in (("parameters", "sizes"), ("tokens", "numbers of tokens")):
        different = len({getattr(point, key) for point in points})
        if different < 3:
            raise DataError(f"a parametric fit needs at least 3 different {what}, got {different}")
    problem = _Problem(points, delta)
    found = [problem.minimise(problem.start(*start)) for start in starts]
    converged = [result for result in found if result.success]
    if not converged:
        raise DataError(f"the fit converged from none of {len(starts)} starts ({found[0].message}): look at the points")
    best = min(converged, key=lambda result: result.fun)
    agreeing = sum(result.fun <= best.fun * (1 + SAME) + 1e-12 for result in found)
    chance = np.random.default_rng(seed)
    draws = []
    for _ in range(bootstrap):
        drawn = _Problem([points[index] for index in chance.integers(len(points), size=len(points))], delta)
        # From the optimum of all points, and from one start far from it should the draw have another valley.
        tried = [drawn.minimise(start) for start in (drawn.translated(problem, best.x), drawn.start(0.3, 0.3, 0.6))]
        draws.append(drawn.law(min(tried, key=lambda result: result.fun).x))
    law = problem.law(best.x)
    residuals = [math.log(point.loss / law.loss(point.parameters, point.tokens)) for point in points]
    fit = Fit(
        law=law,
        points=len(points),
        objective=float(best.fun) * delta,
        rms=math.sqrt(sum(residual**2 for residual in residuals) / len(residuals)),
        agreeing=agreeing,
        starts=len(starts),
        level=level,
        draws=draws,
        residuals=residuals,
        warnings=[],
    )
    fit.warnings.extend(_doubts(fit, points))
    return fit


class _Problem:
    """The objective in `a, b, q, alpha, beta`: a and b are the logarithms of both terms at the points' mean, q is E over the
    lowest loss (not log E: an E that vanishes would send L-BFGS down an endless slope)."""

    def __init__(self, points: Sequence[Point], delta: float) -> None:
        import numpy as np

        self.delta = delta
        log_n = np.log([point.parameters for point in points])
        log_d = np.log([point.tokens for point in points])
        self.log_loss = np.log([point.loss for point in points])
        self.mean_n, self.mean_d = float(log_n.mean()), float(log_d.mean())
        self.n, self.d = log_n - self.mean_n, log_d - self.mean_d
        self.lowest = math.exp(float(self.log_loss.min()))

    def start(self, alpha: float, beta: float, share: float) -> "np.ndarray[Any, Any]":
        import numpy as np

        half = math.log(max(math.exp(float(self.log_loss.mean())) - share * self.lowest, 1e-3) / 2)
        return np.array([half, half, share, alpha, beta])

    def translated(self, other: "_Problem", x: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """The same law as `x` of another problem, whose points have another mean."""
        import numpy as np

        a, b, q, alpha, beta = x
        shifted = (a - alpha * (self.mean_n - other.mean_n), b - beta * (self.mean_d - other.mean_d))
        return np.array([*shifted, q * other.lowest / self.lowest, alpha, beta])

    def minimise(self, start: "np.ndarray[Any, Any]") -> Any:
        from scipy.optimize import minimize

        log_terms = (-30.0, 10.0)
        bounds = [log_terms, log_terms, (0.0, 1.0), EXPONENTS, EXPONENTS]
        options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-14, "gtol": 1e-8}
        return minimize(self.objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)

    def objective(self, x: "np.ndarray[Any, Any]") -> tuple[float, "np.ndarray[Any, Any]"]:
        """The sum of Huber losses over delta, and its gradient."""
        import numpy as np

        a, b, q, alpha, beta = x
        terms = np.exp(np.stack([a - alpha * self.n, b - beta * self.d]))
        total = terms.sum(axis=0) + q * self.lowest
        residual = np.log(total) - self.log_loss
        size = np.abs(residual)
        value = np.where(size <= self.delta, residual**2 / (2 * self.delta), size - self.delta / 2).sum()
        weights = np.clip(residual / self.delta, -1, 1) / total
        of_n, of_d = weights * terms
        of_q = weights.sum() * self.lowest
        gradient = [of_n.sum(), of_d.sum(), of_q, -(of_n * self.n).sum(), -(of_d * self.d).sum()]
        return float(value), np.array(gradient)

    def law(self, x: "np.ndarray[Any, Any]") -> ParametricLaw:
        a, b, q, alpha, beta = map(float, x)
        return ParametricLaw(
            E=q * self.lowest,
            A=math.exp(a + alpha * self.mean_n),
            B=math.exp(b + beta * self.mean_d),
            alpha=alpha,
            beta=beta,
        )


def _doubts(fit: Fit, points: Sequence[Point]) -> list[str]:
    """What a reader must know before believing the numbers."""
    doubts, law = [], fit.law
    for name, symbol, key in (("alpha", "N", "parameters"), ("beta", "D", "tokens")):
        if min(abs(math.log(getattr(law, name) / bound)) for bound in EXPONENTS) < 1e-3:
            doubts.append(
                f"{name} ended at its bound {getattr(law, name):.3g}: these points do not show how loss falls with {symbol}"
            )
        values = [getattr(point, key) for point in points]
        if max(values) < 3 * min(values):
            doubts.append(f"{symbol} spans a factor of {max(values) / min(values):.2g} only: {name} is a guess")
        interval = fit.interval(name)
        if interval is not None and interval[1] > 2 * interval[0]:
            doubts.append(
                f"{name} is poorly determined: {fit.level:.0%} between {interval[0]:.3g} and {interval[1]:.3g}"
            )
    if 1e-3 * min(point.loss for point in points) > law.E:
        doubts.append(
            "E vanished: the losses do not level off within these points, and predictions far beyond are too low"
        )
    if fit.agreeing < 2 and fit.starts > 1:
        doubts.append(f"only {fit.agreeing} of {fit.starts} starts ended at this optimum: others may be as good")
    return doubts


def percentiles(values: Sequence[float], level: float) -> tuple[float, float] | None:
    """The interval around the median that holds `level` of the values; None of fewer than two."""
    if len(values) < 2:
        return None
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return at((1 - level) / 2), at((1 + level) / 2)
