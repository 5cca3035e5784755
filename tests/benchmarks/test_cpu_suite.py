"""`make bench`: what ran is in the page with its limit, what failed is in it as a failure."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cpu_suite import main, page, run_part
from benchmarks.cpu_suite_parts import PARTS, Row

TWENTY_MINUTES = 20 * 60
STEP = {
    "widths": {
        "d=768": {
            "tokens_per_second": {"ours": 7000.0, "torch": 5000.0, "eai-sparsify": 3500.0},
            "speedup": {"torch": 1.4, "eai-sparsify": 2.0},
            "ours_over_gemm": 1.5,
        }
    }
}


def test_the_page_has_figures_limits_and_what_was_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "planner_accuracy", "-o", str(tmp_path)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["failed"] == []
    text = Path(last["page"]).read_text(encoding="utf-8")
    (path,) = tmp_path.iterdir()
    assert path == Path(last["page"])
    assert "| `planner_accuracy.py` | mean error of time against published runs | 0.03" in text
    assert "≤ 0.1 | met |" in text
    assert '"time_mean": 0.03' in text  # its last line, as it was printed


def test_what_fails_is_shown_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = replace(PARTS["planner_accuracy"], arguments=("--nonsense",))
    outcome = run_part(wrong, quick=False, left=60)
    assert outcome["error"].startswith("status 2:")
    unread = {"result": {"time_mean": 0.1}, "seconds": 1.0}  # a figure is missing
    text = page({"planner_accuracy": outcome, "scaling_fit": unread}, {"cores": 2}, seconds=60, quick=False)
    assert "| `planner_accuracy.py` | **failed**: status 2:" in text
    assert "unrecognized arguments: --nonsense" in text
    assert "| `scaling_fit.py` | **failed**: its JSON is not understood: KeyError" in text
    pages = set()
    for _ in range(2):
        assert main(["--only", "scaling_fit", "--seconds", "1", "-o", str(tmp_path)]) == 1
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["failed"] == ["scaling_fit"]
        pages.add(Path(last["page"]))
    assert pages == set(tmp_path.iterdir())
    assert len(pages) == 2  # the first one was not replaced


def test_limits_are_held_against_ratios_or_figures() -> None:
    assert Row("speed", 12345.6, 10000.0, 1.2346, 1.1).cells() == ["speed", "12,346", "10,000", "1.23", "≥ 1.1", "met"]
    assert Row("speed", 1.0, 2.0, 0.5, 0.9).cells()[-1] == "**not met**"
    assert Row("error", 0.2, limit=0.1, at_most=True).cells()[-2:] == ["≤ 0.1", "**not met**"]
    assert Row("seconds", 3.0).cells()[-2:] == ["none", ""]
    (missing,) = [row for row in PARTS["sae_step"].rows(STEP) if "sae-lens" in row.figure]
    assert missing.cells()[-2:] == ["≥ 5", "unknown"]


def test_everything_together_is_planned_to_take_less_than_twenty_minutes() -> None:
    assert sum(part.seconds for part in PARTS.values()) < TWENTY_MINUTES
