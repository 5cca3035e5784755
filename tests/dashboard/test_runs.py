"""Reading run directories: the real one, broken ones, and what is computed from their records."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerscale.dashboard.curves import MOST_EVENTS, curves_of, events_of, thin
from steerscale.dashboard.figures import BY_KEY, FIGURES, figures_of, percentile, write
from steerscale.dashboard.runs import BrokenRun, Run, find_directories, flatten, read_run, scan_runs
from steerscale.errors import SteerscaleError


def run_of(records: list[dict[str, Any]], **changes: Any) -> Run:
    """A run of these records of kind "train"."""
    run = Run(Path("run"), {"name": "run"}, "finished", len(records), "TP1", "CPU", records, [], history=records)
    return replace(run, **changes)


def test_figures_of_a_real_run(real_run: Path) -> None:
    run = read_run(real_run)
    figures = figures_of(run)
    assert (figures["state"], figures["step"], figures["dp"], figures["gas"], figures["gbs"]) == (
        "finished",
        12,
        2,
        2,
        8,
    )
    assert len(run.step_seconds()) == 12
    assert min(run.step_seconds()) <= figures["seconds_p50"] <= figures["seconds_p95"] <= max(run.step_seconds())
    assert figures["tokens_per_second_per_gpu"] > 0
    assert figures["memory_peak_gib_max"] > figures["memory_predicted_gib"] > 0
    assert (figures["mfu"], figures["hfu"], figures["peak_tflops"]) == (None, None, None)
    assert write(BY_KEY["mfu"], figures["mfu"]) == "-"
    assert write(BY_KEY["legacy_tflops_per_gpu"], 1023.4) == "1020"
    assert (figures["restarts"], figures["skipped"]) == (0, 0)
    assert {event["kind"] for event in events_of(run)} <= {"slow", "straggler"}, "it was never restarted"


def test_every_figure_says_what_it_is() -> None:
    assert all(figure.note and figure.title for figure in FIGURES)
    assert len(BY_KEY) == len(FIGURES)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, None), ([3.0], 0.95, 3.0), ([4.0, 1.0, 2.0, 3.0], 0.5, 2.5), ([0.0, 10.0], 0.95, 9.5)],
)
def test_percentile_is_linear_between_values(values: list[float], share: float, expected: float | None) -> None:
    assert percentile(values, share) == expected


def test_step_times_are_single_steps_where_they_were_written_down() -> None:
    with_steps = {"step": 2, "seconds_per_step": 2.0, "step_seconds": [1.0, 3.0]}
    assert run_of([with_steps]).step_seconds() == [1.0, 3.0]
    assert run_of([{"step": 2, "seconds_per_step": 2.0}, {"step": 3}]).step_seconds() == [2.0]


def test_thin_keeps_ends_and_extremes() -> None:
    values: list[float | None] = [1.0] * 10_000
    values[1234], values[7777], values[5000] = 9.0, -9.0, None
    kept = thin([values, [0.0] * 10_000], points=200)
    assert {0, 1234, 7777, 9999} <= set(kept)
    assert len(kept) <= 202
    assert kept == sorted(kept)
    assert thin([[1.0, 2.0]], points=200) == [0, 1]
    assert thin([[]], points=200) == []
    assert thin([[None] * 500], points=100) == [0, 499]


def test_curves_are_parallel_and_constants_are_one_number() -> None:
    records = [{"step": k, "time": 100.0 + k, "loss": 5 - k / 1000, "bubble_fraction": 0.25} for k in range(1, 3001)]
    records[1499]["loss"] = float("nan")
    curves = curves_of(run_of(records, starts=[{"step": 0, "time": 100.0}]), points=120)
    assert len(curves["step"]) == len(curves["time"]) == len(curves["loss"]) <= 122
    assert (curves["step"][0], curves["time"][-1], curves["bubble_fraction"]) == (1, 3000.0, 0.25)
    assert curves["mfu"] is None


def test_events_name_restarts_skips_slow_steps_and_ranks_waited_for() -> None:
    usual = {"step_seconds": [1.0, 1.0], "data_seconds_max": 0.1, "data_slowest_rank": 0}
    records = [
        {"step": 2, "time": 12.0, **usual},
        {"step": 4, "time": 14.0, **usual, "step_seconds": [1.0, 4.0]},
        {"step": 6, "time": 16.0, **usual, "data_seconds_max": 0.8, "data_slowest_rank": 5},
    ]
    starts = [{"step": 0, "time": 10.0}, {"step": 2, "time": 13.0, "layout": "TP2"}]
    skips = [{"step": 3, "time": 13.5, "first_sample": 8, "end_sample": 16}]
    events = {event["kind"]: event for event in events_of(run_of(records, starts=starts, skips=skips))}
    assert events.keys() == {"restart", "skip", "slow", "straggler"}
    assert (events["restart"]["step"], events["restart"]["time"], events["restart"]["text"]) == (2, 3.0, "start as TP2")
    assert events["skip"]["text"] == "samples 8 to 15 not applied"
    assert (events["slow"]["step"], events["slow"]["text"]) == (4, "4 s, 4.0 times the median")
    assert events["straggler"]["text"] == "rank 5 waited 0.8 s a step for its data"


def test_a_slow_step_beside_a_traced_one_has_its_own_number() -> None:
    records = [{"step": 10, "time": 1.0, "step_seconds": [1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]}]
    run = run_of(records, config={"name": "run", "profile": {"steps": [4]}})
    assert [(event["kind"], event["step"]) for event in events_of(run)] == [("slow", 2)]
    warmed_up = [{"step": 10, "time": 1.0, "step_seconds": [1.0, 1.0, 5.0, 1.0]}]
    assert [event["step"] for event in events_of(run_of(warmed_up))] == [9]


def test_events_are_limited_and_say_so() -> None:
    skips = [{"step": step, "time": 0.0} for step in range(500)]
    events = events_of(run_of([], skips=skips))
    assert len(events) == MOST_EVENTS
    assert events[-1]["text"].endswith("(400 more are not shown)")


def test_directories_are_found_below_and_only_once(runs: Path) -> None:
    below = find_directories([runs])
    assert len(below) == 24
    assert find_directories([runs, below[3], runs / "." / below[5].relative_to(runs)]) == below
    assert find_directories([below[7]]) == [below[7]]


def test_scan_goes_on_past_broken_directories(runs: Path, tmp_path: Path) -> None:
    good = find_directories([runs])[0]
    for name in ("good", "no_status", "bad_yaml", "bad_status", "no_records", "text", "nan", "latin", ".new.12"):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "no_status" / "status.json").unlink()
    (tmp_path / "bad_yaml" / "config.yaml").write_text("a: [", encoding="utf-8")
    (tmp_path / "bad_status" / "status.json").write_text('{"state": 1, "color": 2}', encoding="utf-8")
    (tmp_path / "no_records" / "metrics.jsonl").write_text('{"kind": "train"}\n', encoding="utf-8")
    with (tmp_path / "text" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 601, "step_seconds": [1.0, "fast"]}\n')
    with (tmp_path / "nan" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 601, "loss": NaN}\n')
    (tmp_path / "latin" / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 1, "x": "\xe4"}\n')
    told: list[tuple[int, int]] = []
    found = list(scan_runs([tmp_path], lambda done, total: told.append((done, total))))
    assert [run.name for run in found if isinstance(run, Run)] == [read_run(good).name]
    broken = {entry.path.name: entry.reason for entry in found if isinstance(entry, BrokenRun)}
    assert broken.keys() == {"no_status", "bad_yaml", "bad_status", "no_records", "text", "nan", "latin"}
    assert "status.json cannot be read" in broken["no_status"]
    assert "cannot be read as YAML" in broken["bad_yaml"]
    assert "entry 1" in broken["no_records"]
    assert "step_seconds must be a finite number" in broken["text"]
    assert "loss must be a finite number, got nan" in broken["nan"]
    assert told[0] == (0, 8)
    assert told[-1] == (8, 8)
    with pytest.raises(SteerscaleError, match="is no run directory and holds none"):
        list(scan_runs([tmp_path / "good" / "logs"]))


def test_line_cut_short_by_a_crash_is_left_out(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(find_directories([runs])[0], tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "train", "step": 10**6})[:-4])
    assert read_run(tmp_path / "run").step == 600


def test_configuration_of_another_version_is_shown_without_what_cannot_be_computed(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(find_directories([runs])[0], tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("  tensor: ", "  tenseur: "), encoding="utf-8")
    figures = figures_of(read_run(tmp_path / "run"))
    assert (figures["tp"], figures["memory_predicted_gib"]) == (None, None)
    assert figures["model_tflops_per_gpu"] is not None


def test_a_step_is_a_whole_number_that_a_float_holds(runs: Path, tmp_path: Path) -> None:
    for name, step in (("half", "1.5"), ("true", "true"), ("huge", "9" * 400)):
        shutil.copytree(find_directories([runs])[0], tmp_path / name)
        with (tmp_path / name / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(f'{{"kind": "train", "step": {step}}}\n')
        with pytest.raises(SteerscaleError, match="step must be a "):
            read_run(tmp_path / name)


def test_memory_is_not_predicted_as_if_a_frozen_model_were_trained(real_run: Path) -> None:
    run = read_run(real_run)
    assert figures_of(run)["memory_predicted_gib"] is not None
    trains_saes = replace(run, config={**run.config, "sae": {"architecture": "topk"}})
    assert figures_of(trains_saes)["memory_predicted_gib"] is None


def test_flatten_joins_keys_and_keeps_lists() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}
