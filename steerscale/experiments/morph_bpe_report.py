"""Table and plot of the experiment with morphological BPE."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from steerscale.experiments.morph_bpe_config import MorphBPEConfig
from steerscale.experiments.stages import Results

DOMAINS = ("in_domain", "out_of_domain")


def report(config: MorphBPEConfig, results: dict[str, Results], root: Path) -> str:
    """Write morph_bpe.png; returns the table, whose differences are paired by seed with the first tokenizer."""
    _plot(root / "morph_bpe.png", config, results["evaluate"])
    lines = [
        f"bits per byte after {config.seen_bytes / 1e6:.2f} MB, mean of {config.seeds} seeds +- standard error; difference to "
        f"{next(iter(config.tokenizers))}, paired by seed",
        f"{'':<18}{'in domain':>17}{'difference':>19}{'out of domain':>17}{'difference':>19}{'tokens/word':>13}{'F1':>7}"
        f"{'steps':>7}",
    ]
    for language in config.languages:
        first = next(iter(results["evaluate"][language].values()))
        for kind, values in results["evaluate"][language].items():
            cells = "".join(
                f"{spoken(values[d]):>17}{spoken(paired(values[d], first[d]), sign=True):>19}" for d in DOMAINS
            )
            cut = results["tokenizers"][language][kind]
            f1 = f"{cut['gold']['f1']:.3f}" if cut["gold"] else "-"
            lines.append(
                f"{language + ' ' + kind:<18}{cells}{cut['text']['in_domain']['fertility']:>13.3f}{f1:>7}"
                f"{results['train'][language][kind]['steps']:>7}"
            )
    return "\n".join(lines)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; None of a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def paired(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Differences, seed by seed."""
    return [one - other for one, other in zip(values, others)]


def spoken(values: Sequence[float], *, sign: bool = False) -> str:
    """Mean +- standard error."""
    mean, error = mean_and_error(values)
    text = f"{mean:+.4f}" if sign else f"{mean:.4f}"
    return text if error is None else f"{text} +- {error:.4f}"


def _plot(path: Path, config: MorphBPEConfig, found: Results) -> None:
    from matplotlib.figure import Figure  # the library's own figure, not pyplot's: no display, nothing global

    figure = Figure(figsize=(5 * len(config.languages), 4), layout="constrained", dpi=110)
    for axes, language in zip(figure.subplots(1, len(config.languages), squeeze=False)[0], config.languages):
        for number, domain in enumerate(DOMAINS):
            for place, values in enumerate(found[language].values()):
                mean, error = mean_and_error(values[domain])
                x = place + 0.3 * (number - 0.5)
                color = ("tab:blue", "tab:orange")[number]
                label = domain.replace("_", " ") if place == 0 else None
                axes.errorbar(x, mean, yerr=error, fmt="o", capsize=4, color=color, label=label)
                axes.plot([x] * len(values[domain]), values[domain], "_", color=color, alpha=0.5)
        axes.set_xticks(range(len(found[language])), list(found[language]))
        axes.set(title=language, ylabel="bits per byte")
        axes.legend(fontsize=8)
    figure.savefig(path)
