"""`steerscale dashboard` in every format, and the page's own safety."""

import base64
import csv
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from launch.sweep_table import main as show_table
from steerscale.cli import main
from steerscale.dashboard.report import embed, page_data
from steerscale.dashboard.runs import find_directories

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> $a|b$ {{DATA}} \u2028"


def renamed(run: Path, to: Path, name: str) -> None:
    """A copy of a run under another name."""
    shutil.copytree(run, to)
    config = yaml.safe_load((to / "config.yaml").read_text(encoding="utf-8"))
    (to / "config.yaml").write_text(yaml.safe_dump({**config, "name": name}), encoding="utf-8")


def data_of(report: Path) -> dict:
    """What a report holds for its scripts."""
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', report.read_text(encoding="utf-8"), re.S
    )
    return json.loads(text)["data"]


def test_table_stays_the_default(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", str(runs)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:3] == ["run", "layout", "state"]
    assert len(out) == 1 + 24 + 2


def test_engines_are_a_column_where_they_differ(engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    titles = ["DeepSpeed ZeRO-1", "Megatron-Core"]
    assert main(["dashboard", str(engines)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()[:3]
    assert head.split()[:4] == ["run", "layout", "engine", "state"]
    assert [title for row in sorted(rows) for title in titles if title in row] == titles
    losses = {row.split("finished")[1].split()[1] for row in rows}
    assert len(losses) == 1, "both train the same model on the same data"
    assert main(["dashboard", str(engines), "--format", "md"]) == 0
    assert "| engine |" in capsys.readouterr().out
    assert main(["dashboard", str(next(engines.glob("engine-d*")))]) == 0
    assert "DeepSpeed" not in capsys.readouterr().out
    assert show_table([str(engines)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()[:3]
    assert head.split()[:4] == ["point", "layout", "engine", "state"]
    assert all(any(title in row for row in rows) for title in titles)


def test_report_of_both_engines(engines: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert main(["dashboard", str(engines), "-o", str(report)]) == 0
    data = data_of(report)
    assert {run["figures"]["engine"] for run in data["runs"]} == {"DeepSpeed ZeRO-1", "Megatron-Core"}
    (figure,) = [figure for figure in data["figures"] if figure["key"] == "engine"]
    assert figure["shown"]
    assert main(["dashboard", str(next(engines.glob("engine-m*"))), "-o", str(report)]) == 0
    (figure,) = [figure for figure in data_of(report)["figures"] if figure["key"] == "engine"]
    assert not figure["shown"]
    assert main(["dashboard", str(engines), "-o", str(tmp_path / "runs.png")]) == 0


def test_broken_runs_are_named_under_the_table(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(find_directories([runs])[0], tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.yaml").write_text("a: [", encoding="utf-8")
    assert main(["dashboard", str(tmp_path)]) == 0
    assert f"not read: {tmp_path / 'bad'}: " in capsys.readouterr().out
    assert main(["dashboard", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 0
    (broken,) = data_of(tmp_path / "r.html")["broken"]
    assert broken["path"] == str(tmp_path / "bad")
    assert "YAML" in broken["reason"]
    assert main(["dashboard", str(tmp_path), "--format", "csv"]) == 0
    assert "not read" in capsys.readouterr().err


def test_csv_has_every_figure_and_key_unrounded(runs: Path, tmp_path: Path) -> None:
    assert main(["dashboard", str(runs), "-o", str(tmp_path / "runs.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 24
    first = rows[0]
    assert first["config.parallel.tensor"] == first["tp"]
    assert float(first["model_tflops_per_gpu"]) > 0
    unknown = [row for row in rows if row["device"] == "NVIDIA A100-SXM-64GB"]
    assert unknown
    assert all(row["mfu"] == "" for row in unknown)
    assert all(float(row["mfu"]) > 0 for row in rows if row not in unknown)


def test_markdown_escapes_what_would_break_the_table(runs: Path, tmp_path: Path) -> None:
    renamed(find_directories([runs])[0], tmp_path / "run", HOSTILE)
    assert main(["dashboard", str(tmp_path), "--format", "md", "-o", str(tmp_path / "runs.md")]) == 0
    head, rule, row, *_ = (tmp_path / "runs.md").read_text(encoding="utf-8").splitlines()
    assert head.count("|") == rule.count("|") == len(re.findall(r"(?<!\\)\|", row))
    assert "<script>" not in row


def test_png_is_drawn_without_a_display(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    renamed(find_directories([runs])[0], tmp_path / "run", HOSTILE)
    assert main(["dashboard", str(runs), str(tmp_path / "run"), "-o", str(tmp_path / "runs.png")]) == 0
    content = (tmp_path / "runs.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 50_000
    assert "24 of 25 runs drawn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "report.pdf"], "its ending is none of"),
        (["--format", "html"], "needs a file to write"),
        (["-o", "nowhere/report.html"], "is no directory"),
        (["--serve", "-o", "r.html"], "--serve writes no file"),
        (["--serve", "--refresh", "0"], "--refresh must be positive"),
    ],
)
def test_options_that_cannot_work_are_errors(
    runs: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dashboard", str(runs), *options]) == 2
    assert message in capsys.readouterr().err


def test_report_is_whole_and_its_policy_names_its_scripts(runs: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert main(["dashboard", str(runs), "-o", str(report)]) == 0
    assert list(tmp_path.iterdir()) == [report]
    text = report.read_text(encoding="utf-8")
    assert not re.search(r'<(?:script|link|img|iframe)[^>]*\s(?:src|href)="(?!data:)', text), "nothing is fetched"
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    plotly, own = re.findall(r'<script(?: type="text/plain" id="plotly")?>(.*?)</script>', text, re.S)
    for script in (plotly, own):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    data = data_of(report)
    assert len(data["runs"]) == 24
    assert data["common"]["model.seq_len"] == 2048
    assert all("model.seq_len" not in run["config"] and "parallel.tensor" in run["config"] for run in data["runs"])
    assert ["NVIDIA A100-SXM-64GB", None] in data["peaks"]
    assert ["NVIDIA A100-SXM4-40GB", 312] in data["peaks"]


def test_embedded_data_cannot_leave_its_element(runs: Path, tmp_path: Path) -> None:
    renamed(find_directories([runs])[0], tmp_path / "run", HOSTILE)
    report = tmp_path / "report.html"
    assert main(["dashboard", str(tmp_path), "-o", str(report)]) == 0
    assert "alert(1)</script>" not in report.read_text(encoding="utf-8")
    (run,) = data_of(report)["runs"]
    assert run["figures"]["run"] == HOSTILE
    assert json.loads(embed(HOSTILE)) == HOSTILE


def test_values_that_json_does_not_know_are_text(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(find_directories([runs])[0], tmp_path / "run")
    with (tmp_path / "run" / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("extra: {day: 2026-01-02, most: .inf, skip: [[0, 8]], 3: x}\n")
    assert main(["dashboard", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 0
    config = data_of(tmp_path / "r.html")["runs"][0]["config"]
    assert (config["extra.day"], config["extra.most"]) == ('"2026-01-02"', "Infinity")
    assert (config["extra.skip"], config["extra.3"]) == ("[[0, 8]]", "x")


def test_page_of_no_readable_run_is_a_page() -> None:
    data = page_data([])
    assert (data["runs"], data["common"], data["peaks"]) == ([], {}, [])


def test_a_directory_whose_name_is_no_utf8_stands_in_every_form(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(find_directories([runs])[0], tmp_path / os.fsdecode(b"M\xfcller"))
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    (tmp_path / os.fsdecode(b"\xff") / "config.yaml").write_text("a: [", encoding="utf-8")
    for name in ("runs.csv", "runs.md", "runs.html"):
        assert main(["dashboard", str(tmp_path), "-o", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_text(encoding="utf-8")
    assert main(["dashboard", str(tmp_path)]) == 0
    assert r"\udcff: " in capsys.readouterr().out
    (run,) = data_of(tmp_path / "runs.html")["runs"]
    assert run["path"].endswith("M\udcfcller")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refresh", "nan"], "--refresh must be positive and at most 86400 seconds, got nan"),
        (["--refresh", "1e7"], "--refresh must be"),
        (["--port", "65536"], "--port must be between 0 and 65535, got 65536"),
        (["--port", "-1"], "--port must be"),
    ],
)
def test_what_cannot_be_served_is_said(
    options: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dashboard", str(runs), "--serve", *options]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_file_is_not_replaced_by_one(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "report.html")
    assert main(["dashboard", str(runs), "-o", str(tmp_path / "report.html")]) == 2
    assert "is no regular file" in capsys.readouterr().err
    assert (tmp_path / "report.html").is_fifo()
