"""The record of a run, and what shows it."""

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from steerscale.metrics import (
    LEGACY_SECONDS,
    LEGACY_TFLOPS,
    Recorder,
    console_line,
    format_duration,
    format_seconds,
    read_records,
)
from tests.disks import fill, small_disk

STEP: dict[str, Any] = {
    "loss": 2.5,
    "grad_norm": 0.5,
    "lr": 1e-3,
    "global_batch_size": 8,
    "seconds_per_step": 0.25,
    "legacy_tflops_per_gpu": 1.5,
    "model_tflops_per_gpu": 1.25,
    "tokens_per_second_per_gpu": 1000.0,
    "mfu": None,
    "consumed_samples": 16,
    "seconds": {"data": 0.01, "optimizer": 0.02},
    "seconds_between_steps": {"checkpoint": 0.5},
}


def record_steps(run_dir: Path, steps: range, *, step: int = 0, tensorboard: bool = False, **start: Any) -> None:
    """A start that reports `steps`, each with another loss."""
    recorder = Recorder(run_dir, writes=True, tensorboard=tensorboard, step=step, **start)
    recorder.write("start", step, {"ranks": 1})
    for number in steps:
        recorder.write("train", number, {**STEP, "loss": 10.0 / number})
        if number % 5 == 0:
            recorder.write(
                "eval", number, {"loss": 11.0 / number, "perplexity": 9.0, "bits_per_byte": 1.0, "tokens": 3}
            )
    recorder.close()


def train_steps(run_dir: Path) -> list[int]:
    """Steps of kind "train" in their order."""
    return [record["step"] for record in read_records(run_dir, "train")]


def test_recorder_writes_what_it_was_given(tmp_path: Path) -> None:
    record_steps(tmp_path, range(1, 3))
    start, first, second = read_records(tmp_path)
    assert (start["kind"], start["step"], start["ranks"]) == ("start", 0, 1)
    assert (first["step"], second["step"]) == (1, 2)
    assert {key: second[key] for key in STEP} == {**STEP, "loss": 5.0}
    assert read_records(tmp_path, "eval") == []
    assert read_records(tmp_path / "nowhere") == []


def test_recorder_of_other_ranks_writes_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, writes=False)
    recorder.write("train", 1, STEP)
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    record_steps(tmp_path, range(1, 8))
    record_steps(tmp_path, range(5, 11), step=4)
    assert train_steps(tmp_path) == list(range(1, 11))
    assert [record["step"] for record in read_records(tmp_path, "eval")] == [5, 10]
    assert [record["step"] for record in read_records(tmp_path, "start")] == [0, 4]


def test_evaluation_that_is_still_due_is_not_repeated(tmp_path: Path) -> None:
    record_steps(tmp_path, range(1, 6))
    record_steps(tmp_path, range(6, 7), step=5)
    assert [record["step"] for record in read_records(tmp_path, "eval")] == [5]
    record_steps(tmp_path, range(6, 7), step=5, evaluated=False)
    assert train_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert read_records(tmp_path, "eval") == []


@pytest.mark.parametrize("rest", [b'{"kind": "train", "step": 4, "lo', b"{", b'{"kind": "train", "step": 4}'])
def test_line_cut_short_by_a_crash_harms_no_other(tmp_path: Path, rest: bytes) -> None:
    record_steps(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(rest)
    assert train_steps(tmp_path)[:3] == [1, 2, 3]
    record_steps(tmp_path, range(4, 6), step=3)
    assert train_steps(tmp_path) == [1, 2, 3, 4, 5]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, writes=True)
    recorder.write("train", 1, {"loss": math.nan, "grad_norm": math.inf, "seconds": {"data": -math.inf}, "lr": 0.5})
    recorder.close()
    (record,) = read_records(tmp_path)
    assert (record["loss"], record["grad_norm"], record["seconds"], record["lr"]) == (None, None, {"data": None}, 0.5)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert scalars(tmp_path) == {"train/learning rate": [(1, 0.5)]}


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would draw."""
    events = EventAccumulator(str(run_dir / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


TAGS = {
    "train/loss": "loss",
    "train/grad norm": "grad_norm",
    "train/learning rate": "lr",
    "train/consumed samples": "consumed_samples",
    "train/global batch size": "global_batch_size",
    "iteration-time/iteration-time": "seconds_per_step",
    "iteration-time/TFLOPs per gpu (estimated)": "legacy_tflops_per_gpu",
    "throughput/model TFLOPs per GPU": "model_tflops_per_gpu",
    "throughput/tokens per second per GPU": "tokens_per_second_per_gpu",
}


def test_tensorboard_shows_what_is_recorded(tmp_path: Path) -> None:
    record_steps(tmp_path, range(1, 8), tensorboard=True)
    record_steps(tmp_path, range(5, 11), step=4, tensorboard=True)
    drawn, records = scalars(tmp_path), read_records(tmp_path, "train")
    assert {LEGACY_TFLOPS, LEGACY_SECONDS} < TAGS.keys()
    for tag, key in TAGS.items():
        assert drawn[tag] == [(record["step"], pytest.approx(record[key])) for record in records], tag
    for name in ("data", "optimizer"):
        assert drawn[f"time/{name}"] == [(r["step"], pytest.approx(r["seconds"][name])) for r in records]
    assert [step for step, _ in drawn["time/checkpoint"]] == list(range(1, 11))
    evaluations = read_records(tmp_path, "eval")
    assert drawn["valid/loss"] == [(r["step"], pytest.approx(r["loss"])) for r in evaluations]
    assert drawn.keys() == {
        *TAGS,
        *("time/data", "time/optimizer", "time/checkpoint"),
        *("valid/loss", "valid/perplexity", "valid/bits per byte"),
    }


def test_tensorboard_shows_no_step_twice_if_killed_before_the_first_checkpoint(tmp_path: Path) -> None:
    record_steps(tmp_path, range(1, 4), tensorboard=True)
    record_steps(tmp_path, range(1, 3), tensorboard=True)
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2]
    assert train_steps(tmp_path) == [1, 2]


def test_tensorboard_has_all_that_was_written_before_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RecordWriter.write

    def write_slowly(*args: Any) -> None:
        time.sleep(0.02)
        write(*args)

    monkeypatch.setattr(RecordWriter, "write", write_slowly)
    recorder = Recorder(tmp_path, writes=True)
    for step in (1, 2, 3):
        recorder.write("train", step, STEP)
    drawn = scalars(tmp_path)  # not closed: as a killed process leaves it
    assert [step for step, _ in drawn["time/checkpoint"]] == [1, 2, 3]  # the last ones written
    recorder.close()


def test_full_disk_delays_records_and_loses_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk:
        recorder = Recorder(disk, writes=True, tensorboard=False)
        recorder.write("train", 1, STEP)
        filler = fill(disk)
        for step in range(2, 40):  # more than the page that the file already has
            recorder.write("train", step, STEP)
        there = train_steps(disk)
        assert 1 <= len(there) < 39
        assert there == list(range(1, len(there) + 1))
        assert (disk / "metrics.jsonl").read_text().endswith("}\n")
        assert caplog.text.count("metrics.jsonl cannot be written, its records wait in memory") == 1
        filler.unlink()
        recorder.write("train", 40, STEP)
        assert train_steps(disk) == list(range(1, 41))
        recorder.close()


def test_records_that_never_fit_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", kib=16) as disk:
        recorder = Recorder(disk, writes=True, tensorboard=False)
        fill(disk)
        recorder.write("train", 1, STEP)
        recorder.write("train", 2, STEP)
        recorder.close()
        assert "lacks its last 2 records" in caplog.text
        assert read_records(disk) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_turns_tensorboard_off_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk:
        before = threading.enumerate()
        recorder = Recorder(disk, writes=True)
        (writer,) = set(threading.enumerate()) - set(before)
        filler = fill(disk)
        for step in range(1, 20):
            recorder.write("train", step, STEP)
        writer.join(60)  # its exception belongs to this test
        assert "TensorBoard events are not written any more: [Errno 28]" in caplog.text
        filler.unlink()
        recorder.write("train", 20, STEP)
        recorder.close()
        assert train_steps(disk) == list(range(1, 21))


def test_console_line_shows_what_is_known() -> None:
    assert console_line({"step": 5, **STEP, "eta_seconds": 61.0, "skipped_total": 2, "mfu": 0.351}, steps=200) == (
        "step   5/200  loss 2.5000  grad 0.500  lr 1.00e-03  250 ms/step  1,000 tok/s/rank  1.25 TFLOP/s/rank  MFU 35.1%  "
        "skipped 2  ETA 1m01s"
    )
    bare = {"step": 5, "loss": math.nan, "grad_norm": math.inf, "lr": 0.0, "seconds_per_step": None}
    assert console_line(bare, steps=5) == "step 5/5  loss nan  grad inf  lr 0.00e+00"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599.9, "1h00m"), (3660, "1h01m"), (90000, "1d01h")],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_short_times_have_a_sensible_unit() -> None:
    assert [format_seconds(seconds) for seconds in (0.0005, 0.25, 1.0, 12.345)] == [
        "0 ms",
        "250 ms",
        "1.00 s",
        "12.35 s",
    ]
