import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.sweep import plan_sweep
from steerscale.cli import main
from steerscale.metrics import Recorder
from steerscale.planning.scaling_laws import ParametricLaw
from steerscale.rundir import Status, create_run_dir, write_status

TRUTH = ParametricLaw(E=1.0, A=8, B=30, alpha=0.2, beta=0.2)
GRID = ["--sizes", "4.6e4", "7.3e4", "1.2e5", "--tokens", "4e4", "8e4", "1.6e5"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(data: Path, *options: str) -> list[str]:
    return ["scaling", "ladder", "--data", str(data), "--seq-len", "32", "-o", "ladder.yaml", *options]


def test_ladder_is_a_sweep_whose_runs_fit_and_predict(
    here: Path, german_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(german_data, *GRID, "--hold-out", "2.2e5,3e5", "--tflops", "1e-3", "--json")) == 0
    written = json.loads(capsys.readouterr().out)
    assert len(written["rungs"]) == 10
    assert written["hours"] == pytest.approx(written["flops"] / 1e9 / 3600)
    sweep = plan_sweep(["sweep=ladder.yaml"], config_name="train")
    assert sweep.directory == here / "runs" / "ladder"
    assert [point.entry.run_dir for point in sweep.points] == [rung["name"] for rung in written["rungs"]]
    for point, rung in zip(sweep.points, written["rungs"]):
        config = point.config
        assert config is not None
        assert config.model.num_parameters() == rung["parameters"]
        assert config.layout().global_batch_size == rung["batch"]
        assert config.train.steps * rung["batch"] * 32 == rung["tokens"]
        assert (config.optim.lr, config.optim.warmup_steps) == (rung["lr"], rung["warmup_steps"])
        create_run_dir(Path(config.run_dir), config, command=["test"])
        recorder = Recorder(Path(config.run_dir), writes=True, tensorboard=False)
        recorder.write("eval", config.train.steps, {"loss": TRUTH.loss(rung["parameters"], rung["tokens"])})
        recorder.close()
        write_status(Path(config.run_dir), Status(state="finished", step=config.train.steps, steps=config.train.steps))
    fit = ["scaling", "fit", "runs/ladder", "--hold-out", "1", "--bootstrap", "20", "--plot", "fit.png"]
    assert main(fit) == 0
    text = capsys.readouterr().out
    assert any("_held_out" in line and line.split()[-1] in ("inside", "outside") for line in text.splitlines())
    assert (here / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert main([*fit, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["law"]["alpha"] == pytest.approx(TRUTH.alpha, abs=0.01)
    (held_out,) = found["held_out"]
    assert held_out["name"].endswith("_held_out")
    assert held_out["predicted"] == pytest.approx(held_out["loss"], rel=1e-3)


def test_ladder_prints_what_it_wrote(here: Path, german_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(german_data, *GRID, "--tflops", "0.01")) == 0
    text = capsys.readouterr().out
    assert "9 runs, " in text
    assert " hours at 0.01 TFLOP/s" in text
    assert "warning: " in text  # 160,000 tokens are more than the dataset has
    assert "python -m launch.train -m sweep=ladder.yaml; then steerscale scaling fit runs/ladder" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "3e4", "6e4", "--tokens", "1e4", "2e4", "4e4"], "--sizes needs at least 3 different numbers"),
        ([*GRID[:4], "--tokens", "2e4", "2e4", "4e4"], "--tokens needs at least 3 different numbers, none twice"),
        (["--sizes", "4.6e4", "4.61e4", "7.3e4", *GRID[4:]], "--sizes 46000 and 46100 become the same model"),
        (["--sizes", "10", "7.3e4", "1.2e5", *GRID[4:]], "--sizes 10: no shape comes within 10%"),
        (["--sizes", "nan", "7.3e4", "1.2e5", *GRID[4:]], "--sizes must be numbers of parameters, got nan"),
        ([*GRID[:5], "1e3", "4e4", "8e4"], "tokens are 8 steps of 4 sequences of 32, and a run needs 50"),
        ([*GRID[:5], "4e4", "8e4", "0"], "--tokens must be positive numbers"),
        ([*GRID, "--hold-out", "7.3e4,8e4"], "and the ladder goes up to"),
        ([*GRID, "--hold-out", "2.2e5,4e7"], "times, and what is repeated more than 4 times teaches no law"),
        ([*GRID, "--hours", "1"], "--hours needs --tflops"),
        ([*GRID, "--hours", "1e-6", "--tflops", "0.01"], "more than --hours 1e-06"),
        ([*GRID, "--largest-lr", "0"], "--largest-lr must be a positive number, got 0"),
        ([*GRID, "--tflops", "0"], "--tflops must be a positive number, got 0"),
        ([*GRID, "--micro-batch-size", "0"], "--micro-batch-size must be at least 1, got 0"),
        ([*GRID, "-o", "ladder.txt"], "must end in .yaml"),
        ([*GRID, "-o", "/nowhere/ladder.yaml"], "there is no directory /nowhere"),
        ([*GRID, "--data", "/nowhere"], "/nowhere"),
    ],
)
def test_ladder_refuses_with_one_line(
    here: Path, german_data: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(arguments(german_data, *options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (here / "ladder.yaml").exists()


def test_ladder_needs_no_torch(here: Path, german_data: Path) -> None:
    script = (
        "import sys\nfrom steerscale.cli import main\n"
        f"main({[*arguments(german_data, *GRID), '--json']!r})\n"
        'sys.stderr.write(f\'{sorted({"torch", "scipy", "hydra"} & set(sys.modules))}\')'
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == "[]"
