"""One rank of a run: `python -m steerscale.train.worker RUN_DIR`, started by the launcher, torchrun or srun.

Everything it needs is in the run directory's config.yaml and in torchrun's environment variables (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or where srun started it in Slurm's own. Exit status: 0 finished or stopped cleanly,
2 a user's error, 1 anything else.
"""

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from steerscale.errors import SteerscaleError
from steerscale.rundir import clear_error, log_path, write_error
from steerscale.train.signals import StopRequest

logger = logging.getLogger("steerscale")

PR_SET_PDEATHSIG = 1
SLURM_NAMES = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}
"""torchrun's variables by what srun calls them; the address is the job script's to say (`slurm/job.sbatch.template`)."""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run this rank in a process of its own, and end it; see the module's docstring."""
    stop = StopRequest()
    stop.install()
    parser = argparse.ArgumentParser(prog="steerscale.train.worker", description="Run one rank of a prepared run.")
    parser.add_argument("run_dir", type=Path, help="run directory with config.yaml")
    parser.add_argument("--parent", type=int, help="process to die with, whatever ends it")
    args = parser.parse_args(argv)
    if args.parent is not None:
        _die_with(args.parent)
    _adopt_slurm_ranks()
    rank = int(os.environ.get("RANK", "0"))
    console = _redirect_output(log_path(args.run_dir, rank))
    with _logging_to(sys.stderr, console if rank == 0 else None, rank=rank):
        status = _run(args.run_dir, rank=rank, stop=stop, threads=int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.stdout.flush()
    sys.stderr.flush()
    # At once. After a failure any clean-up could wait for the other ranks, which learn of it by the broken connection; and
    # after a success there is none left to do, but the interpreter would take a second to free torch object by object.
    os._exit(status)


def run_alone(run_dir: Path, *, threads: int) -> int:
    """Run the only rank in this process, so that a debugger sees it; returns its exit status.

    Raises KeyboardInterrupt at the second Ctrl-C; the first one is a stop signal.
    """
    stop = StopRequest()
    path = log_path(run_dir, 0)
    path.parent.mkdir(exist_ok=True)
    with stop.interactive(), path.open("a", encoding="utf-8") as log, _logging_to(log, sys.stdout, rank=0):
        try:
            return _run(run_dir, rank=0, stop=stop, threads=threads)
        finally:
            # This process goes on, and ends as others do: libraries (triton) take what is never collected for their leaks.
            gc.unfreeze()


def _set_cuda_environment() -> None:
    """What CUDA and torch's allocator read when they start; nothing of it matters without CUDA."""
    # Megatron-Core overlaps by the order in which kernels were launched; more queues would lose it.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    # Blocks of many sizes (logits, gathered sequences, gradient buffers) come and go: segments that grow leave no holes.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _run(run_dir: Path, *, rank: int, stop: StopRequest, threads: int) -> int:
    clear_error(run_dir, rank)
    _set_cuda_environment()
    try:
        # Torch and Megatron-Core take seconds to import: a stop signal that comes meanwhile is already remembered.
        with _no_collections():
            from steerscale.train.run import run

        run(run_dir, rank=rank, stop=stop, threads=threads)
    except Exception as error:
        logger.exception("rank %d failed", rank)
        write_error(run_dir, rank, error)
        return 2 if isinstance(error, SteerscaleError) else 1
    return 0


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """For imports: looking for garbage among half a million objects that stay would take a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor do later collections look at them
        gc.enable()


def _adopt_slurm_ranks() -> None:
    """Say srun's numbers in torchrun's words, where nobody else has given any."""
    if "RANK" not in os.environ:
        os.environ.update({ours: os.environ[theirs] for ours, theirs in SLURM_NAMES.items() if theirs in os.environ})


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone: a launcher that is killed leaves no ranks behind."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the kernel knew
        os._exit(1)


def _redirect_output(path: Path) -> TextIO:
    """Send everything this process prints, C libraries included, to its log; returns the old standard output."""
    path.parent.mkdir(exist_ok=True)
    console = os.fdopen(os.dup(1), "w", buffering=1)
    with path.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return console


@contextlib.contextmanager
def _logging_to(file: TextIO, console: TextIO | None, *, rank: int) -> Iterator[None]:
    """Log to the rank's file, and what the library says to the console as well."""
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    # Rank 0 speaks; what another rank has to say stands in its own log, and comes to light if the run fails.
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handlers = [(root, handler)]
    if console is not None:
        spoken = logging.StreamHandler(console)
        spoken.setFormatter(logging.Formatter("%(message)s"))
        # A failure is told once, by the launcher's summary; the traceback is in the log.
        spoken.addFilter(lambda record: record.exc_info is None)
        handlers.append((logger, spoken))
    logging.captureWarnings(True)
    for owner, one in handlers:
        owner.addHandler(one)
    try:
        yield
    finally:
        for owner, one in handlers:
            owner.removeHandler(one)
        root.setLevel(level)
        logging.captureWarnings(False)


if __name__ == "__main__":
    main()
