"""Runs as one picture, for a talk or where there is no browser: throughput, step time, memory, loss. Torch-free."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steerscale.dashboard.curves import curves_of
from steerscale.dashboard.figures import BY_KEY, Value, figures_of, worth_showing, write
from steerscale.dashboard.runs import Run
from steerscale.errors import SteerscaleError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RUNS = 24
"""Bars beside each other that can still be told apart; of more runs those with the most tokens/s/GPU are drawn."""
MOST_CURVES = 8
"""Of those, the ones whose curves are drawn."""


def write_picture(path: Path, runs: Sequence[Run]) -> int:
    """Draw runs into a PNG file; returns how many were drawn, at most `MOST_RUNS`.

    Raises SteerscaleError without any run.
    """
    from matplotlib.figure import Figure  # the library's own figure, not pyplot's: no display, nothing global

    if not runs:
        raise SteerscaleError("there is no readable run to draw")
    drawn = sorted(runs, key=lambda run: -(run.median("tokens_per_second_per_gpu") or 0))[:MOST_RUNS]
    figures = [figures_of(run) for run in drawn]
    # A run's name is text: "$" would begin a formula.
    names = [name.replace("$", r"\$") for name in _names(drawn, figures)]
    picture = Figure(figsize=(13, 2.2 + 0.28 * len(drawn) + 4), layout="constrained", dpi=110)
    axes = picture.subplots(2, 3, gridspec_kw={"height_ratios": [1.2 + 0.28 * len(drawn), 4.0]})

    def values(key: str) -> list[float]:
        known = [entry[key] for entry in figures]
        return [value if isinstance(value, (int, float)) else float("nan") for value in known]

    _bars(axes[0, 0], names, {"model": values("model_tflops_per_gpu"), "legacy tag": values("legacy_tflops_per_gpu")})
    axes[0, 0].set_title("TFLOP/s/GPU")
    _bars(axes[0, 1], names, {"p50": values("seconds_p50"), "p95": values("seconds_p95")})
    axes[0, 1].set_title("seconds a step")
    _bars(
        axes[0, 2],
        names,
        {"measured": values("memory_peak_gib_max"), "predicted": values("memory_predicted_gib")},
    )
    axes[0, 2].set_title("peak memory, GiB")
    for axis in axes[0, 1:]:
        axis.set_yticklabels([])
    for axis, key, title in (
        (axes[1, 0], "tokens_per_second_per_gpu", "tokens/s/GPU"),
        (axes[1, 1], "mfu", "MFU"),
        (axes[1, 2], "loss", "training loss"),
    ):
        _curves(axis, list(zip(names, drawn[:MOST_CURVES])), key)
        axis.set_title(title)
    if axes[1, 2].lines:
        axes[1, 2].legend(fontsize=7)
    temporary = path.with_name(f".{path.name}.part")
    try:
        picture.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(drawn)


def _bars(axis: "Axes", names: Sequence[str], groups: dict[str, list[float]]) -> None:
    height = 0.8 / len(groups)
    for index, (label, values) in enumerate(groups.items()):
        places = [place + (index - (len(groups) - 1) / 2) * height for place in range(len(names))]
        axis.barh(places, values, height=height, label=label, color=("#0b72c4", "#b8c4cf")[index])
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)


def _curves(axis: "Axes", runs: Sequence[tuple[str, Run]], key: str) -> None:
    drawn = False
    for name, run in runs:
        curves = curves_of(run, points=400)
        values = curves[key]
        if not isinstance(values, list):
            values = [values] * len(curves["step"])
        if any(value is not None for value in values):
            drawn = True
            axis.plot(curves["step"], [float("nan") if v is None else v for v in values], linewidth=1, label=name)
    if not drawn:
        axis.text(0.5, 0.5, "unknown", ha="center", va="center", transform=axis.transAxes, color="gray")
    axis.set_xlabel(f"step, {len(runs)} runs")
    axis.spines[["top", "right"]].set_visible(False)


def _names(runs: Sequence[Run], figures: Sequence[Mapping[str, Value]]) -> list[str]:
    """The runs' names, with their engines where these differ."""
    names = [_shortened(run.name) for run in runs]
    if not worth_showing([BY_KEY["engine"]], figures):
        return names
    return [f"{name}, {write(BY_KEY['engine'], known['engine'])}" for name, known in zip(names, figures)]


def _shortened(name: str, length: int = 36) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
