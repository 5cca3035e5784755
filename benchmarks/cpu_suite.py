"""Every benchmark that needs no GPU, one after the other, and what came of it as one page: `make bench`.

    python benchmarks/cpu_suite.py [-o benchmarks/results] [--only NAME ...] [--seconds 1170] [--quick]

Each runs with settings that fit two cores and a share of the time, in a process of its own. One that fails or runs out of time
does not stop the others and stands in the page as what it is; what no longer fits --seconds is not begun, and named. The page,
bench_cpu<cores>_<date>.md, has a row for each figure (ours, the reference of the same run, the ratio, the limit it is compared
with) and below that every benchmark's last line, its JSON, as it was printed. Status 1 if a benchmark failed or was left out;
a limit that is not met is a result.

Longer ones are started by hand (docs/benchmarks.md): planner_cpu.py, stream_apart.py, sae_quality.py, probes.py, steering_*.py.
"""

import sys
from pathlib import Path

# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
if __name__ == "__main__":  # a test imports this as well
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import datetime
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks._common import environment, print_environment

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark."""

    figure: str
    ours: float | None
    reference: float | None = None
    ratio: float | None = None
    """What is held against the limit, unless there is none."""
    limit: float | None = None
    at_most: bool = False

    def cells(self) -> list[str]:
        """As text: figure, ours, reference, ratio, limit, whether it is met."""
        held = self.ratio if self.ratio is not None else self.ours
        met = ""
        if self.limit is not None:
            met = "unknown"
            if held is not None:
                met = "met" if (held <= self.limit if self.at_most else held >= self.limit) else "**not met**"
        limit = "none" if self.limit is None else f"{'≤' if self.at_most else '≥'} {self.limit:g}"
        return [self.figure, _number(self.ours), _number(self.reference), _number(self.ratio), limit, met]


@dataclass(frozen=True)
class Part:
    """A benchmark as it is run here."""

    script: str
    arguments: tuple[str, ...]
    seconds: int
    """About what it takes on two cores that nobody else uses."""
    rows: Callable[[Result], Iterator[Row]]
    threads: int = 2
    quick: tuple[str, ...] | None = ("--quick",)
    """Arguments that show whether it runs; None: it has none that are short."""

    @property
    def limit(self) -> int:
        """Seconds after which it is stopped."""
        return 2 * self.seconds + 30

    def command(self, *, quick: bool) -> list[str]:
        """Arguments of Python."""
        return [f"benchmarks/{self.script}.py", *((self.quick or ()) if quick else self.arguments)]


def _tokenize(result: Result) -> Iterator[Row]:
    figure = f"tokens/s, {result['text_mb']} MB, {result['type']} {result['vocab_size']:,}; bare sentencepiece"
    ours, theirs = result["ours_tokens_per_s"], result["reference_tokens_per_s"]
    yield Row(figure, ours, theirs, result["ratio"], 0.9)
    yield Row("the same by CPU time", None, None, result["cpu_ratio"], 0.9)


def _morph_bpe(result: Result) -> Iterator[Row]:
    seconds = result["seconds"]
    ours = max(seconds["ours, bias 0"], seconds["ours, bias 0.9"])
    yield Row("seconds of training; sentencepiece's BPE", ours, seconds["sentencepiece"], result["ratio"], 0.5)


def _gpt_overhead(result: Result) -> Iterator[Row]:
    for name, size in result["sizes"].items():
        speed = size["tokens_per_second"]
        yield Row(f"tokens/s, {name}; plain PyTorch", speed["ours"], speed["reference"], size["ratio"], 0.95)
        yield Row(f"{name} by CPU time", None, None, size["cpu_ratio"], 0.95)


def _gpt_cpu(result: Result) -> Iterator[Row]:
    for name, size in result["sizes"].items():
        speed, ratios = size["tokens_per_second"], size["ratios"]
        yield Row(f"tokens/s, {name}; Trainer", speed["ours"], speed["transformers"], ratios["to_transformers"], 1.1)
        yield Row(f"tokens/s, {name}; its GEMMs alone", speed["ours"], speed["gemm"], ratios["to_gemm_bound"], 0.9)


def _engines(result: Result) -> Iterator[Row]:
    for name, layout in result["layouts"].items():
        seconds = layout["seconds_per_step"]
        yield Row(f"s a step, {name}; DeepSpeed", seconds["megatron"], seconds["deepspeed"], layout["ratio"])


def _planner_accuracy(result: Result) -> Iterator[Row]:
    for name in ("time", "memory"):
        yield Row(f"mean error of {name} against published runs", result[f"{name}_mean"], limit=0.10, at_most=True)


def _sae_step(result: Result) -> Iterator[Row]:
    for name, width in result["widths"].items():
        speed = width["tokens_per_second"]
        for side, goal in (("torch", None), ("eai-sparsify", 1.4), ("sae-lens", 5.0)):
            if side in width["speedup"]:
                yield Row(f"vectors/s, {name}; {side}", speed["ours"], speed[side], width["speedup"][side], goal)
            elif goal is not None:
                yield Row(f"vectors/s, {name}; {side} is not installed", speed["ours"], limit=goal)
        over = width["ours_over_gemm"]
        yield Row(f"a step in products of the encoder, {name}", None, None, over, 1.5, at_most=True)


def _sae_scaling(result: Result) -> Iterator[Row]:
    yield Row("bytes by formula / bytes sent, least", None, None, result["ratio"])
    most = max(result["by_ranks"], key=int)
    memory = {ranks: result["by_ranks"][ranks]["memory_mib"] for ranks in ("1", most)}
    ratio = round(memory["1"] / memory[most], 2)
    yield Row(f"MiB a rank, TP{most}; one rank", round(memory[most]), round(memory["1"]), ratio)


def _stream(result: Result) -> Iterator[Row]:
    both, bound = (result[f"{name}_vectors_per_second"] for name in ("both", "bound"))
    yield Row("vectors/s, streaming and training; both one after the other", both, bound, result["ratio"], 0.9)
    yield Row("the same by CPU time", None, None, result["cpu_ratio"], 0.9)
    yield Row("share of the time for shuffling", result["shuffle_share"], limit=0.03, at_most=True)


def _dashboard(result: Result) -> Iterator[Row]:
    for what, of in (("report", "to the report"), ("page", "until the page answers")):
        ours, theirs, limit = result[f"{what}_s"], result[f"reference_{what}_s"], result[f"{what}_goal_s"]
        yield Row(f"seconds {of}, {result['runs']} runs; Plotly as it is", ours, theirs, None, limit, at_most=True)


def _scaling_fit(result: Result) -> Iterator[Row]:
    ours, theirs = result["ours"]["seconds"], result["reference"]["seconds"]
    yield Row("seconds of a fit; finite differences", ours, theirs, result["ratio"])


def _weak_scaling(result: Result) -> Iterator[Row]:
    for axis, points in result["measured"].items():
        last, first = points[-1], points[0]
        figure = f"tokens/s, {axis}{last['ranks']}; one rank; ratio: CPU efficiency"
        yield Row(figure, last["tokens_per_second"], first["tokens_per_second"], last["cpu_efficiency"])


PARTS = {
    part.script: part
    for part in (
        Part("planner_accuracy", (), 4, _planner_accuracy, threads=1, quick=()),
        Part("scaling_fit", (), 8, _scaling_fit, threads=1, quick=()),
        Part("gpt_overhead", ("--sizes", "10m", "50m", "--rounds", "3"), 130, _gpt_overhead),
        Part("gpt_cpu", ("--rounds", "3"), 210, _gpt_cpu),
        Part("sae_step", ("--widths", "768", "--rounds", "3"), 60, _sae_step),
        Part("stream", ("--rounds", "2"), 150, _stream),
        Part("engines", ("--rounds", "3"), 130, _engines, threads=1),
        Part("weak_scaling", ("--rounds", "3"), 110, _weak_scaling, threads=1),
        Part("sae_scaling", ("--steps", "2"), 70, _sae_scaling, threads=1, quick=None),
        Part("tokenize", ("--repeats", "2"), 90, _tokenize, threads=1, quick=None),
        Part("morph_bpe", ("--repeats", "1"), 40, _morph_bpe, threads=1, quick=None),
        Part("dashboard", ("--repeats", "1"), 90, _dashboard, threads=1, quick=None),
    )
}
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
        left = args.seconds - (time.monotonic() - begun)
        expected = sum(PARTS[later].seconds for later in names[number - 1 :])
        print(
            f"[{number}/{len(names)}] {' '.join(PARTS[name].command(quick=args.quick))}: about {PARTS[name].seconds} s; "
            f"with what comes after it about {expected / 60:.0f} of {left / 60:.0f} min left",
            flush=True,
        )
        outcomes[name] = run_part(PARTS[name], quick=args.quick, left=left)
        for line in _table_lines(PARTS[name], outcomes[name], quick=args.quick):
            print(f"  {line}", flush=True)
    seconds = time.monotonic() - begun
    text = page(outcomes, before, seconds=seconds, quick=args.quick)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"bench_cpu{before['cores']}_{datetime.date.today().isoformat()}.md"
    path.write_text(text, encoding="utf-8")
    failed = [name for name, outcome in outcomes.items() if "error" in outcome]
    print(f"{path} written after {seconds / 60:.1f} min; failed or left out: {', '.join(failed) or 'none'}")
    print(json.dumps({"page": str(path), "seconds": round(seconds, 1), "failed": failed}))
    return 1 if failed else 0


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
    return [_line(command if index == 0 else "", *row.cells()) for index, row in enumerate(rows)]


def _line(*cells: str) -> str:
    return "| " + " | ".join([*cells, *[""] * (7 - len(cells))]) + " |"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
