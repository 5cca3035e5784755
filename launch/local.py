"""Ranks on this machine: start them, watch them, stop them cleanly, and say what went wrong.

The ranks get torchrun's environment variables, so the same worker also runs under torchrun and srun. Watching them here
rather than through torchrun's agent gives what users need: the first failing rank's own exception, a stop that leaves the
ranks time to write their checkpoint, and no leftover processes.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from steerscale.errors import ConfigError, LaunchError
from steerscale.rundir import Status, read_errors, read_status, write_status
from steerscale.train.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
LAST_BREATH_SECONDS = 10.0
"""After the first rank failed, time for the others to notice, fail by themselves and leave word of it."""


def run_local(config: RunConfig) -> int:
    """Run all ranks to the end; returns 0 if they finished or stopped cleanly, else says why and returns 1 or 2."""
    run_dir = Path(config.run_dir)
    with _lock(run_dir):
        ranks = Ranks(run_dir, config)
        with ranks.forwarding_signals():
            failed = ranks.wait()
    if failed is None:
        return 0
    summary, status = summarize_failure(run_dir, *failed)
    step = read_status(run_dir).step
    write_status(run_dir, Status(state="failed", step=step, steps=config.train.steps, reason=summary.splitlines()[0]))
    print(summary, file=sys.stderr)
    return status


class Ranks:
    """The processes of one run."""

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        size = config.layout().world_size
        threads = config.launcher.threads_per_rank or max((os.cpu_count() or 1) // size, 1)
        self._grace = config.launcher.grace_seconds
        self._deadline: float | None = None
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": str(threads),
            # Megatron-Core overlaps by the order in which kernels were launched; more queues would lose it.
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "steerscale.train.worker", str(run_dir)],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes on an orderly stop
            )
            for rank in range(size)
        ]

    def wait(self) -> tuple[int, int] | None:
        """Until all have ended: None if all exited with 0, else (rank, exit status) of the first that did not."""
        first: tuple[int, int] | None = None
        while any(process.poll() is None for process in self.processes):
            if first is None:
                first = self._failed()
                if first is not None:
                    self._deadline = time.monotonic() + LAST_BREATH_SECONDS
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._send(signal.SIGKILL)
            time.sleep(0.05)
        return first or self._failed()

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGUSR1 ask the ranks to stop after the current step; a second one kills them."""
        old = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            self._send(signal.SIGKILL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again = self._deadline is not None
        self._send(signal.SIGKILL if again else signal.SIGTERM)
        self._deadline = time.monotonic() + self._grace
        if not again:
            print("stopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr)

    def _failed(self) -> tuple[int, int] | None:
        return next(((r, p.returncode) for r, p in enumerate(self.processes) if p.poll() not in (None, 0)), None)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)


def summarize_failure(run_dir: Path, rank: int, status: int) -> tuple[str, int]:
    """What failed first and what to do, for people; and the exit status: 2 for a user's error, else 1."""
    errors = read_errors(run_dir)
    if status < 0 or not errors:
        cause = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        hint = "the machine may have run out of memory: see `dmesg`" if status == -signal.SIGKILL else ""
        code = 1
    else:
        error = errors[0]
        rank, cause = error["rank"], f"{error['type']}: {error['message']}"
        code = 2 if error["user_error"] else 1
        hint = ""
    log = run_dir / "logs" / f"rank_{rank}.log"
    lines = [f"FAILED: rank {rank} {cause}", *([hint] if hint else [])]
    if code == 1:
        lines += [f"  last lines of {log}:", *(f"    {line}" for line in _tail(log, 12))]
    lines += [f"  logs of all ranks: {log.parent}", "  start the same command again to go on from the last checkpoint"]
    return "\n".join(lines), code


def _tail(path: Path, count: int) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    except OSError:
        return ["(no log)"]


@contextlib.contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Two launchers on one run directory would overwrite each other's checkpoints."""
    import fcntl

    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"run_dir={run_dir} is in use by a running launcher: wait for it or choose another"
            ) from None
        except OSError as error:
            raise LaunchError(f"{run_dir / '.lock'} cannot be locked: {error}") from error
        yield


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
