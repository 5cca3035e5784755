"""Scaling laws as pictures: a fit with its points, and a budget's loss by model size."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.config import require
from steerscale.errors import SteerscaleError
from steerscale.planning.scaling_fit import Fit
from steerscale.planning.scaling_frontier import Frontier
from steerscale.planning.scaling_laws import CHINCHILLA_3, REFIT, Optimum, tokens_for
from steerscale.planning.scaling_plan import Row
from steerscale.planning.scaling_points import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SUFFIXES = (".png", ".svg", ".pdf")


def plot_plan(path: Path, flops: float, rows: Sequence[Row], chosen: Optimum) -> None:
    """Loss over model size at a budget, by the refit and by Chinchilla's approach 3, with each law's size."""
    figure = _figure(7.5, 4.5)
    axes: Axes = figure.subplots()
    sizes = [row.parameters for row in rows]
    low, high = min(*sizes, chosen.parameters) / 4, max(*sizes, chosen.parameters) * 2
    grid = [low * (high / low) ** (step / 200) for step in range(201)]
    for name, law, color in (("refit", REFIT, "#0b72c4"), ("Chinchilla 3", CHINCHILLA_3, "#c46a0b")):
        axes.plot(grid, [law.loss(n, tokens_for(flops, n)) for n in grid], label=f"loss by {name}", color=color)
    for index, row in enumerate(rows):
        if row.law == "reconciled":
            continue
        axes.axvline(row.parameters, color="#808080", linewidth=0.8, linestyle=":")
        axes.annotate(
            row.law,
            (row.parameters, 0.97 - 0.06 * (index % 5)),
            xycoords=("data", "axes fraction"),
            fontsize=8,
        )
    axes.plot([chosen.parameters], [REFIT.loss(chosen.parameters, chosen.tokens)], "o", color="#0b72c4", label="chosen")
    axes.set(xscale="log", xlabel="parameters", ylabel="loss, nats a token", title=f"{flops:.3g} FLOPs")
    axes.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def plot_fit(
    path: Path,
    fit: Fit,
    points: Sequence[Point],
    frontiers: Mapping[str, Frontier | str],
    *,
    held_out: Sequence[Point] = (),
) -> None:
    """Three panels: measured against predicted loss; IsoFLOP parabolas, or where there are none the law's curves of each
    size; best size by budget from each method."""
    figure = _figure(14, 4.3)
    measured, valleys, best = figure.subplots(1, 3)
    _measured(measured, fit, points, held_out)
    found = frontiers.get("IsoFLOP")
    if isinstance(found, Frontier):
        _valleys(valleys, found, points)
    else:
        _curves(valleys, fit, points, held_out)
    _best(best, fit, points, frontiers)
    _save(figure, path)


def _measured(axes: "Axes", fit: Fit, points: Sequence[Point], held_out: Sequence[Point]) -> None:
    predicted = [fit.law.loss(point.parameters, point.tokens) for point in points]
    colors = [math.log10(point.flops) for point in points]
    drawn = axes.scatter([point.loss for point in points], predicted, c=colors, s=14, cmap="viridis", label="fitted")
    axes.figure.colorbar(drawn, ax=axes, label="log10 FLOPs")  # pyright: ignore[reportAttributeAccessIssue]
    for index, point in enumerate(held_out):
        value, interval = fit.predict(point.parameters, point.tokens)
        error = None if interval is None else [[max(value - interval[0], 0)], [max(interval[1] - value, 0)]]
        label = "held out" if index == 0 else None
        axes.errorbar([point.loss], [value], yerr=error, fmt="D", color="#c4260b", capsize=3, label=label)
    ends = [min(point.loss for point in (*points, *held_out)), max(point.loss for point in (*points, *held_out))]
    axes.plot(ends, ends, color="#808080", linewidth=0.8)
    axes.set(xlabel="measured loss, nats a token", ylabel="predicted", title="parametric fit")
    axes.legend(fontsize=8)


def _curves(axes: "Axes", fit: Fit, points: Sequence[Point], held_out: Sequence[Point]) -> None:
    """Loss over compute: the law's curve of each size, with its models."""
    ends = [min(p.flops for p in (*points, *held_out)) / 1.5, max(p.flops for p in (*points, *held_out)) * 1.5]
    grid = [ends[0] * (ends[1] / ends[0]) ** (step / 100) for step in range(101)]
    sizes = sorted({point.parameters for point in points})
    for place, size in enumerate(sizes):
        color = f"C{place % 10}"
        own = [point for point in points if point.parameters == size]
        around = [flops for flops in grid if flops > min(point.flops for point in own) / 1.5]
        axes.plot(around, [fit.law.loss(size, tokens_for(flops, size)) for flops in around], color=color, linewidth=0.9)
        axes.plot([p.flops for p in own], [p.loss for p in own], "o", color=color, markersize=4, label=f"{size:.3g}")
    for index, point in enumerate(held_out):
        value, interval = fit.predict(point.parameters, point.tokens)
        error = None if interval is None else [[max(value - interval[0], 0)], [max(interval[1] - value, 0)]]
        names = ("predicted", f"held out, {point.parameters:.3g}") if index == 0 else (None, None)
        axes.errorbar([point.flops], [value], yerr=error, fmt="_", color="#c4260b", capsize=3, label=names[0])
        axes.plot([point.flops], [point.loss], "D", color="#c4260b", markersize=5, label=names[1])
    axes.set(xscale="log", xlabel="FLOPs, 6 N D", ylabel="loss, nats a token", title="the law's curve of each size")
    axes.legend(fontsize=7, title="parameters", title_fontsize=7)


def _valleys(axes: "Axes", frontier: Frontier, points: Sequence[Point]) -> None:
    axes.scatter([p.parameters for p in points], [p.loss for p in points], s=8, color="#b8c4cf")
    for one in frontier.best:
        assert one.parabola is not None
        c2, c1, c0 = one.parabola
        offsets = [-1.2 + 0.1 * step for step in range(25)]
        sizes = [one.parameters * math.exp(offset) for offset in offsets]
        axes.plot(sizes, [c2 * x * x + c1 * x + c0 for x in offsets], linewidth=1)
        axes.plot([one.parameters], [one.loss], "k.", markersize=5)
    axes.set(xscale="log", xlabel="parameters", ylabel="loss, nats a token", title="IsoFLOP parabolas")


def _best(axes: "Axes", fit: Fit, points: Sequence[Point], frontiers: Mapping[str, Frontier | str]) -> None:
    ends = [min(point.flops for point in points), max(point.flops for point in points)]
    lines: list[tuple[str, Any, float]] = [("parametric", fit.law, fit.law.exponent)]
    lines += [(name, found.law, found.law.exponent) for name, found in frontiers.items() if isinstance(found, Frontier)]
    lines.append(("published refit", REFIT, REFIT.exponent))
    for index, (name, law, exponent) in enumerate(lines):
        sizes = [law.optimum(flops).parameters for flops in ends]
        style = ("-", "--", "-.", ":")[index % 4]
        (line,) = axes.plot(ends, sizes, label=f"{name}: a = {exponent:.3f}", linestyle=style)
        found = frontiers.get(name)
        if isinstance(found, Frontier):
            flops = [one.flops for one in found.best]
            axes.plot(flops, [one.parameters for one in found.best], ".", markersize=5, color=line.get_color())
    axes.set(
        xscale="log", yscale="log", xlabel="FLOPs", ylabel="best number of parameters", title="best size by budget"
    )
    axes.legend(fontsize=8)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # the library's own figure, not pyplot's: no display, nothing global

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def check_picture(path: Path) -> None:
    """Raises ConfigError unless a picture can be written at `path`: before the work, not after it."""
    require(path.suffix in SUFFIXES, f"--plot {path} must end in one of {', '.join(SUFFIXES)}")
    require(path.parent.is_dir(), f"--plot {path}: there is no directory {path.parent}")


def _save(figure: "Figure", path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(temporary, format=path.suffix[1:])
        temporary.replace(path)
    except OSError as error:
        raise SteerscaleError(f"--plot {path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
