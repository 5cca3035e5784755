import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from steerscale.cli import main
from steerscale.cli.calibration import read_measurement, this_cpu
from steerscale.config import from_mapping
from steerscale.metrics import Recorder
from steerscale.rundir import create_run_dir
from steerscale.train.config import RunConfig

CASE = ["plan", "--model", "6.7b", "--gpus", "16", "--gpu", "a100-40gb", "--global-batch-size", "512"]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_plan_shows_ranked_layouts_parts_reasons_and_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CASE, "--top", "3"]) == 0
    text = capsys.readouterr().out
    assert "6.66 B parameters" in text
    assert "16 x a100-sxm-40gb of 40 GiB, 8 a node" in text
    assert "a vocabulary of 51,200 tokens (--vocab-size)" in text
    rows = [line.split() for line in text.splitlines() if "ZeRO-1  " in line or "whole  " in line]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "context", "margin"):
        assert f"\n  {part} " in text
    assert "python -m launch.train parallel.tensor=" in text
    assert "more than the 36.0 GiB usable of 40" in text
    assert "GiB over" not in text
    assert main([*CASE, "--rejected"]) == 0
    assert "TP1 PP1 DP16 MBS1 GAS32 recompute full: " in capsys.readouterr().out


def test_plan_json_holds_what_the_text_shows(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *CASE, "--top", "5")
    best = found["plans"][0]
    assert len(found["plans"]) == 5
    assert found["fitting"] > 100
    layout = best["layout"]
    assert layout["tensor"] * layout["pipeline"] * layout["data"] == 16
    assert sum(best["seconds"].values()) == pytest.approx(best["seconds_per_iteration"])
    assert sum(best["memory"]["parts_gib"].values()) == pytest.approx(best["memory"]["needed_gib"])
    assert best["memory"]["needed_gib"] <= 40
    assert "rejections" not in found
    assert len(answer(capsys, *CASE, "--rejected")["rejections"]) == sum(found["reasons"].values())


def test_plan_searches_what_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    limits = "--tp 4 --pp 1,2 --vpp 1 --mbs 2 --gas 64,128 --sequence off --recompute none --zero 1"
    found = answer(capsys, *CASE, *limits.split())
    layouts = [plan["layout"] for plan in found["plans"]]
    assert {(layout["tensor"], layout["pipeline"]) for layout in layouts} == {(4, 1), (4, 2)}
    assert all(layout["gradient_accumulation_steps"] in (64, 128) for layout in layouts)
    assert all(not layout["sequence"] and layout["zero"] == 1 for layout in layouts)


def test_plan_of_deepspeed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--engine", "deepspeed", "--precision", "fp16", "--zero", "2,3", "--offload-optimizer"]
    found = answer(capsys, *CASE, *options)
    assert (found["engine"], found["precision"]) == ("deepspeed", "fp16")
    assert {plan["layout"]["zero"] for plan in found["plans"]} <= {2, 3}
    for plan in found["plans"]:
        assert plan["memory"]["host_gib"] > 0
        assert {"engine=deepspeed", "engine.offload_optimizer=true", "engine.precision=fp16"} <= set(plan["overrides"])
    assert main([*CASE, *options]) == 0
    printed = capsys.readouterr().out
    assert "DS ZeRO-3 offload" in printed
    assert "of the host's memory for its optimizer" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp16"], "engine.precision=fp16 needs engine=deepspeed"),
        (["--offload-optimizer"], "is a setting of DeepSpeed"),
    ],
)
def test_plan_refuses_what_the_engine_does_not_have(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in refusal(capsys, *CASE, *options)


def test_plan_says_what_is_nearest_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "175b", "--gpus", "8", "--gpu", "a100-40gb", "--global-batch-size", "8"]) == 0
    text = capsys.readouterr().out
    assert "nothing fits" in text
    assert "nearest    TP8" in text


def test_plan_takes_links_from_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["plan", "--model", "13b", "--gpus", "16", "--global-batch-size", "64", "--tp", "16"]
    alpha = answer(capsys, *model, "--cluster", "alpha")
    assert alpha["machine"]["inter_node_gb_per_second"] == 6.25
    assert alpha["plans"] == []  # 40 heads
    model[2] = "6.7b"
    slow = answer(capsys, *model, "--cluster", "alpha")["plans"][0]
    fast = answer(capsys, *model, "--cluster", "juwels_booster")["plans"][0]
    assert slow["seconds"]["tensor_communication"] > 1.5 * fast["seconds"]["tensor_communication"]
    assert slow["notes"] == ["TP16 leaves the node of 8"]


def test_plan_reads_model_files_and_run_configurations(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shape = {"num_layers": 4, "d_model": 512, "num_heads": 8, "seq_len": 1024, "vocab_size": 30000}
    for name, content in (("model.yaml", shape), ("config.yaml", {"name": "run", "model": shape})):
        (tmp_path / name).write_text(yaml.safe_dump(content), encoding="utf-8")
        found = answer(
            capsys, "plan", "--model", f"{tmp_path / name}", "--gpus", "2", "--gpu", "h200", "--global-batch-size", "4"
        )
        assert (found["model"]["vocab_size"], found["model"]["d_model"]) == (30000, 512)
        assert not any("vocabulary" in sentence for sentence in found["assumptions"])
        assert any("efficiency of A100s" in sentence for sentence in found["assumptions"])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("plan --gpus 16", ["--model is missing"]),
        ("plan --model 6.8b --gpus 16 --gpu h200 --global-batch-size 8", ["6.8b", "6.7b"]),
        ("plan --model 6.7b --gpus 16 --global-batch-size 8", ["which GPUs? --gpu NAME"]),
        ("plan --model 6.7b --gpus 16 --gpu v100 --global-batch-size 8", ["unknown GPU 'v100'", "h200"]),
        ("plan --model 6.7b --gpus 0 --gpu h200 --global-batch-size 8", ["gpus must be at least 1, got 0"]),
        ("plan --model 6.7b --gpus 8 --gpu h200 --global-batch-size 8 --precision fp32", ["no fp32 peak"]),
        ("plan --calibrate /nowhere", ["/nowhere is no run directory"]),
    ],
)
def test_plan_refuses_with_one_line(capsys: pytest.CaptureFixture[str], arguments: str, parts: list[str]) -> None:
    text = refusal(capsys, *arguments.split())
    assert text.count("\n") == 1
    for part in parts:
        assert part in text


def test_lists_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*CASE, "--recompute", "some"])
    assert "expected a list like" in capsys.readouterr().err


def make_run(run_dir: Path, *, data: int, micro_batch_size: int, seconds: float) -> None:
    """A run directory of a run of 30 steps that took this long each."""
    parallel = {"data": data, "micro_batch_size": micro_batch_size, "global_batch_size": 16}
    model = {"num_layers": 4, "d_model": 256, "num_heads": 4, "seq_len": 256, "vocab_size": 1000}
    values = {
        "name": run_dir.name,
        "run_dir": f"{run_dir}",
        "model": model,
        "train": {"steps": 30},
        "parallel": parallel,
    }
    create_run_dir(run_dir, from_mapping(RunConfig, values), command=["test"])
    recorder = Recorder(run_dir, writes=True, tensorboard=False)
    for step, factor in ((10, 1.0), (20, 1.0), (30, 7.0)):  # something disturbed the last interval
        record = {"seconds_per_step": factor * seconds, "global_batch_size": 16, "memory_peak_gib_max": 0.5}
        recorder.write("train", step, record)
    recorder.close()


def test_calibrate_writes_a_file_that_plans_use(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data, size, seconds in (("a", 1, 2, 8.0), ("b", 1, 8, 7.5), ("c", 2, 2, 4.1), ("d", 2, 8, 3.8)):
        make_run(tmp_path / name, data=data, micro_batch_size=size, seconds=seconds)
    assert main(["plan", "--calibrate", "a", "b", "c", "d", "-o", "mine.yaml"]) == 0
    text = capsys.readouterr().out
    assert "mine.yaml: matmul, network fitted to 4 runs" in text
    assert "0.50" in text  # the measured peak
    fitted = yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8"))["fitted"]
    assert fitted["runs"] == ["a", "b", "c", "d"]
    assert fitted["largest_error"] < 0.15
    case = ["plan", "--model", "a/config.yaml", "--gpus", "1", "--global-batch-size", "16", "--precision", "fp32"]
    limits = ["--mbs", "2", "--recompute", "none"]
    found = answer(capsys, *case, *limits, "--calibration", "mine.yaml")
    assert found["plans"][0]["seconds_per_iteration"] == pytest.approx(8.0, rel=0.15)
    assert found["plans"][0]["throughput"]["mfu"] is None  # a core's peak is not known


def test_runs_of_one_name_are_calibrated_each(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for directory, seconds in (("slow", 8.0), ("fast", 4.0)):
        (tmp_path / directory).mkdir()
        make_run(tmp_path / directory / "run", data=1, micro_batch_size=2, seconds=seconds)
    assert main(["plan", "--calibrate", "slow/run", "fast/run", "-o", "mine.yaml"]) == 0
    errors = [line.split()[2] for line in capsys.readouterr().out.splitlines() if "/run: TP1" in line]
    assert [error[0] for error in errors] == ["-", "+"]  # one prediction, between the two
    fitted = yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8"))["fitted"]
    assert fitted["runs"] == ["slow/run", "fast/run"]


def test_calibration_takes_the_layout_of_the_last_start(tmp_path: Path) -> None:
    make_run(tmp_path / "run", data=1, micro_batch_size=2, seconds=8.0)
    recorder = Recorder(tmp_path / "run", writes=True, tensorboard=False, step=30)
    recorder.write("start", 30, {"layout": "TP1 PP1 DP1 MBS2 GAS8"})
    recorder.write("train", 40, {"seconds_per_step": 2.0, "global_batch_size": 16})
    recorder.close()
    measured = read_measurement(tmp_path / "run", this_cpu())
    assert measured is not None
    assert measured.seconds == 2.0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"kind": "train", "step": 40, "seconds_per_step": NaN}', "seconds_per_step must be a finite number"),
        ("12", "holds something else than records"),
    ],
)
def test_calibration_names_records_that_are_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, record: str, message: str
) -> None:
    make_run(tmp_path / "run", data=1, micro_batch_size=2, seconds=8.0)
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(record + "\n")
    assert message in refusal(capsys, "plan", "--calibrate", str(tmp_path / "run"), "-o", str(tmp_path / "mine.yaml"))


def test_calibration_needs_a_place_to_write(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_run(tmp_path / "run", data=1, micro_batch_size=2, seconds=8.0)
    calibrate = ["plan", "--calibrate", str(tmp_path / "run"), "-o"]
    assert "is no directory; create it first" in refusal(capsys, *calibrate, str(tmp_path / "none" / "mine.yaml"))
    assert "cannot be written" in refusal(capsys, *calibrate, str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "0"], "--tp must be at least 1, got 0"),
        (["--pp", "2,-1"], "--pp must be at least 1, got -1"),
        (["--gas", "0"], "--gas must be at least 1, got 0"),
        (["--top", "-1"], "--top must not be negative, got -1"),
    ],
)
def test_plan_refuses_degrees_that_are_none(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in refusal(capsys, *CASE, *options)


@pytest.mark.parametrize("options", [["--gpus", "13"], ["--sequence", "on", "--tp", "1"]])
def test_plan_blames_memory_only_where_memory_is_short(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert main([*CASE, *options]) == 0
    text = capsys.readouterr().out
    assert "no layout is possible, whatever memory there is" in text
    assert "nothing fits" not in text
    assert ("sequence parallelism needs TP > 1" in text) == ("--sequence" in options)


def test_plan_of_many_gpus_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, *CASE, "--gpus", "1000000007")["plans"] == []  # a prime


def test_plan_is_quick_to_start() -> None:
    script = (
        "import sys, time; start = time.process_time()\n"
        "from steerscale.cli import main\n"
        f"main({[*CASE, '--json']!r})\n"
        'sys.stderr.write(f\'{sorted({"torch", "numpy", "megatron", "hydra"} & set(sys.modules))}\')'
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == "[]"
