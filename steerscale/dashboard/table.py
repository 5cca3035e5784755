"""A table of runs for the terminal. Torch-free."""

from collections.abc import Callable, Sequence

from steerscale.dashboard.runs import Run
from steerscale.metrics import format_seconds

Column = tuple[str, Callable[[Run], str]]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


COLUMNS: list[Column] = [
    ("run", lambda run: run.name),
    ("layout", lambda run: run.layout),
    ("state", lambda run: run.state),
    ("step", lambda run: f"{run.step:,}"),
    ("loss", lambda run: _number(run.last("loss"), ".3f")),
    ("valid", lambda run: _number(run.last_evaluation("loss"), ".3f")),
    ("bits/byte", lambda run: _number(run.last_evaluation("bits_per_byte"), ".3f")),
    ("s/step", lambda run: "-" if (s := run.median("seconds_per_step")) is None else format_seconds(s)),
    ("tok/s/rank", lambda run: _number(run.median("tokens_per_second_per_gpu"), ",.0f")),
    ("model TFLOP/s", lambda run: _number(run.median("model_tflops_per_gpu"), ".3g")),
    ("legacy TFLOP/s", lambda run: _number(run.median("legacy_tflops_per_gpu"), ".3g")),
    ("MFU", lambda run: _number(run.median("mfu"), ".1%")),
    ("bubble", lambda run: _number(run.last("bubble_fraction"), ".1%")),
    ("GiB max", lambda run: _number(run.last("memory_peak_gib_max"), ".2f")),
]

NOTES = (
    "medians over the reports of each run, warm-up excluded; TFLOP/s per rank: model = exact model FLOPs, legacy = the "
    "formula of OpenGPT-X's tag (docs/throughput.md); MFU only where the device's peak is known"
)


def format_table(runs: Sequence[Run]) -> str:
    """Runs as rows, figures as columns, and what the figures are."""
    rows = [[title for title, _ in COLUMNS], *([show(run) for _, show in COLUMNS] for run in runs)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join([*lines, "", NOTES])


def format_evaluations(run: Run) -> str:
    """How the loss on held-out text went."""
    lines = [f"{'step':>8}  {'valid loss':>10}  {'perplexity':>10}  {'bits/byte':>9}"]
    lines += [
        f"{record['step']:>8,}  {record['loss']:>10.4f}  {record['perplexity']:>10,.1f}  {record['bits_per_byte']:>9.4f}"
        for record in run.evaluations
    ]
    return "\n".join(lines)
