"""Every benchmark that needs no GPU, one after the other, and what came of it as one page: `make bench`.

    python benchmarks/cpu_suite.py [-o benchmarks/results] [--only NAME ...] [--seconds 1170] [--quick]

Each runs with settings that fit two cores and a share of the time, in a process of its own. One that fails or runs out of time
does not stop the others and stands in the page as what it is; what no longer fits --seconds is not begun, and named. The page,
bench_cpu<cores>_<date>.md (a second one of a day ends in _2), has a row for each figure (ours, the reference of the same run,
the ratio, the limit it is compared with) and below that every benchmark's last line, its JSON, as it was printed. Status 1 if a
benchmark failed or was left out; a limit that is not met is a result.

Longer ones are started by hand (docs/benchmarks.md): planner_cpu.py, stream_apart.py, sae_quality.py, probes.py, steering_*.py.
"""

import sys
from pathlib import Path

# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
if __name__ == "__main__":  # a test imports this as well
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import datetime
import itertools
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks._common import environment, print_environment
from benchmarks.cpu_suite_parts import PARTS, Part, Result

ROOT = Path(__file__).resolve().parent.parent
SHORTEST = 15
"""Seconds below which nothing is begun."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write the page; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-o", "--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the page"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=1170, help="for everything")
    parser.add_argument("--quick", action="store_true", help="those that have it with --quick: do they run?")
    args = parser.parse_args(argv)
    before = print_environment("megatron-core", "deepspeed", "transformers")
    names = [name for name in args.only if not args.quick or PARTS[name].quick is not None]
    begun, outcomes = time.monotonic(), {}
    for number, name in enumerate(names, start=1):
        part, left = PARTS[name], args.seconds - (time.monotonic() - begun)
        own, all_left = (
            sum(PARTS[one].expected(quick=args.quick) for one in some) for some in ([name], names[number - 1 :])
        )
        print(
            f"[{number}/{len(names)}] {' '.join(part.command(quick=args.quick))}: about {own} s; with what comes after it "
            f"about {all_left / 60:.0f} of {left / 60:.0f} min left",
            flush=True,
        )
        outcomes[name] = run_part(part, quick=args.quick, left=left)
        for line in _table_lines(part, outcomes[name], quick=args.quick):
            print(f"  {line}", flush=True)
    seconds = time.monotonic() - begun
    text = page(outcomes, before, seconds=seconds, quick=args.quick)
    args.output.mkdir(parents=True, exist_ok=True)
    path = new_path(args.output, f"bench_cpu{before['cores']}_{datetime.date.today().isoformat()}")
    path.write_text(text, encoding="utf-8")
    failed = [name for name, outcome in outcomes.items() if "error" in outcome]
    print(f"{path} written after {seconds / 60:.1f} min; failed or left out: {', '.join(failed) or 'none'}")
    print(json.dumps({"page": str(path), "seconds": round(seconds, 1), "failed": failed}))
    return 1 if failed else 0


def new_path(folder: Path, stem: str) -> Path:
    """Where no page is yet: one of the same day, which took twenty minutes, is not replaced."""
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := folder / f"{name}.md").exists())


def run_part(part: Part, *, quick: bool, left: float) -> Result:
    """{"result": its last line, "seconds": ...}, or {"error": why there is none}."""
    if left < SHORTEST:
        return {"error": f"not begun: {left:.0f} s left of --seconds"}
    limit = min(part.limit, left)
    environ = {**os.environ, "OMP_NUM_THREADS": str(min(part.threads, environment()["cores"]))}
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, *part.command(quick=quick)],
            cwd=ROOT,
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        log.seek(0)
        lines = log.read().strip().splitlines()
    seconds = round(time.monotonic() - begun, 1)
    if status is None:
        return {"error": f"stopped after {limit:.0f} s", "seconds": seconds, "log": lines[-12:]}
    if status:
        return {
            "error": f"status {status}: {lines[-1] if lines else 'no output'}",
            "seconds": seconds,
            "log": lines[-12:],
        }
    try:
        return {"result": json.loads(lines[-1]), "seconds": seconds}
    except (IndexError, json.JSONDecodeError):
        return {"error": "its last line is no JSON", "seconds": seconds, "log": lines[-12:]}


def _end(process: subprocess.Popen) -> None:
    """Its own processes as well: ranks, workers, browsers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def page(outcomes: dict[str, Result], found: dict[str, Any], *, seconds: float, quick: bool) -> str:
    """The page of all outcomes."""
    head = (
        f"# {found['cores']} CPU cores, {datetime.date.today().isoformat()}\n\n"
        f"`make bench`{' (with --quick: says only what runs)' if quick else ''}, {seconds / 60:.1f} minutes. "
        + ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)
        + f"; load at the end {os.getloadavg()[0]:.1f}.\nA load above 0 at the start means that others used the machine: "
        "figures are low then and vary; sides of a benchmark take\n"
        "turns, so that ratios say more. Figures are medians of a few steps only.\n\n"
        "| command | figure; reference | ours | reference | ratio | limit | |\n|---|---|---|---|---|---|---|\n"
    )
    table, raw = [], []
    for name, outcome in outcomes.items():
        table += _table_lines(PARTS[name], outcome, quick=quick)
        if "result" in outcome:
            raw.append(f"{name}, {outcome['seconds']:.0f} s:\n\n```json\n{json.dumps(outcome['result'])}\n```\n")
        else:
            log = "\n".join(outcome.get("log", []))
            raw.append(f"{name}: **{outcome['error']}**\n\n```\n{log}\n```\n")
    return head + "\n".join(table) + "\n\n## As printed\n\n" + "\n".join(raw)


def _table_lines(part: Part, outcome: Result, *, quick: bool) -> list[str]:
    command = f"`{' '.join(part.command(quick=quick)).removeprefix('benchmarks/')}`"
    if "error" in outcome:
        return [_line(command, f"**failed**: {outcome['error']}".replace("|", "\\|"))]
    try:
        rows = list(part.rows(outcome["result"]))
    except (KeyError, TypeError, ValueError) as error:
        outcome["error"] = f"its JSON is not understood: {error!r}"
        return [_line(command, f"**failed**: {outcome['error']}")]
    # A tiny model is not what the limits are for.
    cells = [row.cells()[: 4 if quick else None] for row in rows]
    return [_line(command if index == 0 else "", *row) for index, row in enumerate(cells)]


def _line(*cells: str) -> str:
    return "| " + " | ".join([*cells, *[""] * (7 - len(cells))]) + " |"


if __name__ == "__main__":
    sys.exit(main())
