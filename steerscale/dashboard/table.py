"""Tables of runs: for the terminal, for documents, for programs. Torch-free."""

import csv
import io
from collections.abc import Sequence

from steerscale.dashboard.figures import BY_KEY, FIGURES, Figure, figures_of, worth_showing, write
from steerscale.dashboard.runs import BrokenRun, Run, flatten

COLUMNS: tuple[Figure, ...] = tuple(
    BY_KEY[key]
    for key in (
        *("run", "layout", "engine", "state", "step", "loss", "valid_loss", "bits_per_byte", "seconds_per_step"),
        *("tokens_per_second_per_gpu", "model_tflops_per_gpu", "legacy_tflops_per_gpu", "mfu", "bubble_fraction"),
        "memory_peak_gib_max",
    )
)
"""What fits beside each other in a terminal."""

NOTES = (
    "medians over the reports of each run, warm-up excluded; TFLOP/s per rank: model = exact model FLOPs, legacy = the "
    "formula of OpenGPT-X's tag (docs/throughput.md); MFU only where the device's peak is known"
)


def format_table(runs: Sequence[Run], broken: Sequence[BrokenRun] = ()) -> str:
    """Runs as rows, figures as columns, and what the figures are; then what could not be read."""
    values = [figures_of(run) for run in runs]
    columns = worth_showing(COLUMNS, values)
    rows = [[f.title for f in columns], *([write(f, known[f.key]) for f in columns] for known in values)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join([*lines, "", NOTES, *(f"not read: {entry.path}: {entry.reason}" for entry in broken)])


def format_evaluations(run: Run) -> str:
    """How the loss on held-out text went."""
    lines = [f"{'step':>8}  {'valid loss':>10}  {'perplexity':>10}  {'bits/byte':>9}"]
    lines += [
        f"{record['step']:>8,}  "
        + "  ".join(
            "-".rjust(width) if record.get(key) is None else format(record[key], f">{width},{digits}")
            for key, width, digits in (("loss", 10, ".4f"), ("perplexity", 10, ".1f"), ("bits_per_byte", 9, ".4f"))
        )
        for record in run.evaluations
    ]
    return "\n".join(lines)


def format_markdown(runs: Sequence[Run], broken: Sequence[BrokenRun] = ()) -> str:
    """A Markdown table of the figures a report shows, and what could not be read."""
    values = [figures_of(run) for run in runs]
    shown = worth_showing([figure for figure in FIGURES if figure.shown], values)
    rows = [[figure.title for figure in shown], ["---" if not figure.form else "---:" for figure in shown]]
    rows += [[_cell(write(figure, known[figure.key])) for figure in shown] for known in values]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", NOTES, *(f"- not read: {_cell(f'{b.path}: {b.reason}')}" for b in broken)])


def format_csv(runs: Sequence[Run]) -> str:
    """All figures and all configuration keys, unrounded, a run a line; empty is unknown."""
    configs = [flatten(run.config) for run in runs]
    keys = sorted({key for config in configs for key in config})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", *(figure.key for figure in FIGURES), *(f"config.{key}" for key in keys)])
    for run, config in zip(runs, configs):
        writer.writerow([run.path, *figures_of(run).values(), *(config.get(key) for key in keys)])
    return file.getvalue()


def _cell(text: str) -> str:
    return " ".join(text.splitlines()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
