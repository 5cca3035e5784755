"""The fit of a scaling law against the usual way of writing it: seconds, and how many starts reach the optimum.

    python benchmarks/scaling_fit.py

Both minimise the sum of Huber(log L) over the 240 points of Besiroglu et al. 2024 by scipy's L-BFGS-B from the same starts.
The reference is written as in Hoffmann et al. 2022, section D.3: log-sum-exp of (log A - alpha log N, log B - beta log D,
log E), with scipy's own finite differences and its default tolerances. The last line is one JSON object.
"""

import sys
from pathlib import Path

# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import math
import time

import numpy as np
from scipy.optimize import minimize

from benchmarks._common import print_environment
from steerscale.planning.scaling_fit import SAME, STARTS, fit_law
from steerscale.planning.scaling_points import read_points, without_highest

POINTS = Path(__file__).resolve().parent.parent / "tests" / "planning" / "chinchilla_points.csv"
DELTA = 1e-3


def main() -> None:
    """Measure and print."""
    environment = print_environment("scipy", "numpy")
    points = without_highest(read_points(POINTS), 5)
    log_n = np.log([point.parameters for point in points])
    log_d = np.log([point.tokens for point in points])
    log_loss = np.log([point.loss for point in points])

    def objective(x: np.ndarray) -> float:
        a, b, e, alpha, beta = x
        error = np.abs(np.logaddexp.reduce([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)]) - log_loss)
        return float(np.where(error <= DELTA, error**2 / 2, DELTA * (error - DELTA / 2)).sum())

    begin = time.perf_counter()
    fit = fit_law(points)
    ours = time.perf_counter() - begin

    begin = time.perf_counter()
    found = []
    lowest, mean = math.exp(log_loss.min()), math.exp(log_loss.mean())
    for alpha, beta, share in STARTS:
        half = math.log((mean - share * lowest) / 2)
        start = [half + alpha * log_n.mean(), half + beta * log_d.mean(), math.log(share * lowest), alpha, beta]
        found.append(minimize(objective, start, method="L-BFGS-B").fun)
    reference = time.perf_counter() - begin

    result = {
        "environment": environment,
        "starts": len(STARTS),
        "ours": {"seconds": ours, "objective": fit.objective, "agreeing": fit.agreeing},
        "reference": {
            "seconds": reference,
            "objective": min(found),
            "agreeing": sum(value <= fit.objective * (1 + SAME) for value in found),
        },
        "ratio": reference / ours,
    }
    for name in ("ours", "reference"):
        row = result[name]
        print(
            f"{name:<10}{row['seconds']:>8.2f} s  best {row['objective']:.9f}  at the optimum {row['agreeing']}/{len(STARTS)}"
        )
    print(f"reference's seconds / ours: {result['ratio']:.2f} (no limit: compared)")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
