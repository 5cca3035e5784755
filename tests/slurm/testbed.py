"""A testbed for the tests, and what is to be seen on it."""

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pytest

from steerscale.jobs.observe import Observation, observe
from steerscale.planning.cluster import ClusterConfig, load_cluster
from steerscale.rundir import read_status
from steerscale.train.config import LauncherConfig, RunConfig

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "testbed.sh"
PATIENCE_SECONDS = 240.0
"""After which a test gives up; nothing takes nearly as long."""
IMPOSSIBLE = 4
"""Exit status of testbed.sh where it cannot run."""
SLOTS = range(10, 50)
"""Testbeds of tests; the first ones are for people."""


class Testbed:
    """A Slurm of three nodes with two imitated GPUs each."""

    __test__ = False

    def __init__(self, directory: Path, *, slot: int, accounting: bool) -> None:
        self.directory = directory
        self._environment = {
            **os.environ,
            "TESTBED_DIR": str(directory),
            "TESTBED_SLOT": str(slot),
            "ACCT": str(int(accounting)),
            "NODE_TIMEOUT": "5",
        }

    def __call__(self, *arguments: str) -> None:
        """Run a command of testbed.sh."""
        # Into files: its daemons would keep a pipe open.
        with tempfile.TemporaryFile("w+") as said:
            answer = subprocess.run(
                [str(SCRIPT), *arguments], env=self._environment, stdout=said, stderr=said, timeout=600, check=False
            )
            said.seek(0)
            if answer.returncode == IMPOSSIBLE:
                pytest.skip(said.read().strip().splitlines()[-1])
            assert answer.returncode == 0, said.read()

    def forget(self) -> None:
        """Have Slurm forget every job, as its queue does with ended ones after some minutes; its accounting remembers."""
        pid = int((self.directory / "run" / "slurmctld.pid").read_text(encoding="utf-8"))
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        shutil.rmtree(self.directory / "state")
        self("up")

    def watch(self) -> subprocess.Popen[bytes]:
        """A process that removes the testbed if this one is killed."""
        script = 'while kill -0 "$1" 2>/dev/null; do sleep 1; done; exec "$2" purge'
        return subprocess.Popen(
            ["sh", "-c", script, "sh", str(os.getpid()), str(SCRIPT)],
            env=self._environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@contextmanager
def running_testbed(*, accounting: bool = False) -> Iterator[Testbed]:
    """A testbed of its own for this process, found by Slurm's commands in this context; nothing of it is left after it."""
    before = os.environ.get("SLURM_CONF")
    with _slot() as slot:
        # Not in pytest's directory, whose path is too long for sockets.
        directory = Path(tempfile.mkdtemp(prefix="testbed-", dir="/tmp"))
        testbed = Testbed(directory, slot=slot, accounting=accounting)
        watch = testbed.watch()
        try:
            testbed("up")
            os.environ["SLURM_CONF"] = str(directory / "slurm.conf")
            yield testbed
        finally:
            if before is None:
                os.environ.pop("SLURM_CONF", None)
            else:
                os.environ["SLURM_CONF"] = before
            testbed("purge")
            watch.kill()
            watch.wait()


@contextmanager
def _slot() -> Iterator[int]:
    """A number for ports and addresses that no other test process uses."""
    for slot in SLOTS:
        lock: TextIO
        with Path(f"/tmp/.steerscale-testbed-{slot}").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield slot
            return
    raise AssertionError("every slot for a testbed is taken")


def on_testbed(config: RunConfig, **cluster: Any) -> RunConfig:
    """The run as a job; `cluster` changes keys of the profile."""
    profile: ClusterConfig = replace(load_cluster("testbed"), **cluster)
    return replace(config, cluster=profile, launcher=LauncherConfig(name="slurm", timeout_minutes=2))


def look(run_dir: Path) -> Observation:
    """How a run stands."""
    (one,) = observe([run_dir])
    return one


def wait_for(run_dir: Path, condition: Callable[[Observation], bool]) -> Observation:
    """Look until the condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition(one := look(run_dir)):
        assert time.monotonic() < deadline, f"{one}\n{output(run_dir)}"
        time.sleep(0.2)
    return one


def wait_for_step(run_dir: Path, step: int) -> None:
    """Until a run that is under way has done this many steps. Reads its status only: a run of the tests is soon over."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (status := read_status(run_dir)).step >= step or status.reason:
        assert time.monotonic() < deadline, f"{status}\n{output(run_dir)}"
        time.sleep(0.02)


def has_ended(one: Observation) -> bool:
    """Whether nothing more will come of a run by itself."""
    return one.state not in ("created", "pending", "running", "stopped")


def output(run_dir: Path) -> str:
    """What a run's jobs said."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((run_dir / "slurm").glob("*.out")))


def call(*command: str) -> str:
    """A command's output."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
