"""`steerscale dashboard`: runs side by side, as a table, a report, a picture or a live page."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerscale.errors import ConfigError, SteerscaleError
from steerscale.html_page import write_whole

if TYPE_CHECKING:
    from steerscale.dashboard.runs import BrokenRun, Run

FORMATS = ("table", "html", "csv", "md", "png")
LONGEST_REFRESH = 86_400
"""Seconds; a browser's timer of more than 24 days would not wait at all."""
QUIET_SECONDS = 1.0
"""Reading that takes no longer says nothing."""


def add_parser(subparsers: Any) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "dashboard",
        help="throughput, memory and loss of runs: table, HTML report, live page",
        description="The runs at and below the given directories: a table, or with -o report.html a page that needs no "
        "network, or with --serve the same page, live.",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, or directories of them")
    parser.add_argument("-o", "--output", type=Path, help="file to write; its ending chooses the format")
    parser.add_argument("--format", choices=FORMATS, help="default: by the ending of --output, else table")
    parser.add_argument("--serve", action="store_true", help="serve the page on 127.0.0.1 and keep it up to date")
    parser.add_argument("--port", type=int, default=8265, help="for --serve; 0: a free one (default: %(default)s)")
    parser.add_argument(
        "--refresh", type=float, default=5.0, metavar="SECONDS", help="for --serve: how often (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print, write or serve; raises ConfigError for options that contradict each other."""
    if args.serve:
        _serve(args)
        return
    form, output = _format(args), args.output
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"-o {output}: {output.parent} is no directory; create it first")
    if output is not None and output.exists() and not output.is_file():
        raise ConfigError(f"-o {output} is no regular file; a table, csv and md go to standard output without -o")
    if output is None:
        print(_make(form, args))
        return
    try:
        if form == "html":
            _write_html(args)
        elif form == "png":
            _write_png(args)
        else:
            write_whole(output, _make(form, args) + "\n")
    except OSError as error:
        raise SteerscaleError(f"{output} cannot be written: {error}") from error
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB", file=sys.stderr)


def _format(args: argparse.Namespace) -> str:
    ending = args.output.suffix.removeprefix(".") if args.output is not None else ""
    form = args.format or (ending if ending in FORMATS else "")
    if args.output is not None and not form:
        raise ConfigError(f"-o {args.output}: its ending is none of .html .csv .md .png; say which with --format")
    if form in ("html", "png") and args.output is None:
        raise ConfigError(f"--format {form} needs a file to write: -o report.{form}")
    return form or "table"


def _make(form: str, args: argparse.Namespace) -> str:
    from steerscale.dashboard import table

    runs, broken = _read(args.runs)
    if form == "csv":
        _complain(broken)
        text = table.format_csv(runs).rstrip("\n")
    elif form == "md":
        text = table.format_markdown(runs, broken)
    else:
        text = table.format_table(runs, broken)
        if len(runs) == 1 and runs[0].evaluations:
            text += "\n\n" + table.format_evaluations(runs[0])
    return _encodable(text)


def _encodable(text: str) -> str:
    """Text that can be written: the name of a directory need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _write_png(args: argparse.Namespace) -> None:
    from steerscale.dashboard.picture import write_picture

    runs, broken = _read(args.runs)
    _complain(broken)
    drawn = write_picture(args.output, runs)
    if drawn < len(runs):
        print(f"{drawn} of {len(runs)} runs drawn: those with the most tokens/s/GPU", file=sys.stderr)


def _complain(broken: "list[BrokenRun]") -> None:
    for entry in broken:
        print(_encodable(f"not read: {entry.path}: {entry.reason}"), file=sys.stderr)


def _write_html(args: argparse.Namespace) -> None:
    from steerscale.dashboard.report import Entry, entry_of, page_data, points_for, write_report
    from steerscale.dashboard.runs import BrokenRun, find_directories

    points = points_for(len(find_directories(args.runs)))
    entries: list[Entry] = []
    broken: list[BrokenRun] = []
    for found in _scan(args.runs):  # one after the other: the records of hundreds of runs are many gigabytes
        if isinstance(found, BrokenRun):
            broken.append(found)
        else:
            entries.append(entry_of(found, points=points))
    write_report(args.output, page_data(entries, broken))


def _serve(args: argparse.Namespace) -> None:
    from steerscale.dashboard.runs import find_directories
    from steerscale.dashboard.serve import LiveRuns, make_server

    if args.output is not None or args.format is not None:
        raise ConfigError("--serve writes no file: leave out -o and --format")
    if not 0 < args.refresh <= LONGEST_REFRESH:
        raise ConfigError(f"--refresh must be positive and at most {LONGEST_REFRESH} seconds, got {args.refresh:g}")
    if not 0 <= args.port < 2**16:
        raise ConfigError(f"--port must be between 0 and {2**16 - 1}, got {args.port}")
    find_directories(args.runs)  # a misspelt path is an error now, not an empty page
    runs = LiveRuns(args.runs)
    with make_server(runs, port=args.port, refresh_s=args.refresh) as server:
        runs.update(_progress())
        print(f"http://127.0.0.1:{server.server_address[1]}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)


def _read(paths: list[Path]) -> "tuple[list[Run], list[BrokenRun]]":
    from steerscale.dashboard.runs import Run

    runs: list[Run] = []
    broken: list[BrokenRun] = []
    for found in _scan(paths):
        if isinstance(found, Run):
            runs.append(found)
        else:
            broken.append(found)
    return runs, broken


def _scan(paths: list[Path]) -> "Iterator[Run | BrokenRun]":
    from steerscale.dashboard.runs import scan_runs

    return scan_runs(paths, _progress())


def _progress() -> Callable[[int, int], None]:
    """Says on stderr how far reading is, once it has taken longer than a moment."""
    terminal = sys.stderr.isatty()
    interval, begin, end = (0.2, "\r", "") if terminal else (10.0, "", "\n")
    started = last = time.perf_counter()
    spoken = False

    def report(done: int, total: int) -> None:
        nonlocal last, spoken
        now = time.perf_counter()
        finished = done == total and spoken
        if finished or (now - started >= QUIET_SECONDS and now - last >= interval):
            last, spoken = now, True
            ending = "\n" if finished and terminal else end
            print(f"{begin}reading runs: {done} of {total}", end=ending, file=sys.stderr, flush=True)

    return report
