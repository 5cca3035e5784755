"""A picture of probes by layer: held-out accuracy, that of the control task, and the difference."""

from collections.abc import Sequence
from pathlib import Path

from steerscale.interp.probes.probe import Probe

FIGURES = {"accuracy": "held-out accuracy", "control_accuracy": "control task", "selectivity": "selectivity"}


def plot_probes(path: Path, probes: Sequence[Probe], *, title: str) -> None:
    """Write a picture (its kind by the suffix) of the probes' figures over their hook points, in the order given."""
    from matplotlib.figure import Figure  # the library's own figure, not pyplot's: no display, nothing global

    hooks = list(dict.fromkeys(probe.hook for probe in probes))
    kinds = list(dict.fromkeys(probe.kind for probe in probes))
    figures = [name for name in FIGURES if any(name in probe.about for probe in probes)]
    picture = Figure(figsize=(4.2 * len(figures), 3.8), layout="constrained", dpi=110)
    for axes, figure in zip(picture.subplots(1, len(figures), squeeze=False)[0], figures):
        for number, kind in enumerate(kinds):
            found = {
                probe.hook: probe.about[figure] for probe in probes if probe.kind == kind and figure in probe.about
            }
            places = [index for index, hook in enumerate(hooks) if hook in found]
            axes.plot(places, [found[hooks[index]] for index in places], "o-", ms=3.5, color=f"C{number}", label=kind)
        if figure == "accuracy" and probes:
            axes.axhline(probes[0].about["majority"], color="gray", ls=":", label="most frequent class")
        every = max(len(hooks) // 8, 1)
        axes.set_xticks(range(0, len(hooks), every), [_short(hook) for hook in hooks[::every]], rotation=60, fontsize=7)
        axes.set(title=FIGURES[figure])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    picture.suptitle(title.replace("$", r"\$"), fontsize=10)
    picture.savefig(path)


def _short(hook: str) -> str:
    """blocks.7.hook_resid_post -> 7 resid_post."""
    return hook.removeprefix("blocks.").replace(".hook_", " ")
