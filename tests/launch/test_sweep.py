from pathlib import Path

import pytest

import launch.train
from launch.sweep import plan_sweep, sweep_table
from launch.train import main
from steerscale.errors import LaunchError
from steerscale.metrics import Recorder
from steerscale.rundir import Status, read_status, write_status
from steerscale.train.config import RunConfig

SWEEP = ["-m", "train.steps=2", "parallel.tensor=1,2", "name='x_tp${parallel.tensor}'"]


class Launches:
    """Stands in for `launch`: remembers the runs, and leaves what a run would."""

    def __init__(self, *outcomes: int | Exception, states: tuple[str, ...] = ("finished", "finished")) -> None:
        self.outcomes, self.states, self.configs = outcomes, states, []

    def __call__(self, config: RunConfig) -> int:
        self.configs.append(config)
        index = len(self.configs) - 1
        outcome = self.outcomes[index]
        if isinstance(outcome, Exception):
            raise outcome
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True)
        write_status(run_dir, Status(state=self.states[index], step=2, steps=2))  # type: ignore[arg-type]
        recorder = Recorder(run_dir, writes=True, tensorboard=False)
        for step, loss in ((1, 9.0), (2, 8.5 - index)):
            recorder.write("train", step, {"loss": loss, "tokens_per_second_per_gpu": 1234.5 * (index + 1)})
        recorder.write("eval", 2, {"loss": 8.25})
        recorder.close()
        return outcome


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, launches: Launches, *argv: str) -> int:
    monkeypatch.setattr(launch.train, "launch", launches)
    return main(argv)


def test_all_points_run_one_after_the_other(
    here: Path, german_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = Launches(0, 0)
    assert run(monkeypatch, launches, *SWEEP, f"data.path={german_data}") == 0
    assert [config.parallel.tensor for config in launches.configs] == [1, 2]
    assert [config.run_dir for config in launches.configs] == [
        str(here / "runs" / "x_tp1"),
        str(here / "runs" / "x_tp2"),
    ]
    printed = capsys.readouterr().out
    assert "[1/2] parallel.tensor=1\n" in printed
    header, first, second = printed.splitlines()[-3:]
    assert header.split() == ["point", "status", "step", "loss", "held-out", "tokens/s/rank", "run", "directory"]
    assert first.split() == ["parallel.tensor=1", "finished", "2", "8.5000", "8.2500", "1,234", f"{here}/runs/x_tp1"]
    assert second.split()[3:6] == ["7.5000", "8.2500", "2,469"]


def test_the_worst_status_counts_and_a_failure_does_not_stop_the_others(
    here: Path, german_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"data.path={german_data}"
    assert run(monkeypatch, Launches(1, 0, states=("failed", "finished")), *SWEEP, data) == 1
    assert capsys.readouterr().out.splitlines()[-2].split()[:2] == ["parallel.tensor=1", "failed"]
    launches = Launches(LaunchError("no port"), 0)
    assert run(monkeypatch, launches, *SWEEP, data, "run_dir='again/${name}'") == 2
    assert len(launches.configs) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: no port\n"
    assert printed.out.splitlines()[-2].split()[:4] == ["parallel.tensor=1", "not", "started", "-"]


def test_a_stop_ends_the_sweep(
    here: Path, german_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = Launches(0, 0, states=("stopped", "finished"))
    assert run(monkeypatch, launches, *SWEEP, f"data.path={german_data}") == 0
    assert len(launches.configs) == 1
    printed = capsys.readouterr().out
    assert "stopped at point 1 of 2" in printed
    assert printed.splitlines()[-1].split()[:3] == ["parallel.tensor=2", "not", "started"]


def test_points_are_checked_before_the_first_starts(
    here: Path, german_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = Launches(0, 0)
    argv = ["-m", "train.steps=2", f"data.path={german_data}", "parallel.tensor=1,3", "name='x${parallel.tensor}'"]
    assert run(monkeypatch, launches, *argv) == 2
    assert launches.configs == []
    assert capsys.readouterr().err.startswith("error: parallel.tensor=3: parallel.tensor must divide")
    assert list(here.iterdir()) == []
    argv = ["-m", "train.steps=2", f"data.path={german_data}", "model=demo,dmeo"]
    assert run(monkeypatch, launches, *argv) == 2
    assert capsys.readouterr().err.count("model=dmeo") == 1  # the point is not named twice


def test_points_are_labelled_by_what_differs(here: Path, german_data: Path) -> None:
    needed = [f"data.path={german_data}", "train.steps=2,3", "seed=1", "name='x_${train.steps}_${model.d_model}'"]
    points = plan_sweep([*needed, "model=demo,125m", "model.seq_len=128"], config_name="train")
    assert [label for label, _ in points] == [
        "train.steps=2 model=demo",
        "train.steps=2 model=125m",
        "train.steps=3 model=demo",
        "train.steps=3 model=125m",
    ]
    assert "not started" in sweep_table(points)


def test_without_lists_one_point_runs(
    here: Path, german_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, Launches(0), "-m", "train.steps=2", f"data.path={german_data}") == 0
    assert "[1/1] gpt\n" in capsys.readouterr().out


def test_two_tiny_runs(here: Path, german_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny = ["model.num_layers=1", "model.d_model=16", "model.d_ff=16", "model.num_heads=2", "model.seq_len=16"]
    argv = ["-m", f"data.path={german_data}", "train.steps=2", "metrics.tensorboard=false", "metrics.interval=1"]
    argv += [*tiny, "metrics.warmup_steps=0", "train.eval_samples=4", "optim.lr=1e-3,1e-2", "name='lr_${optim.lr}'"]
    assert main(argv) == 0
    header, *rows = capfd.readouterr().out.splitlines()[-3:]
    assert header.startswith("point")
    for row, name in zip(rows, ("lr_0.001", "lr_0.01")):
        point, status, step, loss, held_out, speed, run_dir = row.split()
        assert (point, status, step) == (f"optim.lr={name.removeprefix('lr_')}", "finished", "2")
        assert 6 < float(loss) < 8  # ln 1000 = 6.9
        assert 6 < float(held_out) < 8
        assert float(speed.replace(",", "")) > 0
        assert Path(run_dir) == here / "runs" / name
        assert read_status(Path(run_dir)).state == "finished"
