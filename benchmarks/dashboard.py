"""`steerscale dashboard -o report.html` over hundreds of run directories, against what one does without it.

    python benchmarks/dashboard.py [--runs 300] [--reports 200] [--repeats 3] [--keep DIRECTORY]

The run directories are written by the code that writes real ones (`steerscale.testing.example_runs`): a short training run on
this CPU is the seed of loss curves and of the jitter of step times; `create_run_dir` and `Recorder` write configurations,
records and TensorBoard events of as many runs, each with a layout of its own. 200 reports of 10 steps are 2,000 steps a run.

- ours: the whole command as a child process, from starting Python to the file on disk.
- reference, a whole process too: the same runs' TensorBoard events read by TensorBoard's own EventAccumulator, the same seven
  kinds of curve of all runs put into Plotly figures as they are, written as one self-contained HTML file.

The pages are opened in headless Chromium. A page is interactive when it has carried out what was asked of it: ours shows the
rows that pass a filter typed as soon as there is a field to type it in, and its first plot; the reference its first plot (it
has nothing to filter by). Files are in the page cache for both. The last line is one JSON object; `ratio` is reference / ours
in seconds to the report, `page_ratio` the same for the pages.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # Python puts the script's directory there, in which tokenize.py hides the standard library's

from benchmarks._common import against, print_environment  # noqa: E402

TAGS = (
    ("train/loss",),
    ("throughput/tokens per second per GPU",),
    ("throughput/model TFLOPs per GPU", "iteration-time/TFLOPs per gpu (estimated)"),
    ("throughput/MFU", "throughput/HFU"),
    ("iteration-time/iteration-time",),
    ("memory/peak GiB, highest rank",),
    ("throughput/pipeline bubble (estimated)",),
)
REPORT_GOAL_S, PAGE_GOAL_S = 10.0, 3.0


def main() -> None:
    """Measure and print."""
    args = _arguments()
    if args.reference:
        _reference(args.reference, args.output)
        return
    environment = print_environment("plotly", "tensorboard", "playwright")
    with tempfile.TemporaryDirectory(prefix="dashboard-") as name:
        directory = Path(name) if args.keep is None else args.keep
        directory.mkdir(parents=True, exist_ok=True)
        runs, ours, theirs = directory / "runs", directory / "report.html", directory / "reference.html"
        if not runs.is_dir():
            _generate(directory, args.runs, args.reports)
        commands = {
            "ours": [
                "-c",
                "import sys; from steerscale.cli import main; sys.exit(main())",
                "dashboard",
                runs,
                "-o",
                ours,
            ],
            "reference": [__file__, "--reference", runs, "--output", theirs],
        }
        _time(commands["ours"])  # warms the page cache
        seconds = {name: [] for name in commands}
        for _ in range(args.repeats):
            for name, command in commands.items():
                seconds[name].append(_time(command))
        pages = _open_pages(ours, theirs, repeats=args.repeats)
        sizes = {"ours": ours.stat().st_size, "reference": theirs.stat().st_size}
        _print(args, seconds, pages, sizes, environment)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--reports", type=int, default=200, help="records of each run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="directory for runs and reports, used again if it is there")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _generate(directory: Path, count: int, reports: int) -> None:
    """Train a little, then write the runs."""
    from steerscale.metrics import read_records
    from steerscale.testing.example_runs import write_example_runs

    steerscale = [sys.executable, "-c", "import sys; from steerscale.cli import main; sys.exit(main())"]
    tokenizer, dataset, seed = directory / "tokenizer", directory / "dataset", directory / "seed"
    commands = (
        [*steerscale, "tokenizer", "train", "sample:german", "--vocab-size", "1024", "-o", tokenizer],
        [*steerscale, "data", "prepare", "sample:german", "--tokenizer", tokenizer, "-o", dataset],
        [sys.executable, "-m", "launch.train", "model=demo", "name=seed", f"run_dir={seed}", f"data.path={dataset}",
         "train.steps=100", "optim.lr=3e-3", "optim.warmup_steps=10", "parallel.micro_batch_size=4",
         "parallel.global_batch_size=8", "metrics.interval=2", "train.eval_interval=0"],
    )  # fmt: skip
    for command in () if seed.is_dir() else commands:
        subprocess.run([str(part) for part in command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    begin = time.perf_counter()
    write_example_runs(directory / "runs", read_records(seed), count=count, reports=reports, tensorboard=True)
    print(f"{count} run directories written in {time.perf_counter() - begin:.0f} s", flush=True)


def _time(command: list) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT, capture_output=True)
    return time.perf_counter() - begin


def _reference(runs: Path, output: Path) -> None:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    figure = make_subplots(rows=len(TAGS), cols=1, subplot_titles=[tags[0] for tags in TAGS])
    for events in sorted(runs.glob("**/tb")):
        accumulator = EventAccumulator(str(events), size_guidance={SCALARS: 0})
        accumulator.Reload()
        there = accumulator.Tags()["scalars"]
        for row, tags in enumerate(TAGS, start=1):
            for tag in set(tags) & set(there):
                scalars = accumulator.Scalars(tag)
                line = go.Scatter(
                    x=[scalar.step for scalar in scalars],
                    y=[scalar.value for scalar in scalars],
                    name=events.parent.name,
                )
                figure.add_trace(line, row=row, col=1)
    figure.update_layout(height=350 * len(TAGS))
    figure.write_html(output, include_plotlyjs=True)


def _open_pages(ours: Path, theirs: Path, *, repeats: int) -> dict[str, list[float]]:
    """Seconds from opening until each page is interactive."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        print("no Chromium on this machine: pages are not measured")
        return {"table": [], "ours": [], "reference": []}
    found: dict[str, list[float]] = {"table": [], "ours": [], "reference": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for _ in range(repeats):
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            begin = time.perf_counter()
            page.goto(ours.as_uri(), wait_until="commit")
            page.fill("#filter", "parallel.tensor=2")
            page.locator("#runs tbody tr", has_text="TP1 ").first.wait_for(state="detached")
            page.locator("#runs tbody tr", has_text="TP2").first.wait_for()
            found["table"].append(time.perf_counter() - begin)
            page.locator("#charts .main-svg").first.wait_for(state="attached")
            found["ours"].append(time.perf_counter() - begin)
            page.close()
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            begin = time.perf_counter()
            page.goto(theirs.as_uri(), wait_until="commit", timeout=180_000)
            page.locator(".main-svg .trace").first.wait_for(state="attached", timeout=180_000)
            found["reference"].append(time.perf_counter() - begin)
            page.close()
        browser.close()
    return found


def _print(
    args: argparse.Namespace, seconds: dict[str, list[float]], pages: dict[str, list[float]], sizes: dict[str, int],
    environment: dict,
) -> None:  # fmt: skip
    print(f"{args.runs} runs of {args.reports} reports; medians (min, max) of {args.repeats}, alternating")
    print(f"{'':<34}{'ours':>22}{'reference':>22}")
    for label, values in (("seconds to the report", seconds), ("seconds until the page answers", pages)):
        cells = [_spread(values[name]) for name in ("ours", "reference")]
        print(f"{label:<34}{cells[0]:>22}{cells[1]:>22}")
    print(f"{'  of which until it filtered':<34}{_spread(pages['table']):>22}")
    print(f"{'MiB':<34}{sizes['ours'] / 2**20:>22.1f}{sizes['reference'] / 2**20:>22.1f}")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    shown = {name: statistics.median(values) if values else None for name, values in pages.items()}
    page_ratio = None if shown["ours"] is None or shown["reference"] is None else shown["reference"] / shown["ours"]
    print(f"seconds to the report: {against(median['ours'], REPORT_GOAL_S, at_most=True)}")
    print(f"seconds until the page answers: {against(shown['ours'], PAGE_GOAL_S, at_most=True)}")
    print(json.dumps({
        "benchmark": "dashboard",
        "environment": environment,
        "runs": args.runs,
        "reports": args.reports,
        "report_s": round(median["ours"], 2),
        "report_goal_s": REPORT_GOAL_S,
        "reference_report_s": round(median["reference"], 2),
        "page_s": None if shown["ours"] is None else round(shown["ours"], 2),
        "page_filtered_s": None if shown["table"] is None else round(shown["table"], 2),
        "page_goal_s": PAGE_GOAL_S,
        "reference_page_s": None if shown["reference"] is None else round(shown["reference"], 2),
        "page_ratio": None if page_ratio is None else round(page_ratio, 2),
        "ratio": round(median["reference"] / median["ours"], 2),
    }))  # fmt: skip


def _spread(values: list[float]) -> str:
    if not values:
        return "not measured"
    return f"{statistics.median(values):.2f} ({min(values):.2f}, {max(values):.2f})"


if __name__ == "__main__":
    main()
