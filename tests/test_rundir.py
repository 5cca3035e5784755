"""The run directory: what is in it is whole, and a run that is going on keeps it."""

import fcntl
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from steerscale.errors import ConfigError, LaunchError, LayoutError, SteerscaleError
from steerscale.models.config import ModelConfig
from steerscale.rundir import (
    Status,
    clear_error,
    create_run_dir,
    hold,
    is_held,
    lock,
    log_path,
    read_config,
    read_errors,
    read_status,
    write_error,
    write_status,
    write_text,
)
from steerscale.train.config import RunConfig, TrainConfig
from tests.disks import fill, small_disk


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A configuration whose run directory is not there yet."""
    model = ModelConfig(num_layers=1, d_model=8, num_heads=1, seq_len=8, vocab_size=10)
    return RunConfig(name="a", run_dir=str(tmp_path / "runs" / "a"), model=model, train=TrainConfig(steps=1))


@pytest.fixture
def run_dir(config: RunConfig) -> Path:
    """A new run directory."""
    path = Path(config.run_dir)
    assert create_run_dir(path, config, command=["launch", "name=a"]) is False
    return path


def names(directory: Path) -> list[str]:
    """Everything there."""
    return sorted(path.name for path in directory.iterdir())


def test_new_run_directory_appears_whole(run_dir: Path) -> None:
    assert names(run_dir) == ["config.yaml", "environment.json", "logs", "status.json"]
    assert names(run_dir.parent) == ["a"]
    assert read_config(run_dir)["name"] == "a"
    assert read_status(run_dir).state == "created"
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["command"] == ["launch", "name=a"]
    assert environment["packages"]["torch"]
    assert not any(value in json.dumps(environment) for value in (os.environ["PATH"], "PATH"))


def test_starting_again_keeps_the_directory(run_dir: Path, config: RunConfig) -> None:
    write_error(run_dir, 1, ValueError("of the last start"))
    log_path(run_dir, 0).write_text("log")
    before = (run_dir / "config.yaml").read_text()
    assert create_run_dir(run_dir, config, command=["again"]) is True
    assert read_errors(run_dir) == []
    assert names(run_dir) == [".lock", "config.yaml", "environment.json", "logs", "status.json"]
    assert log_path(run_dir, 0).read_text() == "log"
    for number in range(2):
        changed = replace(config, seed=number)
        create_run_dir(run_dir, changed, command=["again"])
        assert read_config(run_dir)["seed"] == number
    assert (run_dir / "config.0.yaml").read_text() == before
    assert "seed: 0" in (run_dir / "config.1.yaml").read_text()


def test_directory_that_is_no_run_directory_is_refused(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match=r"exists and is no run directory"):
            create_run_dir(path, config, command=[])
        with pytest.raises(ConfigError, match=r"is no run directory: it has no config.yaml"):
            read_config(path)


def test_run_that_is_going_on_keeps_its_files(run_dir: Path, config: RunConfig) -> None:
    write_error(run_dir, 0, ValueError())
    with lock(run_dir):
        before = {name: (run_dir / name).read_bytes() for name in ("config.yaml", "environment.json")}
        with pytest.raises(ConfigError, match=rf"run_dir={run_dir} is in use by a running launcher"):
            create_run_dir(run_dir, replace(config, seed=7), command=["other"])
        with pytest.raises(ConfigError, match="in use"), lock(run_dir):
            pass
        assert {name: (run_dir / name).read_bytes() for name in before} == before
        assert len(read_errors(run_dir)) == 1
    with lock(run_dir):
        pass


def test_lock_that_cannot_be_taken_is_a_launch_error(run_dir: Path) -> None:
    (run_dir / ".lock").mkdir()
    with pytest.raises(LaunchError, match="cannot be locked"), lock(run_dir):
        pass


def test_error_inside_a_lock_is_not_the_locks(run_dir: Path) -> None:
    with pytest.raises(FileNotFoundError), lock(run_dir):
        (run_dir / "nothing").read_text()


def test_status_is_read_as_written(run_dir: Path) -> None:
    write_status(run_dir, Status(state="stopped", step=3, steps=9, reason="SIGUSR1"))
    status = read_status(run_dir)
    assert (status.state, status.step, status.steps, status.reason) == ("stopped", 3, 9, "SIGUSR1")
    assert abs(time.time() - status.updated) < 60
    assert status.host


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "running", "colour": "red"}'])
def test_unreadable_status_is_an_error_for_users(run_dir: Path, content: str) -> None:
    (run_dir / "status.json").write_text(content)
    with pytest.raises(SteerscaleError, match=r"status.json cannot be read"):
        read_status(run_dir)


def test_errors_come_earliest_first_and_the_first_word_counts(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, now, error in [(0, 30.0, OSError("echo")), (2, 10.0, LayoutError("cause")), (1, 20.0, OSError("echo"))]:
        monkeypatch.setattr(time, "time", lambda now=now: now)
        write_error(run_dir, rank, error)
    write_error(run_dir, 2, OSError("while closing"))
    errors = read_errors(run_dir)
    assert [(error["rank"], error["message"]) for error in errors] == [(2, "cause"), (1, "echo"), (0, "echo")]
    assert [error["user_error"] for error in errors] == [True, False, False]
    assert errors[0]["type"] == "LayoutError"
    assert "LayoutError: cause" in errors[0]["traceback"]
    clear_error(run_dir, 2)
    clear_error(run_dir, 3)
    assert [error["rank"] for error in read_errors(run_dir)] == [1, 0]


def test_text_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_full_disk_leaves_the_old_files(run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk:
        (disk / "logs").mkdir()
        write_status(disk, Status(state="running", step=1))
        fill(disk)
        write_status(disk, Status(state="running", step=2))
        assert read_status(disk).step == 1
        assert "status.json was not updated: [Errno 28]" in caplog.text
        write_error(disk, 0, ValueError("x" * 5000))
        assert read_errors(disk) == []
        assert "rank_0.error.json was not written" in caplog.text
        with pytest.raises(OSError, match="No space left"):
            write_text(disk / "status.json", "x" * 5000)
        assert names(disk) == ["filler", "logs", "status.json"]
        assert names(disk / "logs") == []


def _raised_from(cause: Exception) -> Exception:
    try:
        raise RuntimeError("the checkpoint was not written") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (_raised_from(MemoryError()), True),
        (RuntimeError("Connection closed by peer"), False),
        (_raised_from(ValueError()), False),
    ],
)
def test_errors_of_memory_are_told_apart(error: Exception, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    write_error(tmp_path, 3, error)
    assert [(word["rank"], word["oom"]) for word in read_errors(tmp_path)] == [(3, expected)]


def test_a_long_name_is_no_obstacle(tmp_path: Path, config: RunConfig) -> None:
    path = tmp_path / ("ä" * 120)
    assert create_run_dir(path, config, command=[]) is False
    assert names(tmp_path) == [path.name]


def test_nothing_is_left_where_a_new_directory_does_not_fit(tmp_path: Path, config: RunConfig) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk:
        filler = fill(disk)
        os.truncate(filler, filler.stat().st_size - 8192)  # room for a file, not for all
        with pytest.raises(LaunchError, match=rf"run_dir={disk}/a cannot be written: No space left on device"):
            create_run_dir(disk / "a", config, command=["x" * 9000])
        assert names(disk) == ["filler"]


def test_of_two_starts_at_once_one_gets_the_directory(
    run_dir: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(config, seed=7)
    # The first one looks before the second one has made the directory.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda self: False)
        assert create_run_dir(run_dir, other, command=[]) is True
    assert names(run_dir.parent) == ["a"]
    with pytest.raises(ConfigError, match="just taken up by another start with other settings"), hold(run_dir, config):
        pass
    with hold(run_dir, other), pytest.raises(ConfigError, match="in use"), hold(run_dir, other):
        pass


def test_a_refusal_leaves_an_existing_directory_as_it_was(run_dir: Path, config: RunConfig) -> None:
    def refuse() -> None:
        with pytest.raises(ConfigError, match="in use"), lock(run_dir):
            pass
        raise ConfigError("it has a job")

    before = (run_dir / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="it has a job"):
        create_run_dir(run_dir, replace(config, seed=7), command=[], check=refuse)
    assert (run_dir / "config.yaml").read_text() == before


def test_looking_at_a_run_does_not_keep_it_from_starting(run_dir: Path) -> None:
    with lock(run_dir):
        assert is_held(run_dir)
    with (run_dir / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as `is_held` does for a moment
        threading.Timer(0.05, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with lock(run_dir):
            pass


def test_an_old_configuration_is_never_overwritten(run_dir: Path, config: RunConfig) -> None:
    for seed in range(3):
        create_run_dir(run_dir, replace(config, seed=seed), command=[])
    (run_dir / "config.0.yaml").unlink()
    kept = (run_dir / "config.2.yaml").read_text()
    create_run_dir(run_dir, config, command=[])
    assert (run_dir / "config.2.yaml").read_text() == kept
    assert "seed: 2" in (run_dir / "config.3.yaml").read_text()
