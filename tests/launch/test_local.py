"""The launcher: exit statuses, one summary of a failure, stops, and no process that outlives it."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import launch.local
from launch.local import Failure, run_local, summarize_failure
from steerscale.checkpoint.config import CheckpointConfig
from steerscale.checkpoint.store import checkpoints
from steerscale.config import from_mapping
from steerscale.errors import ConfigError
from steerscale.metrics import read_records
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelConfig
from steerscale.rundir import lock, log_path, read_config, read_errors, read_status, write_error
from steerscale.testing.ranks import PRELOAD, START_METHOD, RankPool
from steerscale.train.config import LauncherConfig, RunConfig, TrainConfig
from tests.train.runs import AtStep, Send, assert_same_tensors, curve, moved, newest, prepare, run_config, train

MODEL = ModelConfig(num_layers=1, d_model=8, num_heads=1, seq_len=8, vocab_size=10)
Stub = Callable[..., RunConfig]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A run whose ranks are stubs: stub(["finish"], ["kill", "SIGKILL"])."""
    monkeypatch.setattr(launch.local, "WORKER", "tests.launch.stub")
    monkeypatch.setattr(launch.local, "LAST_BREATH_SECONDS", 2.0)

    def make(*behaviour: list[Any], grace_seconds: float = 60.0) -> RunConfig:
        config = RunConfig(
            name="stub",
            run_dir=str(tmp_path / "run"),
            model=MODEL,
            train=TrainConfig(steps=9),
            parallel=ParallelConfig(data=len(behaviour)),
            launcher=LauncherConfig(grace_seconds=grace_seconds),
        )
        (prepare(config) / "behaviour.json").write_text(json.dumps(behaviour))
        return config

    return make


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look every few milliseconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def rank_pids(run_dir: Path, ranks: int) -> list[int]:
    """Process ids of stub ranks, once all are there."""
    paths = [run_dir / f"ready_{rank}" for rank in range(ranks)]
    wait_until(lambda: all(path.is_file() and path.read_text() for path in paths))
    return [int(path.read_text()) for path in paths]


def start(config: RunConfig) -> subprocess.Popen[str]:
    """A launcher with stub ranks."""
    command = [sys.executable, "-m", "tests.launch.launcher", config.run_dir]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit status, what it printed)."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out + (err or "")


def test_ranks_that_finish_are_a_success(stub: Stub, capfd: pytest.CaptureFixture[str]) -> None:
    config = stub(["finish"], ["finish"])
    assert run_local(config) == 0
    assert read_status(Path(config.run_dir)).state == "created"  # that is rank 0's to say, and it said nothing
    assert capfd.readouterr().err == ""


FAILURES: dict[str, tuple[list[list[Any]], int, str]] = {
    "user's error": (
        [["wait"], ["raise", "DataError", "file X is damaged: copy it"]],
        2,
        "rank 1 DataError: file X",
    ),
    "other error": ([["wait"], ["raise", "RuntimeError", "a\nb"]], 1, "rank 1 RuntimeError: a"),
    "echo": (
        [["raise", "RuntimeError", "connection closed", 1], ["raise", "TrainingError", "not finite"]],
        2,
        "rank 1 TrainingError: not finite",
    ),
    "killed": ([["wait"], ["kill", "SIGKILL"]], 1, "rank 1 was killed by SIGKILL"),
    "killed, then echo": (
        [["raise", "RuntimeError", "connection closed", 1], ["kill", "SIGKILL"]],
        1,
        "rank 1 was killed by SIGKILL",
    ),
    "crash": ([["kill", "SIGSEGV"], ["wait"]], 1, "rank 0 was killed by SIGSEGV"),
    "error, then abort": (
        [["kill", "SIGABRT", 1], ["raise", "RuntimeError", "cause"]],
        1,
        "rank 1 RuntimeError: cause",
    ),
    "exit without a word": ([["wait"], ["exit", 7]], 1, "rank 1 exited with status 7"),
    "error without room for a word": ([["wait"], ["exit", 2]], 2, "rank 1 exited with status 2"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failure_ends_the_run_with_one_summary(stub: Stub, failure: str, capfd: pytest.CaptureFixture[str]) -> None:
    behaviour, status, text = FAILURES[failure]
    config = stub(*behaviour)
    started = time.monotonic()
    assert run_local(config) == status
    assert time.monotonic() - started < 30
    said = capfd.readouterr().err
    assert said.count("FAILED") == 1
    assert said.startswith(f"FAILED: {text}")
    assert "logs of all ranks: " in said
    assert (
        ("start the same command again" in said) == ("last lines of" in said) == ("Error: " not in text or status == 1)
    )
    if "kill" in failure:
        assert "the machine may have run out of memory" in said
        assert "    last words" in said
    written = read_status(Path(config.run_dir))
    assert (written.state, written.steps) == ("failed", 9)
    assert written.reason.startswith(text.splitlines()[0])
    for pid in rank_pids(Path(config.run_dir), 2):
        assert not alive(pid)


def test_summary_of_several_errors_tells_the_earliest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    for rank, now in [(0, 30.0), (2, 10.0), (1, 20.0)]:
        monkeypatch.setattr(time, "time", lambda now=now: now)
        write_error(tmp_path, rank, RuntimeError(f"of rank {rank}"))
    log_path(tmp_path, 2).write_text("".join(f"line {number}\n" for number in range(50)))
    failures = [Failure(rank=rank, status=1, time=5.0) for rank in range(3)]
    summary, status = summarize_failure(tmp_path, failures)
    assert status == 1
    assert summary.splitlines()[:3] == [
        "FAILED: rank 2 RuntimeError: of rank 2",
        f"  last lines of {log_path(tmp_path, 2)}:",
        "    line 38",
    ]
    assert "line 49" in summary
    killed = [*failures[:2], Failure(rank=3, status=-9, time=9.0)]
    assert summarize_failure(tmp_path, killed)[0].startswith("FAILED: rank 3 was killed by SIGKILL")
    killed_later = [*failures[:2], Failure(rank=3, status=-9, time=11.0)]
    assert summarize_failure(tmp_path, killed_later)[0].startswith("FAILED: rank 2 RuntimeError")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_launcher_stops_all_ranks(stub: Stub, number: signal.Signals) -> None:
    config = stub(["wait"], ["wait"])
    run_dir = Path(config.run_dir)
    launcher = start(config)
    pids = rank_pids(run_dir, 2)
    launcher.send_signal(number)
    status, said = end(launcher)
    assert status == 0
    assert said.strip() == "stopping after this step, with a checkpoint; once more to stop at once"
    assert [(run_dir / f"stopped_{rank}").read_text() for rank in range(2)] == [number.name] * 2
    assert read_status(run_dir).state == "stopped"
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("times", [1, 2])
def test_signal_while_ranks_start_reaches_them(stub: Stub, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    config = stub(["wait"], ["wait"])
    popen, signals = subprocess.Popen, [signal.SIGTERM] * times

    def start_one(*args: Any, **settings: Any) -> Any:
        if signals:
            os.kill(os.getpid(), signals.pop())  # before this rank is there
        return popen(*args, **settings)

    monkeypatch.setattr(launch.local.subprocess, "Popen", start_one)
    if times == 1:
        assert run_local(config) == 0
        assert (Path(config.run_dir) / "stopped_1").read_text() == "SIGTERM"
    else:  # taken for one or for two, as the threads of this process have it
        with contextlib.suppress(SystemExit):
            assert run_local(config) == 0


def test_second_signal_kills(stub: Stub) -> None:
    config = stub(["wait"], ["hang"])
    run_dir = Path(config.run_dir)
    launcher = start(config)
    pids = rank_pids(run_dir, 2)
    launcher.send_signal(signal.SIGINT)
    wait_until(lambda: (run_dir / "stopped_0").is_file())
    assert alive(pids[1])
    launcher.send_signal(signal.SIGINT)
    status, said = end(launcher)
    assert status == 130
    assert "FAILED: the ranks were killed at the second signal" in said
    assert "Traceback" not in said
    assert read_status(run_dir).state == "failed"
    assert not any(alive(pid) for pid in pids)


def test_ranks_that_do_not_stop_in_time_are_killed(stub: Stub, capfd: pytest.CaptureFixture[str]) -> None:
    config = stub(["wait"], ["hang"], grace_seconds=0.5)
    launcher = start(config)
    pids = rank_pids(Path(config.run_dir), 2)
    launcher.send_signal(signal.SIGTERM)
    status, said = end(launcher)
    assert status == 1
    assert "did not stop within launcher.grace_seconds=0.5 and were killed: raise it" in said
    assert read_status(Path(config.run_dir)).state == "failed"
    assert not any(alive(pid) for pid in pids)


def test_ranks_die_with_a_killed_launcher(stub: Stub) -> None:
    config = stub(["wait"], ["hang"], ["hang"])
    launcher = start(config)
    pids = rank_pids(Path(config.run_dir), 3)
    with pytest.raises(ConfigError, match="in use"), lock(Path(config.run_dir)):
        pass
    launcher.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids))
    end(launcher)
    with lock(Path(config.run_dir)):
        pass


def test_rank_whose_launcher_is_gone_before_it_begins_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.launch.stub", str(tmp_path), "--parent", "1"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_rank_that_cannot_be_started_ends_the_others(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stub(["hang"], ["hang"])
    popen, started = subprocess.Popen, []

    def start_one(*args: Any, **settings: Any) -> Any:
        if started:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(popen(*args, **settings))
        return started[0]

    monkeypatch.setattr(launch.local.subprocess, "Popen", start_one)
    with pytest.raises(launch.local.LaunchError, match=r"rank 1 of 2 could not be started: .*unavailable"):
        run_local(config)
    assert started[0].returncode == -9


class Alone:
    """`run_local` of single ranks, one after the other, in a process that has torch loaded."""

    def __init__(self, *configs: RunConfig, log: Path, setup: Callable[[int], object] | None = None) -> None:
        context = multiprocessing.get_context(START_METHOD)
        context.set_forkserver_preload(PRELOAD)
        self.log, self.run_dirs = log, [prepare(config) for config in configs]
        self.process = context.Process(target=_run_alone, args=(configs, log, setup), daemon=True)
        self.process.start()

    def end(self) -> tuple[int | None, str]:
        """(exit status, what it printed)."""
        self.process.join(120)
        return self.process.exitcode, self.log.read_text()


def _run_alone(configs: Sequence[RunConfig], log: Path, setup: Callable[[int], object] | None) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if setup is not None:
        setup(0)
    handlers = [signal.getsignal(number) for number in launch.local.SIGNALS]
    status = max(run_local(config) for config in configs)
    assert [signal.getsignal(number) for number in launch.local.SIGNALS] == handlers
    sys.stdout.write(f"in process {os.getpid()}\n")
    sys.stdout.flush()
    sys.exit(status)


def test_single_rank_runs_in_the_launchers_process(german_data: Path, tmp_path: Path) -> None:
    """And another one after it, as in a sweep: nothing of the first is left over."""
    configs = [run_config(german_data, tmp_path / name) for name in ("first", "second")]
    alone = Alone(*configs, log=tmp_path / "out")
    status, said = alone.end()
    assert status == 0
    assert f"in process {alone.process.pid}" in said
    for run_dir in alone.run_dirs:
        assert read_status(run_dir).state == "finished"
        assert [record["step"] for record in read_records(run_dir, "train")] == list(range(1, 13))
        log = log_path(run_dir, 0).read_text()
        for line in ("step 12/12", "finished at step 12 of 12"):
            assert said.count(line) == 2
            assert log.count(line) == 1
    assert curve(alone.run_dirs[0]) == curve(alone.run_dirs[1])


def test_single_rank_stops_at_ctrl_c(german_data: Path, tmp_path: Path) -> None:
    config = run_config(german_data, tmp_path / "run", checkpoint=CheckpointConfig(interval=100))
    status, _ = Alone(config, log=tmp_path / "out", setup=AtStep(4, (0,), Send(signal.SIGINT))).end()
    assert status == 0
    run_dir = Path(config.run_dir)
    assert (read_status(run_dir).state, read_status(run_dir).step) == ("stopped", 4)
    assert read_status(run_dir).reason == "stopped by SIGINT; start again to go on"
    assert [path.name for path in checkpoints(run_dir / "checkpoints")] == ["step_00000004"]


class Twice:
    """Something that can happen: Ctrl-C, and again."""

    def __call__(self, *about: object) -> None:
        """Send it twice."""
        Send(signal.SIGINT)()
        time.sleep(0.01)
        Send(signal.SIGINT)()


def test_single_rank_is_interrupted_by_a_second_ctrl_c(german_data: Path, tmp_path: Path) -> None:
    config = run_config(german_data, tmp_path / "run")
    status, said = Alone(config, log=tmp_path / "out", setup=AtStep(4, (0,), Twice())).end()
    assert status == 130
    assert "FAILED: interrupted by a second Ctrl-C" in said
    assert "Traceback" not in said
    assert read_status(Path(config.run_dir)).state == "failed"


class Broken:
    """Something that can happen: an exception."""

    def __call__(self, *about: object) -> None:
        """Raise it."""
        raise ZeroDivisionError("by nothing")


def test_single_rank_that_fails_is_summarized(german_data: Path, tmp_path: Path) -> None:
    config = run_config(german_data, tmp_path / "run")
    status, said = Alone(config, log=tmp_path / "out", setup=AtStep(4, (0,), Broken())).end()
    assert status == 1
    (begin,) = [line for line in said.splitlines() if line.startswith("FAILED")]
    assert begin == "FAILED: rank 0 ZeroDivisionError: by nothing"
    assert said.count("Traceback") == 0  # its end is among the log's last lines
    assert "    ZeroDivisionError: by nothing" in said
    assert "Traceback" in log_path(Path(config.run_dir), 0).read_text()
    written = read_status(Path(config.run_dir))
    assert (written.state, written.step, written.reason) == ("failed", 3, "rank 0 ZeroDivisionError: by nothing")


def test_single_rank_in_its_own_process(stub: Stub) -> None:
    config = stub(["exit", 3])
    assert run_local(config, in_process=False) == 1
    assert rank_pids(Path(config.run_dir), 1) != [os.getpid()]


def _train(config: RunConfig, **changes: Any) -> subprocess.Popen[str]:
    """The real thing: `python -m launch.train`."""
    model, batch = config.model, config.parallel
    overrides = [
        *(f"model.{key}={getattr(model, key)}" for key in ("num_layers", "d_model", "num_heads", "seq_len", "dropout")),
        *(
            "model.num_kv_groups=null",
            "name=test",
            f"run_dir={config.run_dir}",
            f"data.path={config.data and config.data.path}",
        ),
        *(f"parallel.{key}={getattr(batch, key)}" for key in ("data", "micro_batch_size", "global_batch_size")),
        *(f"optim.{key}={getattr(config.optim, key)}" for key in ("lr", "min_lr", "warmup_steps")),
        *(f"train.{key}={getattr(config.train, key)}" for key in ("steps", "eval_interval", "eval_samples")),
        *("metrics.interval=1", "metrics.tensorboard=false", "launcher.threads_per_rank=1"),
    ]
    command = [sys.executable, "-m", "launch.train", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_real_run_is_stopped_killed_and_finished(pool: RankPool, german_data: Path, tmp_path: Path) -> None:
    """Ctrl-C, then a rank that is killed, then to the end: with the command that users type."""
    config = run_config(
        german_data,
        tmp_path / "run",
        parallel={"data": 2},
        train=TrainConfig(steps=100, eval_interval=40, eval_samples=6),
    )
    run_dir = Path(config.run_dir)

    def begin(step: int) -> subprocess.Popen[str]:
        launcher = _train(config)
        wait_until(lambda: any(record["step"] > step for record in read_records(run_dir, "train")), 200)
        return launcher

    launcher = begin(0)
    launcher.send_signal(signal.SIGINT)
    status, said = end(launcher)
    assert status == 0, said
    stopped = read_status(run_dir)
    assert stopped.state == "stopped"
    assert f"stopped at step {stopped.step} of 100" in said
    assert newest(run_dir).name == f"step_{stopped.step:08d}"

    launcher = begin(stopped.step)
    ranks = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    status, said = end(launcher)
    assert status == 1
    assert said.count("FAILED") == 1
    assert "FAILED: rank 1 was killed by SIGKILL" in said
    assert "Traceback (most recent call last)" not in said.split("last lines of")[0]
    assert read_status(run_dir).state == "failed"
    assert read_errors(run_dir)[0]["rank"] == 0  # its connection broke
    assert not any(alive(int(pid)) for pid in ranks)

    status, said = end(_train(config))
    assert status == 0, said
    composed = from_mapping(RunConfig, read_config(run_dir))
    expected = prepare(moved(composed, tmp_path / "alone"))
    pool.run(train, expected, ranks=2)
    assert curve(run_dir) == curve(expected)
    assert_same_tensors(newest(run_dir), newest(expected))


def test_variables_of_the_shell_do_not_reach_the_ranks(
    stub: Stub, german_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    seen = tmp_path / "seen"
    worker = types.SimpleNamespace(run_alone=lambda run_dir, threads: seen.write_text(str(sorted(os.environ))) and 0)
    monkeypatch.setattr(launch.local.importlib, "import_module", lambda name: worker)
    assert run_local(stub(["finish"])) == 0
    assert not {"'RANK'", "'WORLD_SIZE'", "'TORCHELASTIC_USE_AGENT_STORE'"} & set(
        seen.read_text().strip("[]").split(", ")
    )
    assert os.environ["RANK"] == "1"


def test_ranks_killed_after_a_stop_end_what_would_have_come_next(stub: Stub) -> None:
    """A sweep would otherwise go on with its next point."""
    config = stub(["wait"], ["hang"], grace_seconds=0.3)

    def stop() -> None:
        rank_pids(Path(config.run_dir), 2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(SystemExit) as caught:
        run_local(config)
    assert caught.value.code == 1
    assert "did not stop within" in read_status(Path(config.run_dir)).reason
