"""Pictures of what steering does: to the next token, and to texts over strengths."""

from collections.abc import Sequence
from pathlib import Path

from steerscale.config import require
from steerscale.interp.steering import Effect
from steerscale.interp.sweep import Point


def check_picture(path: Path) -> None:
    """Raise ConfigError for a suffix that no picture can have, before there is anything to draw."""
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    require(
        path.suffix.lower().removeprefix(".") in ("", *kinds),
        f"{path} cannot be a picture: its name must end in one of {', '.join(sorted(kinds))}",
    )


def plot_effect(
    path: Path, effect: Effect, labels: Sequence[str], rows: Sequence[tuple[int, float, float]], *, title: str
) -> None:
    """Write a picture (its kind by the suffix) of the probabilities before and after.

    Args:
        labels: what to write at each of the rows.
        rows: of `Effect.rows`.
    """
    from matplotlib.figure import Figure  # the library's own figure, not pyplot's: no display, nothing global

    picture = Figure(figsize=(7, 1.2 + 0.32 * len(rows)), layout="constrained", dpi=110)
    axes = picture.subplots()
    places = range(len(rows))
    axes.barh(
        [place - 0.2 for place in places], [before for _, before, _ in rows], 0.38, label="before", color="tab:gray"
    )
    axes.barh([place + 0.2 for place in places], [after for *_, after in rows], 0.38, label="after", color="tab:orange")
    axes.set_yticks(list(places), [label.replace("$", r"\$") for label in labels])
    axes.invert_yaxis()
    axes.set(xlabel="probability of the next token", title=f"{title}\nKL {effect.kl:.3g} nats".replace("$", r"\$"))
    axes.legend()
    picture.savefig(path)


def plot_sweep(path: Path, points: Sequence[Point], *, title: str) -> None:
    """Write a picture (its kind by the suffix): figures over strength, a line a method, and effect against fluency."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 7), layout="constrained", dpi=100)
    axes = picture.subplots(2, 3).flatten()
    none = points[0]
    methods = list(dict.fromkeys(point.method for point in points[1:]))
    panels = (("target", "log"), ("kl", "linear"), ("concept", "linear"), ("perplexity", "log"), ("combined", "linear"))
    for number, method in enumerate(methods):
        own = [point for point in points if point.method == method]
        lone = len(own) == 1
        line = own if lone else [none, *own]
        style = {"color": f"C{number}", "marker": "*" if lone else "o", "markersize": 10 if lone else 4}
        for panel, (figure, _) in zip(axes, panels):
            panel.plot(
                [point.strength for point in line], [getattr(point, figure) for point in line], label=method, **style
            )
        axes[5].plot([point.concept for point in line], [point.fluency for point in line], label=method, **style)
    for panel, (figure, scale) in zip(axes, panels):
        panel.set(xlabel="strength", title=figure, yscale=scale)
    axes[5].set(xlabel="concept", ylabel="fluency", title="fluency against concept")
    axes[5].legend(fontsize="small")
    picture.suptitle(title.replace("$", r"\$"))
    picture.savefig(path)
