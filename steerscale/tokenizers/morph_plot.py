"""The comparison of tokenizers as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_comparison(path: Path, found: Mapping[str, Any]) -> None:
    """Draw what `steerscale tokenizer eval` writes as eval.json: fertility by text, F1 over parts a word, shared vocabulary."""
    from matplotlib.figure import Figure  # the library's own figure, not pyplot's: no display, nothing global

    draw = [function for key, function in (("texts", _draw_texts), ("gold", _draw_gold)) if found[key]]
    if len(found["overlap"]) > 1:
        draw.append(_draw_overlap)
    figure = Figure(figsize=(5.5 * max(len(draw), 1), 4.5), layout="constrained", dpi=110)
    for axes, function in zip(figure.subplots(1, max(len(draw), 1), squeeze=False)[0], draw):
        function(axes, found)
    figure.savefig(path)


def _draw_texts(axes: "Axes", found: Mapping[str, Any]) -> None:
    texts = found["texts"]
    names = list(next(iter(texts.values())))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(texts))]
        axes.bar(places, [rows[name]["fertility"] for rows in texts.values()], width, label=name)
    axes.set_xticks(range(len(texts)), [Path(text).name.split(".txt")[0] for text in texts], rotation=20)
    axes.set(title="fertility", ylabel="tokens a word")
    axes.legend(fontsize=7)


def _draw_gold(axes: "Axes", found: Mapping[str, Any]) -> None:
    for name, scores in found["gold"].items():
        axes.plot(scores["parts"], scores["f1"], "o")
        axes.annotate(name, (scores["parts"], scores["f1"]), textcoords="offset points", xytext=(4, 4), fontsize=7)
    scores = next(iter(found["gold"].values()))
    axes.axvline(scores["morphemes"], color="grey", linestyle=":", label="gold")
    axes.set(title="borders of morphemes", xlabel="parts a gold word", ylabel="F1")
    axes.legend(fontsize=7)


def _draw_overlap(axes: "Axes", found: Mapping[str, Any]) -> None:
    names = list(found["overlap"])
    axes.imshow([list(row.values()) for row in found["overlap"].values()], vmin=0, vmax=1, cmap="Blues")
    for y, row in enumerate(found["overlap"].values()):
        for x, value in enumerate(row.values()):
            axes.text(
                x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > 0.6 else "black"
            )
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(title="share of vocabulary in common")
