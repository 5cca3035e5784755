"""A sweep's results: `python -m launch.sweep_table runs/gas_mbs`. Read from its record and its run directories; torch-free."""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.sweep_record import Entry, read_record
from steerscale.dashboard.runs import Run, read_or_broken
from steerscale.errors import SteerscaleError
from steerscale.jobs.observe import Observation, observe
from steerscale.rundir import CONFIG

SPOKEN = {"invalid": "impossible", "predicted_oom": "predicted OOM"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A point with its result; what is unknown is None."""

    entry: Entry
    run_dir: Path
    state: str
    """As `steerscale status` says it, or: impossible, predicted OOM, not started, unreadable."""
    reason: str
    step: int | None = None
    seconds: float | None = None
    """Of an iteration: median over the reports, warm-up excluded."""
    tflops: float | None = None
    """Exact model FLOPs, 1e12/s a rank."""
    tokens_per_second: float | None = None
    """Of a rank."""
    memory_gib: float | None = None
    """Peak of the fullest rank."""
    loss: float | None = None
    held_out: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.sweep_table", description=__doc__)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIRECTORY", help="with a sweep.json")
    args = parser.parse_args(argv)
    try:
        for directory in args.directories:
            print(format_table(read_table(directory)))
    except SteerscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def observe_runs(run_dirs: Sequence[Path]) -> dict[Path, Observation]:
    """How these runs stand, Slurm asked once for all."""
    return dict(zip(run_dirs, observe(run_dirs)))


def read_table(directory: Path) -> list[Row]:
    """The rows of a sweep: those with a result by their throughput, the best first, then the others.

    Raises SteerscaleError if there is no record.
    """
    entries = [(entry, (directory / entry.run_dir).resolve()) for entry in read_record(directory).points]
    seen = observe_runs([run_dir for _, run_dir in entries if (run_dir / CONFIG).is_file()])
    rows = [_row(entry, run_dir, seen) for entry, run_dir in entries]
    last = ("predicted OOM", "impossible")
    return sorted(
        rows,
        key=lambda row: (
            -(row.tflops or 0.0),
            -(row.tokens_per_second or 0.0),
            1 + last.index(row.state) if row.state in last else 0,
        ),
    )


def _row(entry: Entry, run_dir: Path, seen: Mapping[Path, Observation]) -> Row:
    if run_dir not in seen:
        state = SPOKEN.get(entry.verdict, "not started")
        return Row(entry=entry, run_dir=run_dir, state=state, reason=entry.reason)
    # What was run all the same, with launcher.force=true say, has a result.
    observation, run = seen[run_dir], read_or_broken(run_dir)
    if observation.state == "unreadable" or not isinstance(run, Run):
        reason = observation.reason if isinstance(run, Run) else run.reason
        return Row(entry=entry, run_dir=run_dir, state="unreadable", reason=reason)
    return Row(
        entry=entry,
        run_dir=run_dir,
        state=observation.state,
        reason=observation.reason or (entry.reason if observation.state != "finished" else ""),
        step=run.step,
        seconds=run.median("seconds_per_step"),
        tflops=run.median("model_tflops_per_gpu"),
        tokens_per_second=run.median("tokens_per_second_per_gpu"),
        memory_gib=run.last("memory_peak_gib_max"),
        loss=run.last("loss"),
        held_out=run.last_evaluation("loss"),
    )


COLUMNS = (
    *(
        "point",
        "layout",
        "engine",
        "state",
        "step",
        "s/iter",
        "predicted s",
        "TFLOP/s/GPU",
        "predicted TFLOP/s",
        "tok/s/GPU",
        "GiB",
        "predicted GiB",
    ),
    *("loss", "held-out", "run directory"),
)
LEFT = {"point", "layout", "engine", "state", "run directory"}


def format_table(rows: Sequence[Row]) -> str:
    """The rows with a heading, then what became of the points that have no result, then how many there are of each."""
    several = len({row.entry.engine for row in rows} - {None}) > 1  # only then are engines worth a column
    columns = [cells for cells in zip(COLUMNS, *map(_cells, rows)) if several or cells[0] != "engine"]
    lines = ["  ".join(row).rstrip() for row in zip(*map(_aligned, columns))]
    lines += [f"{row.entry.short or row.entry.run_dir}: {row.state}: {row.reason}" for row in rows if row.reason]
    counts = Counter(row.state for row in rows)
    lines.append(f"{len(rows)} points: {', '.join(f'{number} {state}' for state, number in counts.items())}")
    return "\n".join(lines)


def _aligned(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    return [cell.ljust(width) if column[0] in LEFT else cell.rjust(width) for cell in column]


def _cells(row: Row) -> tuple[str, ...]:
    entry = row.entry
    return (
        entry.short or row.run_dir.name,
        entry.layout or "-",
        entry.engine or "-",
        row.state,
        _number(row.step, ",d"),
        _number(row.seconds, ".4g"),
        _number(entry.predicted_seconds, ".4g"),
        _number(row.tflops, ".4g"),
        _number(entry.predicted_tflops, ".4g"),
        _number(row.tokens_per_second, ",.0f"),
        _number(row.memory_gib, ".2f"),
        _number(entry.predicted_gib, ".2f"),
        _number(row.loss, ".4f"),
        _number(row.held_out, ".4f"),
        str(row.run_dir) if row.state not in SPOKEN.values() else "-",
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
