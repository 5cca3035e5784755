"""Runs as one self-contained HTML page: data, style and scripts inside, nothing fetched from anywhere. Torch-free.

Everything that comes from a run travels as JSON and is put into the page as text, never as markup. The page's content
security policy admits the scripts written here, by their hashes, and no connection beside that to `--serve`.
"""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from steerscale.dashboard.curves import curves_of, evaluations_of, events_of
from steerscale.dashboard.figures import FIGURES, device_peaks, figures_of, worth_showing
from steerscale.dashboard.runs import BrokenRun, Run, flatten
from steerscale.html_page import fill_template, script_hash, write_whole
from steerscale.planning.throughput import FORMULAS

SCRIPTS = ("data.js", "table.js", "charts.js", "heatmap.js", "compare.js", "main.js")
MOST_POINTS, FEWEST_POINTS, POINTS_IN_ALL = 1200, 120, 45_000
"""Points of a curve: the more runs share a page, the fewer each has."""


@dataclass(frozen=True)
class Entry:
    """What the page needs of one run."""

    figures: dict[str, Any]
    config: dict[str, Any]
    rest: dict[str, Any]


def entry_of(run: Run, *, points: int) -> Entry:
    """Condense a run: its records can be forgotten then."""
    rest = {
        "path": str(run.path),
        "reason": run.reason,
        "curves": curves_of(run, points=points),
        "evaluations": evaluations_of(run, points=points),
        "events": events_of(run),
    }
    return Entry(figures_of(run), {key: _scalar(value) for key, value in flatten(run.config).items()}, rest)


def points_for(num_runs: int) -> int:
    """Points each curve may have on a page of that many runs."""
    return min(MOST_POINTS, max(FEWEST_POINTS, POINTS_IN_ALL // max(num_runs, 1)))


def page_data(entries: Sequence[Entry], broken: Iterable[BrokenRun] = ()) -> dict[str, Any]:
    """What the page's scripts read. What all runs' configurations have in common is there once."""
    configs = [entry.config for entry in entries]
    common = {
        key: value
        for key, value in (configs[0] if len(configs) > 1 else {}).items()
        if all(key in config and _same(config[key], value) for config in configs)
    }
    columns = {f.key for f in worth_showing(FIGURES, [entry.figures for entry in entries]) if f.shown}
    return {
        "generated": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "figures": [
            {
                "key": f.key,
                "title": f.title,
                "form": f.form,
                "note": f.note,
                "better": f.better,
                "shown": f.key in columns,
            }
            for f in FIGURES
        ],
        "formulas": FORMULAS,
        "peaks": device_peaks([entry.figures for entry in entries]),
        "common": common,
        "runs": [
            {
                **entry.rest,
                "figures": entry.figures,
                "config": {key: value for key, value in entry.config.items() if key not in common},
            }
            for entry in entries
        ],
        "broken": [{"path": str(entry.path), "reason": entry.reason} for entry in broken],
    }


def page(data: dict[str, Any] | None, *, refresh_s: float | None = None) -> str:
    """The page. Without data it asks the server it came from, and again every `refresh_s` seconds."""
    plotly = _plotly()
    own = "\n".join(_part(name) for name in SCRIPTS)
    connect = "'none'" if data is not None else "'self'"
    policy = (
        f"default-src 'none'; script-src {script_hash(plotly)} {script_hash(own)}; style-src 'unsafe-inline'; "
        f"img-src data: blob:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "STYLE": _part("page.css"),
        "DATA": embed({"data": data, "refresh_s": refresh_s}),
        "PLOTLY": plotly,
        "SCRIPT": own,
    }
    return fill_template(_part("page.html"), parts)


def embed(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    # ASCII: the name of a directory need not be UTF-8, and what Python makes of it then cannot be encoded.
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def write_report(path: Path, data: dict[str, Any]) -> None:
    """Write the page to a file, which appears whole."""
    write_whole(path, page(data))


def _part(name: str) -> str:
    return resources.files("steerscale.dashboard").joinpath("page", name).read_text(encoding="utf-8")


def _plotly() -> str:
    """plotly.js as its Python package brings it. The page draws with it; its Python side is not used."""
    return resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def _scalar(value: Any) -> Any:
    """A configuration value as JSON has it, anything composed as text: YAML knows more than JSON does."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return json.dumps(value, default=str, skipkeys=True)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other
