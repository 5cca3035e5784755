"""Tables and plots of the superposition experiment."""

from pathlib import Path
from typing import TYPE_CHECKING

from steerscale.experiments.stages import Results
from steerscale.experiments.superposition_config import SuperpositionConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def report(config: SuperpositionConfig, results: dict[str, Results], root: Path) -> str:
    """Write superposition.png and steering.png; returns the tables."""
    _plot_toys(root / "superposition.png", results, config)
    _plot_steering(root / "steering.png", results["steering"])
    recovery = results["recovery"][str(config.dictionary.main)]
    parts = [_sweep(results["sweep"]), _recovery(recovery, config), _steering(results["steering"])]
    return "\n\n".join("\n".join(part) for part in parts)


def _cell(value: list[float], digits: int = 2) -> str:
    return f"{value[0]:.{digits}f} +- {value[1]:.{digits}f}"


def _sweep(found: Results) -> list[str]:
    lines = [
        f"of {found['features']} features, stored in {found['hidden']} dimensions",
        f"{'active':>8}{'features':>16}",
    ]
    return lines + [
        f"{active:>8g}{_cell(stored, 1):>16}" for active, stored in zip(found["active"], found["represented"])
    ]


def _recovery(found: Results, config: SuperpositionConfig) -> list[str]:
    settings = config.dictionary
    lines = [
        f"{settings.features} features in {settings.hidden} dimensions, each active with probability {settings.main:g}; "
        "* knows the features",
        f"{'directions':<24}{'mean max cosine':>18}{'matched cosine':>18}{'recovered':>16}{'L0':>7}{'variance':>10}",
    ]
    for name, row in found.items():
        l0 = f"{row['l0'][0]:.1f}" if "l0" in row else ""
        explained = f"{row['variance_explained'][0]:.1%}" if "variance_explained" in row else ""
        lines.append(
            f"{name:<24}{_cell(row['mean_max_cosine'], 3):>18}{_cell(row['matched_cosine'], 3):>18}"
            f"{_cell(row['recovered']):>16}{l0:>7}{explained:>10}"
        )
    return lines


def _steering(found: Results) -> list[str]:
    lines = ["error left by steering, in / out of distribution (1: no steering)"]
    lines.append(f"{'correlation':<26}" + "".join(f"{correlation:>20}" for correlation in found))
    for method in next(iter(found.values())):
        cells = [
            f"{rows[method]['inside'][0]:.2f} / {rows[method]['outside'][0]:.2f} +-{rows[method]['outside'][1]:.2f}"
            for rows in found.values()
        ]
        lines.append(f"{method:<26}" + "".join(f"{cell:>20}" for cell in cells))
    lines.append("how much of B comes with A, out of distribution")
    return lines + [
        f"{method:<26}" + "".join(f"{_cell(rows[method]['side_effect']):>20}" for rows in found.values())
        for method in next(iter(found.values()))
    ]


def _plot_toys(path: Path, results: dict[str, Results], config: SuperpositionConfig) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # the library's own figure, not pyplot's: no display, nothing global

    figure = Figure(figsize=(15, 4.2), layout="constrained", dpi=110)
    stored, phase, recovery = figure.subplots(1, 3)
    sweep, grid = results["sweep"], results["phase"]
    stored.errorbar(
        [1 / active for active in sweep["active"]],
        [mean for mean, _ in sweep["represented"]],
        yerr=[sem for _, sem in sweep["represented"]],
        fmt="o-",
    )
    stored.axhline(sweep["hidden"], color="grey", linestyle=":", label="dimensions")
    stored.axhline(sweep["features"], color="black", linestyle=":", label="features")
    stored.set(xscale="log", xlabel="1 / probability of being active", ylabel="features stored", title="superposition")
    stored.legend(fontsize=8)
    colors = ["#d9d9d9", "#0b72c4", "#e0762a"]
    active, importance = ([1 / p for p in grid["active"]], grid["importance"])
    phase.pcolormesh(active, importance, grid["phase"], cmap=ListedColormap(colors), vmin=0, vmax=2)
    phase.set(
        xscale="log",
        yscale="log",
        xlabel="1 / probability of being active",
        ylabel="importance of the second feature",
        title="two features, one dimension",
    )
    for label, color in zip(("second not stored", "second alone", "superposition"), colors):
        phase.plot([], [], "s", color=color, label=label)
    phase.legend(fontsize=8)
    _plot_recovery(recovery, results["recovery"], config)
    figure.savefig(path)


def _plot_recovery(axes: "Axes", found: Results, config: SuperpositionConfig) -> None:
    sae = f"SAE {config.steering.architecture}"
    for name in (sae, "difference of means *", "logistic probes *", "PCA", "random directions"):
        axes.errorbar(
            [1 / float(active) for active in found],
            [rows[name]["matched_cosine"][0] for rows in found.values()],
            yerr=[rows[name]["matched_cosine"][1] for rows in found.values()],
            fmt="o-",
            label=name,
        )
    axes.set(
        xscale="log",
        xlabel="1 / probability of being active",
        ylabel="matched cosine",
        title="true directions found (*: supervised)",
        ylim=(0, 1.02),
    )
    axes.legend(fontsize=8)


def _plot_steering(path: Path, found: Results) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained", dpi=110)
    panels = figure.subplots(1, 3)
    titles = {
        "inside": "in distribution: A with what goes with it",
        "outside": "out of distribution: A alone",
        "side_effect": "out of distribution: how much of B comes with A",
    }
    for axes, (key, title) in zip(panels, titles.items()):
        for method in next(iter(found.values())):
            values = [rows[method][key] for rows in found.values()]
            axes.errorbar(
                [float(correlation) for correlation in found],
                [mean for mean, _ in values],
                yerr=[sem for _, sem in values],
                fmt="o-",
                label=method,
            )
        ylabel = "rise of B's output / rise of A's" if key == "side_effect" else "error left (1: no steering)"
        axes.set(title=title, xlabel="correlation in the data of the directions", ylabel=ylabel)
        if key != "side_effect":
            axes.axhline(1, color="grey", linestyle=":")
    panels[0].legend(fontsize=8)
    figure.savefig(path)
