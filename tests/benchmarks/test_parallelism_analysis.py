"""The figures of a sweep, from run directories that the real code wrote."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.parallelism_analysis import draw_layouts, draw_throughput, fixed_batch, main, read_points
from launch.sweep_record import Entry, write_points
from steerscale.errors import SteerscaleError
from steerscale.metrics import Recorder
from steerscale.rundir import Status, create_run_dir, write_status
from tests.train.runs import run_config


@pytest.fixture
def runs(german_data: Path, tmp_path: Path) -> Path:
    """Two layouts at MBS 2 and GAS 4, one of them also at MBS 4; a third layout that ran out of memory, a fourth left out."""
    directory = tmp_path / "sweep"
    directory.mkdir()
    for number, (parallel, tflops) in enumerate(
        (
            ({"data": 2, "micro_batch_size": 2}, 100.0),
            ({"tensor": 2, "micro_batch_size": 2}, 120.0),
            ({"tensor": 2, "micro_batch_size": 4}, 150.0),
            ({"pipeline": 2, "micro_batch_size": 2}, None),
        )
    ):
        batch = {"global_batch_size": None, "gradient_accumulation_steps": 4}
        config = replace(
            run_config(german_data, directory / str(number), parallel={**batch, **parallel}), name=f"run {number}"
        )
        run_dir = Path(config.run_dir)
        create_run_dir(run_dir, config, command=["test"])
        if tflops is None:
            write_status(run_dir, Status(state="failed", cause="oom"))
            continue
        recorder = Recorder(run_dir, writes=True, tensorboard=False)
        recorder.write("start", 0, {"layout": str(config.layout()), "device": "CPU (test)", "ranks": 2})
        rates = {"model_tflops_per_gpu": tflops, "legacy_tflops_per_gpu": 1.4 * tflops}
        recorder.write("train", 1, {**rates, "tokens_per_second_per_gpu": 10 * tflops, "seconds_per_step": 1.0})
        recorder.close()
        write_status(run_dir, Status(state="finished"))
    big = Entry(
        values={},
        verdict="predicted_oom",
        layout="TP1 PP1 DP1 MBS2 GAS4",
        run_dir="none",
        predicted_gib=50.25,
        device_gib=40,
    )
    write_points(directory, [big, replace(big, layout="TP1 PP1 DP1 MBS1 GAS4", run_dir="other")], command=["test"])
    return directory


def test_figures_show_each_layout_once_and_why_others_have_no_result(runs: Path) -> None:
    points = read_points([runs])
    assert fixed_batch(points, mbs=None, gas=None) == (2, 4)
    figure = draw_layouts(points, mbs=2, gas=4, left_out=["TP1 PP1 DP1: predicted OOM"], device="CPU (test)")
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["TP2 PP1 DP1", "TP1 PP1 DP2", "TP1 PP2 DP1"]
    assert [bar.get_width() for bar in axis.patches[:3]] == [120, 100, 0]
    assert [round(bar.get_width()) for bar in axis.patches[3:]] == [168, 140, 0]
    assert [text.get_text().strip() for text in axis.texts] == ["120", "100", "out of memory"]
    assert "predicted OOM" in axis.get_xlabel()
    (axis,) = draw_throughput(points, over="MBS", device="CPU (test)").axes
    lines = {line.get_label(): list(line.get_xydata().ravel()) for line in axis.get_lines()}
    assert {label.split(" ", 1)[1]: values for label, values in lines.items()} == {
        "TP2 PP1 DP1 GAS 4": [2, 1200, 4, 1500],
    }  # a single point is no line
    assert axis.get_title().endswith("parameters on 2 ranks, CPU (test); says nothing about GPUs")


def test_the_command_writes_both_figures(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "-o", str(tmp_path / "out"), "--format", "svg"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["runs"], said["device"], said["mbs"], said["gas"]) == (4, "CPU (test)", 2, 4)
    assert [Path(path).name for path in said["figures"]] == ["layouts.svg", "throughput.svg"]
    assert all("<svg" in Path(path).read_text(encoding="utf-8") for path in said["figures"])
    assert "says nothing about GPUs" in (tmp_path / "out" / "layouts.svg").read_text(encoding="utf-8")


def test_what_cannot_be_drawn_is_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "--mbs", "7"]) == 2
    assert "no run with --mbs 7" in capsys.readouterr().err
    with pytest.raises(SteerscaleError, match="no run directory"):
        read_points([runs / "nowhere"])
    recorder = Recorder(runs / "0", writes=True, tensorboard=False)
    recorder.write("start", 0, {"layout": "?", "device": "NVIDIA H200", "ranks": 2})
    recorder.close()
    assert main([str(runs)]) == 2
    assert "several devices: choose one with --device" in capsys.readouterr().err
