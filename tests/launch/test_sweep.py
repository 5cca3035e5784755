"""Sweeps as command lines: what is planned, what is run, what is recorded. Runs are stood in for, but for the last test."""

import functools
import json
import shutil
from pathlib import Path

import pytest

import launch.train
from launch.sweep import plan_sweep
from launch.sweep_record import Record, read_record
from launch.sweep_table import main as show_table
from launch.sweep_table import read_table
from launch.train import main
from steerscale.errors import ConfigError, LaunchError, LayoutError, SteerscaleError
from steerscale.metrics import Recorder
from steerscale.planning.machine import machine_mapping
from steerscale.rundir import Status, create_run_dir, lock, read_status, write_status
from steerscale.train.config import RunConfig

SWEEP = ["-m", "train.steps=2", "parallel.tensor=1,2"]
NAMED = [*SWEEP, "name='x_tp${parallel.tensor}'"]


class Launches:
    """Stands in for `launch`: remembers the runs, and leaves what a run would."""

    def __init__(self, *outcomes: int | BaseException, states: tuple[str, ...] = ()) -> None:
        self.outcomes, self.states = outcomes, states
        self.configs: list[RunConfig] = []

    def __call__(self, config: RunConfig, *, in_process: bool = True) -> int:
        assert not in_process, "a point that takes its process with it must not take the sweep"
        self.configs.append(config)
        index = len(self.configs) - 1
        outcome = self.outcomes[index] if index < len(self.outcomes) else 0
        if isinstance(outcome, BaseException):
            raise outcome
        run_dir = Path(config.run_dir)
        create_run_dir(run_dir, config, command=["test"])
        state, _, cause = (self.states[index] if index < len(self.states) else "finished").partition(" ")
        write_status(run_dir, Status(state=state, step=config.train.steps, steps=config.train.steps, cause=cause))  # type: ignore[arg-type]
        recorder = Recorder(run_dir, writes=True, tensorboard=False)
        recorder.write("start", 0, {"layout": str(config.layout()), "device": "none", "ranks": 1})
        for step, seconds in ((1, 0.5), (2, 0.5 * (index + 1))):
            rates = {"seconds_per_step": seconds, "tokens_per_second_per_gpu": 100 / seconds}
            recorder.write("train", step, {"loss": 9.0 - step, **rates, "model_tflops_per_gpu": 1 / seconds})
        recorder.write("eval", 2, {"loss": 8.25})
        recorder.close()
        return outcome

    @property
    def points(self) -> list[str]:
        """Run directories by name, in the order in which they were started."""
        return [Path(config.run_dir).name for config in self.configs]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sweep(here: Path, german_data: Path, monkeypatch: pytest.MonkeyPatch) -> functools.partial:
    def call(launches: Launches, *argv: str) -> int:
        monkeypatch.setattr(launch.train, "launch", launches)
        return main([*argv, f"data.path={german_data}"])

    return functools.partial(call)


def verdicts(record: Record) -> dict[str, str]:
    return {entry.short: entry.verdict for entry in record.points}


def test_points_run_one_after_the_other_and_the_best_comes_first(
    here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = Launches()
    assert sweep(launches, *NAMED) == 0
    assert [config.parallel.tensor for config in launches.configs] == [1, 2]
    assert [config.run_dir for config in launches.configs] == [f"{here}/runs/x_tp1", f"{here}/runs/x_tp2"]
    printed = capsys.readouterr().out.splitlines()
    assert "[1/2] parallel.tensor=1" in printed
    header, first, second, counts = printed[-4:]
    assert header.split()[:4] == ["point", "layout", "state", "step"]
    assert first.split()[0] == "tp=1"
    assert first.split()[6:12] == ["finished", "2", "0.5", "-", "2", "-"]
    assert first.split()[12:] == ["200", "-", first.split()[14], "7.0000", "8.2500", f"{here}/runs/x_tp1"]
    assert second.split()[8:12:2] == ["0.75", "1.5"]  # medians of two reports: 0.5 and 1 s, 2 and 1 TFLOP/s
    assert counts == "2 points: 2 finished"
    assert verdicts(read_record(here / "runs" / "x_tp")) == {"tp=1": "run", "tp=2": "run"}


def test_directories_follow_from_the_swept_values(here: Path, sweep: functools.partial) -> None:
    launches = Launches()
    assert sweep(launches, *SWEEP, "optim.lr=1e-3,3e-4", "engine.recompute=none,full", "name=mine") == 0
    assert launches.points[:2] == ["tp1_lr0.001_recompute-none", "tp1_lr0.001_recompute-full"]
    assert len(set(launches.points)) == 8
    assert {Path(config.run_dir).parent for config in launches.configs} == {here / "runs" / "mine"}
    assert launches.configs[0].name == "mine_tp1_lr0.001_recompute-none"
    assert len(read_record(here / "runs" / "mine").points) == 8
    again = Launches()
    assert sweep(again, *SWEEP, "sweep.name=other", "seed=1,2", "name='n${seed}'") == 0
    assert again.points == ["tp1_seed1", "tp1_seed2", "tp2_seed1", "tp2_seed2"]
    assert (here / "runs" / "other" / "tp2_seed1").is_dir()


def test_long_values_make_no_long_names(here: Path, german_data: Path) -> None:
    long = here / ("x" * 240)
    for name in "ab":
        shutil.copytree(german_data, long / name)
    sweep = plan_sweep(["model=demo", f"data.path={long}/a,{long}/b", "train.steps=9"], config_name="train")
    assert [point.entry.run_dir for point in sweep.points] == ["point0", "point1"]


def test_a_sweep_is_not_put_into_a_run(
    here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(Launches(), "-m", "train.steps=2") == 0
    assert read_status(here / "runs" / "gpt").state == "finished"
    assert (here / "runs" / "gpt_sweep" / "sweep.json").is_file()
    assert sweep(Launches(), *SWEEP) == 2
    assert "choose another name or sweep.name" in capsys.readouterr().err


def test_impossible_layouts_are_results(
    here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = Launches()
    assert sweep(launches, "-m", "train.steps=2", "parallel.tensor=1,3", "parallel.pipeline=1,3") == 0
    assert launches.points == ["tp1_pp1"]
    record = read_record(here / "runs" / "gpt")
    assert verdicts(record) == {
        "tp=1 pp=1": "run",
        "tp=1 pp=3": "invalid",
        "tp=3 pp=1": "invalid",
        "tp=3 pp=3": "invalid",
    }
    printed = capsys.readouterr().out
    assert "tp=3 pp=1: impossible: parallel.tensor must divide model.num_heads: 3 does not divide 4" in printed
    assert printed.splitlines()[-1] == "4 points: 1 finished, 3 impossible"


def test_dry_runs_say_what_is_impossible_and_write_nothing(
    here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]
) -> None:
    launches: list[RunConfig] = []

    def show(config: RunConfig, *, in_process: bool = True) -> int:
        launches.append(config)
        return 0

    assert sweep(show, "-m", "launcher=dry_run", "train.steps=2", "parallel.tensor=1,3") == 0
    assert [config.parallel.tensor for config in launches] == [1]
    assert "impossible: parallel.tensor=3: parallel.tensor must divide" in capsys.readouterr().out
    assert list(here.iterdir()) == []


def test_what_no_point_can_do_refuses_the_sweep(
    here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = Launches()
    for arguments, part in (
        (["parallel.tensor=3", "parallel.micro_batch_size=1,2"], "parallel.tensor must divide"),
        (["parallel.tensor=1,2", "optim.lrr=1"], "did you mean 'lr'?"),
        (["parallel.tensor=1,0"], "parallel.tensor=0: parallel.tensor must be at least 1"),
        (["parallel.tensor=1,2", "optim.lr=-1"], "optim.lr must"),
        (["model=demo,dmeo"], "did you mean model=demo?"),
        (["parallel.tensor=1,2", "sweep.gpu=2"], "unknown key 'sweep.gpu': did you mean 'gpus'?"),
        (["parallel.tensor=1,2", "sweep.gpus=1,2"], "cannot be swept"),
        (["launcher=local,dry_run", "model.vocab_size=1000"], "points of a sweep have one launcher"),
        (["sweep=gas_msb"], "choose one of gas_mbs, parallelism"),
    ):
        assert sweep(launches, "-m", "train.steps=2", *arguments) == 2, arguments
        assert part in capsys.readouterr().err
    assert sweep(launches, "train.steps=2", "sweep=gas_mbs") == 2
    assert "add -m" in capsys.readouterr().err
    assert launches.configs == []
    assert list(here.iterdir()) == []


def test_points_that_cannot_fit_are_recorded_and_not_run(
    here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]
) -> None:
    launches, argv = Launches(), [*SWEEP, "parallel.micro_batch_size=1,512", "sweep.memory_gib=1.3"]
    assert sweep(launches, *argv) == 0
    assert launches.points == ["tp1_mbs1", "tp2_mbs1"]
    entries = {entry.short: entry for entry in read_record(here / "runs" / "gpt").points}
    big = entries["tp=1 mbs=512"]
    assert (big.verdict, big.device_gib) == ("predicted_oom", 1.3)
    assert big.predicted_gib is not None
    assert big.predicted_gib > 0.2 > (entries["tp=1 mbs=1"].predicted_gib or 1.0)
    assert "2 predicted not to fit" in capsys.readouterr().out
    forced = Launches(states=("failed oom",) * 2)
    assert sweep(forced, *argv, "launcher.force=true") == 0
    assert forced.points == ["tp1_mbs512", "tp2_mbs512"]
    assert capsys.readouterr().out.splitlines()[-1] == "4 points: 2 finished, 2 oom"


def test_the_cluster_says_what_fits(here: Path, german_data: Path) -> None:
    argv = ["launcher=dry_run", "cluster=alpha", "model=6.7b", "engine.precision=bf16", f"data.path={german_data}"]
    argv += ["train.steps=10", "parallel.global_batch_size=64", "parallel.data=2", "parallel.tensor=2,8"]
    two, eight = plan_sweep([*argv, "model.seq_len=1024"], config_name="train").points
    assert (two.entry.verdict, eight.entry.verdict) == ("predicted_oom", "run")
    assert eight.entry.predicted_seconds is not None
    assert "of 40 GiB" in two.entry.reason


def test_times_are_predicted_with_a_calibration(here: Path, german_data: Path) -> None:
    import yaml

    from steerscale.cli.calibration import this_cpu

    (here / "cpu.yaml").write_text(yaml.safe_dump(machine_mapping(this_cpu())), encoding="utf-8")
    argv = [f"data.path={german_data}", "train.steps=2", "parallel.gradient_accumulation_steps=1,16"]
    points = plan_sweep([*argv, "sweep.calibration=cpu.yaml"], config_name="train").points
    one, sixteen = (point.entry.predicted_seconds for point in points)
    assert one is not None
    assert sixteen is not None
    assert 8 * one < sixteen < 17 * one
    assert [point.entry.predicted_seconds for point in plan_sweep(argv, config_name="train").points] == [None, None]


def test_replicas_fill_the_gpus(here: Path, german_data: Path) -> None:
    argv = [
        f"data.path={german_data}",
        "train.steps=2",
        "sweep.gpus=4",
        "parallel.tensor=1,2,4",
        "parallel.pipeline=1,2",
    ]
    points = plan_sweep([*argv, "name='dp${parallel.data}_${parallel.tensor}'"], config_name="train").points
    data = [point.config.parallel.data if point.config is not None else None for point in points]
    assert data == [4, 2, 2, 1, 1, None]
    assert points[1].config is not None
    assert points[1].config.name == "dp2_1"
    assert len({point.entry.run_dir for point in points}) == 6
    assert points[5].entry.reason == "tensor 4 x pipeline 2 = 8 does not divide sweep.gpus=4"
    given = plan_sweep([*argv, "parallel.data=1,2"], config_name="train").points
    assert [point.entry.verdict for point in given].count("run") == 4
    with pytest.raises(LayoutError, match=r"sweep\.gpus=5"):
        plan_sweep([*argv[:2], "sweep.gpus=5", "parallel.tensor=2"], config_name="train")


def test_files_list_what_to_vary(here: Path, german_data: Path) -> None:
    needed = [f"data.path={german_data}", "parallel.micro_batch_size=2", "train.steps=4"]
    planned = plan_sweep(["sweep=gas_mbs", *needed], config_name="train")
    assert planned.directory == here / "runs" / "gas_mbs"
    assert [point.entry.short for point in planned.points] == [f"gas={gas} mbs=2" for gas in (1, 4, 16, 64)]
    config = planned.points[0].config
    assert config is not None
    assert (config.train.steps, config.checkpoint.at_end, config.name) == (4, False, "gas_mbs_gas1_mbs2")
    one = plan_sweep(["sweep=gas_mbs", *needed, "parallel.gradient_accumulation_steps=4"], config_name="train")
    assert [Path(point.entry.run_dir).name for point in one.points] == ["mbs2_gas4"]
    assert one.directory == planned.directory
    (here / "mine.yaml").write_text(
        "sweep.name: named\nmodel.activation: [gelu, swiglu]\nmodel.d_ff: null\nname: 'it''s ${seed}'\n",
        encoding="utf-8",
    )
    mine = plan_sweep(["sweep=mine.yaml", *needed], config_name="train")
    assert mine.directory == here / "runs" / "named"
    assert [point.entry.run_dir for point in mine.points] == ["activation-gelu", "activation-swiglu"]
    (here / "mine.yaml").write_text("parallel: {tensor: [1, 2]}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"like parallel\.tensor: \[1, 2\]"):
        plan_sweep(["sweep=mine.yaml", *needed], config_name="train")


POINTS = """
name: rungs
optim.warmup_steps: 0
sweep.points:
  small: {model.d_model: 32, optim.lr: 0.01, train.steps: 4}
  large: {model.d_model: 64, optim.lr: 0.005, train.steps: 8}
"""


def test_named_points_set_keys_that_belong_together(here: Path, german_data: Path) -> None:
    file, data = here / "rungs.yaml", f"data.path={german_data}"
    file.write_text(POINTS, encoding="utf-8")
    planned = plan_sweep(["sweep=rungs.yaml", data, "optim.lr=0.02", "seed=1,2"], config_name="train")
    assert planned.directory == here / "runs" / "rungs"
    assert [point.entry.run_dir for point in planned.points] == [
        "small_seed1",
        "small_seed2",
        "large_seed1",
        "large_seed2",
    ]
    configs = [point.config for point in planned.points if point.config is not None]
    assert [(one.model.d_model, one.train.steps, one.seed) for one in configs] == [
        (32, 4, 1),
        (32, 4, 2),
        (64, 8, 1),
        (64, 8, 2),
    ]
    assert {one.optim.lr for one in configs} == {0.02}  # the command line wins over the file
    assert planned.points[0].entry.short == "point=small seed=1"
    file.write_text(POINTS.split("  large")[0], encoding="utf-8")
    (one,) = plan_sweep(["sweep=rungs.yaml", data], config_name="train").points
    assert one.entry.run_dir == "small"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sweep.points: [1, 2]", "must have names with keys below them"),
        ("sweep.points: {../up: {seed: 1}}", "becomes a directory's name"),
        ("sweep.points: {small: {seed: [1, 2]}}", "small must have keys with their dots and one value each"),
        ("sweep.points: {small: {model.d_modle: 8}}", "point=small: .*did you mean"),
    ],
)
def test_named_points_are_checked(here: Path, german_data: Path, text: str, message: str) -> None:
    (here / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        plan_sweep(["sweep=mine.yaml", f"data.path={german_data}"], config_name="train")
    with pytest.raises(ConfigError, match="named points stand in a file"):
        plan_sweep(["sweep.points={a: {}}", f"data.path={german_data}"], config_name="train")


@pytest.mark.parametrize("name", ["gas_mbs", "parallelism"])
def test_the_files_of_the_project_can_be_run(name: str, here: Path, german_data: Path) -> None:
    argv = [f"sweep={name}", "model=6.7b", f"data.path={german_data}", "launcher=slurm", "cluster=alpha"]
    argv += ["cluster.account=p_x", "launcher.dry_run=true", "engine.precision=bf16", "cluster.node_local_paths=[]"]
    argv += ["parallel.tensor=8", "model.seq_len=1024"]
    planned = plan_sweep(argv, config_name="train")
    assert planned.runnable


def test_only_what_is_missing_is_run(here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["-m", "train.steps=2", "seed=1,2,3,4"]
    first = Launches(1, 1, 0, 0, states=("failed", "failed oom", "finished", "stopped"))
    assert sweep(first, *argv) == 1
    assert "stopped with 0 more to come" in capsys.readouterr().out
    second = Launches()
    assert sweep(second, *argv[:-1], "seed=2,3,4,5") == 0
    assert second.points == ["seed4", "seed5"]
    assert capsys.readouterr().out.splitlines()[-1] == "5 points: 1 failed, 3 finished, 1 oom"
    third = Launches()
    assert sweep(third, *argv, "sweep.retry=true") == 0
    assert third.points == ["seed1", "seed2"]
    longer = Launches()
    assert sweep(longer, "-m", "train.steps=3", "seed=1,2") == 0
    assert longer.points == ["seed1", "seed2"]
    assert sweep(Launches(), "-m", "train.steps=3", "seed=1,2", "optim.lr=0.5") == 2
    assert "is finished with other settings (optim.lr was 0.0003, is 0.5)" in capsys.readouterr().err


def test_the_worst_status_counts_and_a_failure_does_not_stop_the_others(
    here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = Launches(LaunchError("no port"), 1, states=("", "failed"))
    assert sweep(launches, *SWEEP) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: no port\n"
    assert "tp=1: not started: no port" in printed.out
    assert printed.out.splitlines()[-1] == "2 points: 1 failed, 1 not started"


def test_a_stop_ends_the_sweep(here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]) -> None:
    launches = Launches(0, 0, states=("stopped", "finished"))
    assert sweep(launches, *SWEEP) == 0
    assert launches.points == ["tp1"]
    printed = capsys.readouterr().out
    assert "stopped with 1 more to come" in printed
    assert printed.splitlines()[-1] == "2 points: 1 stopped, 1 not started"


def test_points_that_another_launcher_has_are_left_to_it(here: Path, sweep: functools.partial) -> None:
    assert sweep(Launches(), *SWEEP) == 0
    run_dir = here / "runs" / "gpt" / "tp2"
    write_status(run_dir, Status(state="created"))
    launches = Launches()
    with lock(run_dir):
        assert sweep(launches, *SWEEP) == 0
    assert launches.points == []
    assert sweep(launches, *SWEEP) == 0
    assert launches.points == ["tp2"]


def test_ctrl_c_between_points_is_no_traceback(
    here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(Launches(0, KeyboardInterrupt()), *SWEEP) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_damaged_record_is_refused(here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(Launches(), *SWEEP) == 0
    path = here / "runs" / "gpt" / "sweep.json"
    for text, part in (("{", "cannot be read"), (json.dumps({"format": 2}), "has format 2, this version reads 1")):
        path.write_text(text, encoding="utf-8")
        assert sweep(Launches(), *SWEEP) == 2
        assert part in capsys.readouterr().err
    with pytest.raises(SteerscaleError, match="no directory of a sweep"):
        read_record(here)
    assert show_table([str(here)]) == 2


def test_the_table_can_be_shown_at_any_time(
    here: Path, sweep: functools.partial, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(Launches(), *SWEEP) == 0
    printed = capsys.readouterr().out
    (here / "runs").rename(here / "moved")
    assert show_table(["moved/gpt"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == printed.splitlines()[-1] == "2 points: 2 finished"
    (here / "moved" / "gpt" / "tp2" / "status.json").write_text("{", encoding="utf-8")
    assert show_table(["moved/gpt"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 points: 1 finished, 1 unreadable"


TINY = ["model.num_layers=1", "model.d_model=16", "model.d_ff=16", "model.num_heads=2", "model.seq_len=16"]


def test_a_sweep_of_real_runs(here: Path, german_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One point that cannot be, one that cannot fit, one whose ranks run out of memory, two that are measured."""
    argv = ["-m", "sweep=gas_mbs", f"data.path={german_data}", "train.steps=3", *TINY, "metrics.tensorboard=false"]
    argv += ["metrics.warmup_steps=1", "sweep.memory_gib=1.5", "parallel.gradient_accumulation_steps=2"]
    assert main([*argv, "parallel.micro_batch_size=2,100000", "parallel.tensor=1,2,3"]) == 0
    printed = capfd.readouterr().out.splitlines()
    assert printed[-1] == "6 points: 2 finished, 2 predicted OOM, 2 impossible"
    # A vocabulary that no machine has room for, and the planner is told to leave it to the run.
    assert main([*argv, "parallel.micro_batch_size=4", "model.vocab_size=10000000000000", "launcher.force=true"]) == 0
    again = capfd.readouterr().out.splitlines()
    assert again[-1] == "7 points: 2 finished, 1 oom, 2 predicted OOM, 2 impossible"
    rows = read_table(here / "runs" / "gas_mbs")
    for row in rows[:2]:
        assert (row.state, row.step) == ("finished", 3)
        assert row.seconds
        assert row.tflops
        assert row.memory_gib
        assert 6 < (row.loss or 0) < 8  # ln 1000 = 6.9
    assert (rows[0].tflops or 0) > (rows[1].tflops or 0)
    assert "allocate" in rows[2].reason
    assert not list((here / "runs" / "gas_mbs").glob("*/checkpoints/step_*"))
    assert len({row.run_dir for row in rows}) == 7
