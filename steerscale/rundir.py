"""The run directory: the whole truth about a run. Torch-free; written by launcher and workers, read by everything else.

config.yaml        the resolved configuration; config.N.yaml: of earlier starts that differed
environment.json   code version, packages, host, command line of the last start
status.json        state, step, time: see `Status`
metrics.jsonl      the record of training          tb/  the same for TensorBoard
checkpoints/       see `checkpoint.store`
kernels.txt        fused kernels that were found, and what is used
preflight.json     what devices and links reached before the first step, see `train.preflight`
logs/rank_N.log    everything rank N printed       logs/rank_N.error.json  how it failed, if it did
"""

import contextlib
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TextIO

from steerscale import __version__
from steerscale.config import dump_yaml, load_yaml
from steerscale.errors import ConfigError, LaunchError, SteerscaleError

logger = logging.getLogger(__name__)

CONFIG, ENVIRONMENT, STATUS = "config.yaml", "environment.json", "status.json"
KERNELS = "kernels.txt"
PACKAGES = ("torch", "megatron-core", "deepspeed", "transformer-engine", "hydra-core", "numpy", "sentencepiece")

State = Literal["created", "running", "stopped", "finished", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a run stands. `stopped` is the marker of a clean stop on a signal: a checkpoint is there, start again to go on."""

    state: State
    step: int = 0
    steps: int = 0
    updated: float = 0.0
    """Unix time of the last change."""
    host: str = ""
    reason: str = ""
    """Why it stopped or failed."""
    cause: str = ""
    """The kind of failure in a word, where one is known: oom, restarts, cancelled, timeout."""


def create_run_dir(
    run_dir: Path, config: Any, *, command: Sequence[str], check: Callable[[], None] = lambda: None
) -> bool:
    """Write a new run directory, or take up an existing one; returns whether it existed. To use it, `hold` it. `check`
    may refuse an existing one before it is changed, and while nobody else can change it.

    A new one appears whole (written beside it and renamed). Raises ConfigError if `run_dir` is something else, LaunchError if
    it cannot be written.
    """
    text = dump_yaml(config)
    environment = json.dumps(describe_environment(command), indent=1)
    try:
        if not run_dir.exists() and _create(run_dir, text, environment):
            return False
        if not (run_dir / CONFIG).is_file():
            raise ConfigError(
                f"run_dir={run_dir} exists and is no run directory: choose another with run_dir=... or name=..."
            )
        with lock(run_dir):  # a run that is going on keeps its files
            check()
            _renew(run_dir, text, environment)
    except OSError as error:
        reason = error.strerror or str(error)
        raise LaunchError(f"run_dir={run_dir} cannot be written: {reason}; choose another, or mend that") from error
    return True


def _create(run_dir: Path, config: str, environment: str) -> bool:
    """Write a new run directory; False if another start has made it meanwhile."""
    # Names have room for 255 bytes.
    temporary = run_dir.with_name(f".{run_dir.name[:50]}.{os.getpid()}")
    try:
        (temporary / "logs").mkdir(parents=True)
        (temporary / CONFIG).write_text(config, encoding="utf-8")
        (temporary / ENVIRONMENT).write_text(environment, encoding="utf-8")
        write_text(temporary / STATUS, _status_text(Status(state="created")))
        temporary.rename(run_dir)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if (run_dir / CONFIG).is_file():
            return False
        raise
    return True


def _renew(run_dir: Path, config: str, environment: str) -> None:
    """Make an existing run directory ready for another start."""
    before = (run_dir / CONFIG).read_text(encoding="utf-8")
    if before != config:
        numbers = [path.name.split(".")[1] for path in run_dir.glob("config.*.yaml")]
        number = max((int(text) for text in numbers if text.isdecimal()), default=-1) + 1
        # The old one is copied, the new one replaces it at once: a crash in between leaves a run directory.
        write_text(run_dir / f"config.{number}.yaml", before)
        write_text(run_dir / CONFIG, config)
    write_text(run_dir / ENVIRONMENT, environment)
    for old in (run_dir / "logs").glob("rank_*.error.json"):
        old.unlink()


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold a run directory: two launchers on it would overwrite each other's checkpoints. Ends with the process at the latest.

    Raises ConfigError if another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((run_dir / ".lock").open("w"))
            _lock_file(file)
        except BlockingIOError:
            raise ConfigError(
                f"run_dir={run_dir} is in use by a running launcher: wait for it or choose another"
            ) from None
        except OSError as error:
            raise LaunchError(f"{run_dir / '.lock'} cannot be locked: {error}") from error
        yield


def _lock_file(file: TextIO) -> None:
    """Lock it within a moment: whoever looks whether it is held (`is_held`) holds it so long. Raises BlockingIOError."""
    import fcntl

    for _ in range(9):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.02)
    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def hold(run_dir: Path, config: Any) -> Iterator[None]:
    """`lock` a run directory that `create_run_dir` has made for `config`.

    Raises ConfigError if another process holds it, or has put a configuration of its own there in the moment between.
    """
    with lock(run_dir):
        if (run_dir / CONFIG).read_text(encoding="utf-8") != dump_yaml(config):
            raise ConfigError(
                f"run_dir={run_dir} was just taken up by another start with other settings: choose another, or start again"
            )
        yield


def is_held(run_dir: Path) -> bool:
    """Whether a launcher on this machine holds the run directory."""
    import fcntl

    try:
        with (run_dir / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # never held, or on a file system without locks
    return False


def read_config(run_dir: Path) -> dict[str, Any]:
    """The resolved configuration as plain values. Raises ConfigError if this is no run directory."""
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"{run_dir} is no run directory: it has no {CONFIG}")
    return load_yaml(run_dir / CONFIG)


def write_status(run_dir: Path, status: Status) -> None:
    """Replace status.json. A disk that is full leaves the old one: a status is not worth a run, so there is only a warning."""
    try:
        write_text(run_dir / STATUS, _status_text(status))
    except OSError as error:
        logger.warning("%s was not updated: %s", run_dir / STATUS, error)


def _status_text(status: Status) -> str:
    content = {**asdict(status), "updated": round(time.time(), 3), "host": socket.gethostname()}
    return json.dumps(content, indent=1) + "\n"


def read_status(run_dir: Path) -> Status:
    """The last status. Raises SteerscaleError if it cannot be read."""
    try:
        return Status(**json.loads((run_dir / STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SteerscaleError(f"{run_dir / STATUS} cannot be read: {error}") from error


def log_path(run_dir: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return run_dir / "logs" / f"rank_{rank}.log"


def write_error(run_dir: Path, rank: int, error: BaseException) -> None:
    """Leave word of how this rank failed for the launcher's summary; the first word counts."""
    path = _error_path(run_dir, rank)
    if path.exists():
        return
    content = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__name__,
        "message": str(error),
        "user_error": isinstance(error, SteerscaleError),
        "oom": is_out_of_memory(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    try:
        write_text(path, json.dumps(content))
    except OSError as failure:  # the log has it, if anything has
        logger.warning("%s was not written: %s", path, failure)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, a GPU's or the machine's, or was raised from one that says so."""
    cause = error.__cause__ or error.__context__
    # Told by name, since this module knows no torch; its CPU allocator raises a plain RuntimeError.
    told = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    texts = ("can't allocate memory", "CUDA out of memory", "Cannot allocate memory")
    return told or any(text in str(error) for text in texts) or (cause is not None and is_out_of_memory(cause))


def clear_error(run_dir: Path, rank: int) -> None:
    """Forget how this rank failed in an earlier start."""
    _error_path(run_dir, rank).unlink(missing_ok=True)


def read_errors(run_dir: Path) -> list[dict[str, Any]]:
    """All ranks' errors, the earliest first: the others usually failed because of it."""
    errors = [json.loads(path.read_text(encoding="utf-8")) for path in (run_dir / "logs").glob("rank_*.error.json")]
    return sorted(errors, key=lambda error: error["time"])


def _error_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank_{rank}.error.json"


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once: readers see the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def describe_environment(command: Sequence[str]) -> dict[str, Any]:
    """Code version, packages, host. No environment variables: they may hold secrets."""
    return {
        "steerscale": __version__,
        "git": _git_version(),
        "python": sys.version.split()[0],
        "packages": {name: version for name in PACKAGES if (version := _package_version(name))},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "command": list(command),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_version() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    answer = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None
