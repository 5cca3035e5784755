"""`steerscale scaling fit`: trained models -> a law with intervals, IsoFLOP parabolas, an envelope, pictures."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from steerscale.planning.scaling_frontier import Frontier
    from steerscale.planning.scaling_points import Point


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "fit",
        help="a scaling law of your own runs",
        description="Fit L = E + A/N^alpha + B/D^beta, IsoFLOP parabolas and the envelope to finished runs or a csv file with "
        "the columns loss and two of parameters, tokens, flops. The methods: docs/scaling_laws.md.",
    )
    add = parser.add_argument
    add("sources", type=Path, nargs="+", metavar="RUNS|CSV", help="run directories, directories of them, or csv files")
    add("--drop-highest", type=int, default=0, metavar="N", help="leave out the N points of highest loss")
    add("--hold-out", type=int, default=0, metavar="N", help="leave out the N points of most compute, and predict them")
    add(
        "--bootstrap",
        type=int,
        default=200,
        metavar="N",
        help="draws for the intervals; 0: none (default: %(default)s)",
    )
    add("--level", type=float, default=0.9, metavar="X", help="of the intervals (default: %(default)s)")
    add("--delta", type=float, default=1e-3, metavar="X", help="of the Huber loss of log L (default: %(default)s)")
    add(
        "--tolerance", type=float, default=0.1, metavar="X", help="IsoFLOP: spread of one budget (default: %(default)s)"
    )
    add(
        "--per-decade",
        type=int,
        default=4,
        metavar="N",
        help="envelope: budgets in a factor of 10 (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    add("--flops", type=float, nargs="+", metavar="C", help="budgets to show the best N and D for")
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", type=Path, metavar="FILE", help="write a picture of points, parabolas and best sizes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fit and print."""
    from steerscale.planning.scaling_fit import NAMES, fit_law
    from steerscale.planning.scaling_plots import check_picture, plot_fit

    if args.plot is not None:
        check_picture(args.plot)
    points, moments, warnings = _read(args)
    held_out: list[Point] = []
    if args.hold_out:
        if not 0 < args.hold_out < len(points):
            raise ConfigError(
                f"--hold-out must be between 0 and {len(points) - 1} for {len(points)} points, got {args.hold_out}"
            )
        points.sort(key=lambda point: point.flops)
        points, held_out = points[: -args.hold_out], points[-args.hold_out :]
        names = {point.name for point in held_out}
        moments = [point for point in moments if point.name not in names]
    fit = fit_law(points, delta=args.delta, bootstrap=args.bootstrap, level=args.level, seed=args.seed)
    warnings += fit.warnings
    frontiers = _frontiers(args, points, moments, warnings)
    predictions = []
    for point in held_out:
        predicted, interval = fit.predict(point.parameters, point.tokens, seed=args.seed)
        predictions.append({**dataclasses.asdict(point), "predicted": predicted, "interval": interval})
    if args.plot is not None:
        plot_fit(args.plot, fit, points, frontiers, held_out=held_out)
    best = [{"flops": flops, **dataclasses.asdict(fit.law.optimum(_positive(flops)))} for flops in args.flops or ()]
    if not args.json:
        from steerscale.cli.scaling_text import amount, format_fit

        print(format_fit(fit, frontiers, predictions, warnings))
        for one in best:
            print(f"{one['flops']:.3g} FLOPs: {amount(one['parameters'])} parameters on {amount(one['tokens'])} tokens")
        return
    answer = {
        "law": dataclasses.asdict(fit.law),
        "exponent": fit.law.exponent,
        "intervals": {name: fit.interval(name) for name in (*NAMES, "exponent")},
        "level": fit.level,
        "points": fit.points,
        "objective": fit.objective,
        "rms": fit.rms,
        "starts": {"all": fit.starts, "agreeing": fit.agreeing},
        "frontiers": {
            name: {"reason": found} if isinstance(found, str) else dataclasses.asdict(found)
            for name, found in frontiers.items()
        },
        "held_out": predictions,
        "best": best,
        "warnings": warnings,
    }
    print(json.dumps(answer, indent=1))


def _read(args: argparse.Namespace) -> "tuple[list[Point], list[Point], list[str]]":
    """Points for the fit, points for the envelope, and sentences about what was left out."""
    from steerscale.planning.scaling_points import read_points, without_highest

    files = [path for path in args.sources if path.is_file()]
    directories = [path for path in args.sources if path not in files]
    points = [point for path in files for point in read_points(path)]
    moments, warnings = list(points), []
    if directories:
        from steerscale.cli.scaling_runs import points_of_runs

        of_runs, warnings = points_of_runs(directories)
        points += of_runs
        moments += points_of_runs(directories, moments=True)[0]
    if args.drop_highest:
        points = without_highest(points, args.drop_highest)
        if not directories:
            moments = points
    return points, moments, warnings


def _frontiers(
    args: argparse.Namespace, points: "list[Point]", moments: "list[Point]", warnings: list[str]
) -> "dict[str, Frontier | str]":
    """Both frontiers, or why there is none: few sets of runs have what all methods need."""
    from steerscale.planning.scaling_frontier import envelope, isoflop

    options = {"bootstrap": args.bootstrap, "level": args.level, "seed": args.seed}
    found: dict[str, Frontier | str] = {}
    for name, fit in (
        ("IsoFLOP", lambda: isoflop(points, tolerance=args.tolerance, **options)),
        ("envelope", lambda: envelope(moments, per_decade=args.per_decade, **options)),
    ):
        try:
            found[name] = frontier = fit()
        except DataError as error:
            found[name] = str(error)
            continue
        shown = frontier.warnings[:2]
        warnings += [f"{name}: {sentence}" for sentence in shown]
        if len(frontier.warnings) > len(shown):
            warnings.append(f"{name}: and {len(frontier.warnings) - len(shown)} more budgets left out")
    return found


def _positive(flops: float) -> float:
    if not 0 < flops < float("inf"):
        raise ConfigError(f"--flops must be positive, got {flops:g}")
    return flops
