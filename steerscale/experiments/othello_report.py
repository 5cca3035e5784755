"""Tables and plots of the Othello experiment."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.experiments.othello_config import OthelloConfig
from steerscale.experiments.stages import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = {
    "null": "none (null intervention)",
    "mine": "mine/theirs, every layer from the first",
    "one_layer": "mine/theirs, that first layer only",
    "colour": "black/white, every layer from the first",
    "random": "random direction of the same length",
}


def report(config: OthelloConfig, results: dict[str, Results], root: Path) -> str:
    """Write othello.png; returns the tables."""
    _plot(root / "othello.png", results)
    return "\n".join(
        [*_legality(results), "", *_probes(results["probes"]), "", *_interventions(results["interventions"])]
    )


def _legality(results: dict[str, Results]) -> list[str]:
    found, seen = results["legality"], results["train"]["games_seen"]
    return [
        f"{seen:,} games seen; {found['games']} held-out games:",
        f"illegal first choices {found['illegal_first_choice']:.2%} +- {found['illegal_first_choice_sem']:.2%} (a random move: "
        f"{found['chance']:.1%}), probability of illegal moves {found['illegal_probability']:.2%}",
        f"loss {found['loss']:.4f} nats a move; who knows the rules has {found['loss_of_the_rules']:.4f}",
    ]


def _probes(found: Results) -> list[str]:
    lines = [
        "accuracy of linear probes, all squares (squares with a disc)",
        f"{'':<26}{'mine/theirs':>18}{'black/white':>18}{'mine/theirs, untrained':>26}",
    ]
    for hook in found["trained"]["mine"]:
        cells = [found["trained"]["mine"][hook], found["trained"]["colour"][hook], found["untrained"]["mine"][hook]]
        texts = [f"{cell['accuracy']:.1%} ({cell['accuracy_on_discs']:.1%})" for cell in cells]
        lines.append(f"{hook:<26}{texts[0]:>18}{texts[1]:>18}{texts[2]:>26}")
    texts = [f"{cell['accuracy']:.1%} ({cell['accuracy_on_discs']:.1%})" for cell in found["majority"].values()]
    return [*lines, f"{'most frequent class':<26}{texts[0]:>18}{texts[1]:>18}"]


def _interventions(found: Results) -> list[str]:
    chosen = found["chosen"]["mine"]
    lines = [
        f"a flipped disc: {found['cases']['reporting']} cases, {found['legal_after']:.1f} legal moves after it, "
        f"{found['changed_moves']:.1f} other than before; first {chosen['first']}, margin {chosen['margin']:g}",
        f"{'edit':<42}{'errors':>15}{'none':>8}{'newly legal':>13}{'no longer':>11}",
    ]
    for name, title in ROWS.items():
        row = found["reported"][name]
        error = f"{row['error']:.2f} +- {row['sem']:.2f}"
        lines.append(
            f"{title:<42}{error:>15}{row['perfect']:>8.1%}{row['probability_newly_legal']:>13.1%}"
            f"{row['probability_no_longer_legal']:>11.1%}"
        )
    return lines


def _plot(path: Path, results: dict[str, Results]) -> None:
    from matplotlib.figure import Figure  # the library's own figure, not pyplot's: no display, nothing global

    figure = Figure(figsize=(14, 4), layout="constrained", dpi=110)
    moves, layers, edits = figure.subplots(1, 3)
    by_move = results["legality"]["illegal_by_move"]
    shown = [(number + 1, value) for number, value in enumerate(by_move) if value is not None]
    moves.plot([x for x, _ in shown], [100 * y for _, y in shown], color="tab:blue")
    moves.set(title="illegal first choices", xlabel="moves played", ylabel="%", ylim=(0, None))
    _plot_probes(layers, results["probes"])
    _plot_edits(edits, results["interventions"])
    figure.savefig(path)


def _plot_probes(axes: "Axes", found: Results) -> None:
    curves: list[tuple[str, Any, str]] = [
        ("mine/theirs", found["trained"]["mine"], "o-"),
        ("black/white", found["trained"]["colour"], "s-"),
        ("mine/theirs, untrained", found["untrained"]["mine"], "x--"),
    ]
    for label, values, style in curves:
        axes.errorbar(
            range(len(values)),
            [100 * value["accuracy_on_discs"] for value in values.values()],
            yerr=[100 * value["sem_on_discs"] for value in values.values()],
            fmt=style,
            label=label,
        )
    axes.axhline(
        100 * found["majority"]["mine"]["accuracy_on_discs"], color="grey", linestyle=":", label="most frequent owner"
    )
    axes.set(title="linear probes, squares with a disc", xlabel="blocks before", ylabel="accuracy, %")
    axes.legend(fontsize=8)


def _plot_edits(axes: "Axes", found: Results) -> None:
    rows = list(found["by_first_layer"].values())
    axes.errorbar(
        range(1, len(rows) + 1),
        [row["error"] for row in rows],
        yerr=[row["sem"] for row in rows],
        fmt="o-",
        label="mine/theirs",
    )
    for name, color in (("null", "black"), ("random", "tab:red"), ("colour", "tab:orange")):
        row = found["reported"][name]
        axes.axhline(row["error"], color=color, linestyle="--", label=ROWS[name])
        axes.axhspan(row["error"] - row["sem"], row["error"] + row["sem"], color=color, alpha=0.15)
    axes.set(
        title="flipped disc", xlabel="first edited block", ylabel="errors against the edited board", ylim=(0, None)
    )
    axes.legend(fontsize=8)
