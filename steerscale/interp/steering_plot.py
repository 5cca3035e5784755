"""A picture of what steering does to the next token."""

from collections.abc import Sequence
from pathlib import Path

from steerscale.interp.steering import Effect


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
