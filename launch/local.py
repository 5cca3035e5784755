"""Ranks on this machine: start them, watch them, stop them cleanly, and say what went wrong.

The ranks get torchrun's environment variables, so the same worker also runs under torchrun and srun. Watching them here
rather than through torchrun's agent gives what users need: the first failing rank's own exception, a stop that leaves the
ranks time to write their checkpoint, and no leftover processes. A single rank runs in the launcher's own process, where a
debugger can reach it.
"""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from steerscale.errors import LaunchError, SteerscaleError
from steerscale.rundir import Status, hold, log_path, read_errors, read_status, write_status
from steerscale.train.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
WORKER = "steerscale.train.worker"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAST_BREATH_SECONDS = 10.0
"""After the first rank failed, time for the others to notice, fail by themselves and leave word of it."""
POLL_SECONDS = 0.05
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
"""Variables that make ranks look for a world of torchrun's; those of the shell are of another one."""
INTERRUPTED = 130
"""Exit status after a second Ctrl-C, as shells count."""


@dataclass(frozen=True)
class Failure:
    """How a rank ended that should not have ended so."""

    rank: int
    status: int
    """Exit status; negative: the signal that killed it."""
    time: float
    """Unix time before which it was still running."""


class Killed(Exception):
    """The ranks were killed by this launcher; the text says why."""

    def __init__(self, reason: str, *, by_user: bool) -> None:
        super().__init__(reason)
        self.by_user = by_user


def run_local(config: RunConfig, *, in_process: bool = True) -> int:
    """Run all ranks to the end; returns 0 if they finished or stopped cleanly, else says why and returns 1 or 2.

    Args:
        in_process: run a single rank in this process; False: in one of its own, as several ranks always are.

    Raises SystemExit if the ranks failed or were killed after the user had asked to stop: whatever would have come after this
    run is off, too.
    """
    run_dir = Path(config.run_dir)
    with hold(run_dir, config):
        try:
            if in_process and config.num_ranks() == 1:
                failures, asked = _run_here(run_dir, config), False  # nothing comes after it
            else:
                failures, asked = _run_ranks(run_dir, config)
        except Killed as killed:
            report_failure(run_dir, config, f"FAILED: {killed}\n  {GO_ON}")
            raise SystemExit(INTERRUPTED if killed.by_user else 1) from None
        if not failures:
            return 0
        summary, status = summarize_failure(run_dir, failures)
        report_failure(run_dir, config, summary)
        if asked:
            raise SystemExit(status)
        return status


def report_failure(run_dir: Path, config: RunConfig, summary: str) -> None:
    """Print what failed, and leave word of it in the run's status."""
    step = 0
    with contextlib.suppress(SteerscaleError):
        step = read_status(run_dir).step
    reason = summary.splitlines()[0].removeprefix("FAILED: ")
    cause = "oom" if any(error.get("oom") for error in read_errors(run_dir)) else ""
    write_status(run_dir, Status(state="failed", step=step, steps=config.train.steps, reason=reason, cause=cause))
    print(summary, file=sys.stderr, flush=True)


def _run_here(run_dir: Path, config: RunConfig) -> list[Failure]:
    # Imported this late, and by name: it brings torch, which nothing else in the launcher needs.
    worker = importlib.import_module(WORKER)
    shell = {name: os.environ.pop(name) for name in TORCHRUN if name in os.environ}
    try:
        status = worker.run_alone(run_dir, threads=_threads(config))
    except KeyboardInterrupt:
        raise Killed("interrupted by a second Ctrl-C", by_user=True) from None
    except OSError as error:  # of the log: others are told there
        raise LaunchError(f"run_dir={run_dir} cannot be written: {error}") from error
    finally:
        os.environ.update(shell)
    return [Failure(rank=0, status=status, time=time.time())] if status else []


def _run_ranks(run_dir: Path, config: RunConfig) -> tuple[list[Failure], bool]:
    """What failed, and whether a stop had been asked for."""
    ranks = Ranks(run_dir, config)
    with ranks.running():
        return ranks.wait(), ranks.asked is not None


def _threads(config: RunConfig) -> int:
    return config.launcher.threads_per_rank or max((os.cpu_count() or 1) // config.num_ranks(), 1)


class Ranks:
    """The processes of one run."""

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        self.processes: list[subprocess.Popen] = []
        self.asked: int | None = None
        """The first signal that asked for a stop."""
        self._run_dir, self._config = run_dir, config
        self._deadline: float | None = None
        self._killed = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start the ranks. In this context Ctrl-C, SIGTERM and SIGUSR1 ask them to stop after the current step, a second
        one kills them; after it none is left.
        """
        old = {number: signal.signal(number, self._stop) for number in SIGNALS}
        try:
            self._start()
            yield
        finally:
            self._send(signal.SIGKILL)
            for process in self.processes:
                process.wait()
            for number, handler in old.items():
                signal.signal(number, handler)

    def wait(self) -> list[Failure]:
        """Until all ranks have ended: those that failed by themselves. Raises Killed if they were killed after a stop."""
        failures: dict[int, Failure] = {}
        ended: set[int] = set()
        before = now = time.time()
        while len(ended) < len(self.processes):
            before, now = now, time.time()
            for rank, process in enumerate(self.processes):
                status = process.poll()
                if status is None or rank in ended:
                    continue
                ended.add(rank)
                if status and not self._killed:
                    failures[rank] = Failure(rank=rank, status=status, time=before)
                    self._deadline = self._deadline or time.monotonic() + LAST_BREATH_SECONDS
            if self._killed or (self._deadline is not None and time.monotonic() > self._deadline):
                self._kill()  # again and again: it may have begun while ranks were being started
            time.sleep(POLL_SECONDS)
        if self._killed and not failures:
            raise self._why_killed()
        return list(failures.values())

    def _start(self) -> None:
        size = self._config.num_ranks()
        environment = {
            **{name: value for name, value in os.environ.items() if name not in TORCHRUN},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": str(_threads(self._config)),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        command = [sys.executable, "-m", WORKER, str(self._run_dir), "--parent", str(os.getpid())]
        # The ranks inherit the mask: a signal that comes before they can take it waits until they do.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for rank in range(size):
                process = subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C reaches this process alone, which passes on an orderly stop
                )
                self.processes.append(process)
        except OSError as error:
            raise LaunchError(f"rank {len(self.processes)} of {size} could not be started: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if self.asked is not None:  # another thread of this process may have taken it before all ranks were there
            self._send(self.asked)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
        if self._deadline is not None:
            self._kill()
            return
        self._deadline = time.monotonic() + self._config.launcher.grace_seconds
        self._send(number)
        print("stopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr, flush=True)

    def _kill(self) -> None:
        self._killed = True
        self._send(signal.SIGKILL)

    def _why_killed(self) -> Killed:
        grace = self._config.launcher.grace_seconds
        assert self._deadline is not None
        if time.monotonic() < self._deadline:
            return Killed("the ranks were killed at the second signal", by_user=True)
        return Killed(
            f"the ranks did not stop within launcher.grace_seconds={grace:g} and were killed: raise it if a step and a "
            "checkpoint take longer",
            by_user=False,
        )

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)


GO_ON = "start the same command again to go on from the last checkpoint"


def summarize_failure(run_dir: Path, failures: Sequence[Failure]) -> tuple[str, int]:
    """What failed first and what to do, for people; and the exit status: 2 for a user's error, else 1.

    The first is a rank's own word of its error, or a rank that ended without a word, whichever was earlier: the others
    usually failed because of it.
    """
    errors = read_errors(run_dir)
    told = {error["rank"] for error in errors}
    silent = sorted((f for f in failures if f.status < 0 or f.rank not in told), key=lambda failure: failure.time)
    if errors:  # libraries abort when another rank is gone
        silent = [failure for failure in silent if failure.status != -signal.SIGABRT]
    if silent and (not errors or silent[0].time <= errors[0]["time"]):
        rank, status = silent[0].rank, silent[0].status
        cause = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        hint = "the machine may have run out of memory: see `dmesg`" if status == -signal.SIGKILL else ""
        explained, code = False, 2 if status == 2 else 1
    else:
        rank, cause, hint = errors[0]["rank"], f"{errors[0]['type']}: {errors[0]['message']}", ""
        explained = errors[0]["user_error"]
        code = 2 if explained else 1
    log = log_path(run_dir, rank)
    lines = [f"FAILED: rank {rank} {cause}", *([f"  {hint}"] if hint else [])]
    if not explained:  # a user's error says all there is to say
        lines += [f"  last lines of {log}:", *(f"    {line}" for line in _tail(log, 12)), f"  {GO_ON}"]
    return "\n".join([*lines, f"  logs of all ranks: {log.parent}"]), code


def _tail(path: Path, count: int) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    except OSError:
        return ["(no log)"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
