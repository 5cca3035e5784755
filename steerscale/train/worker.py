"""One rank of a run: `python -m steerscale.train.worker RUN_DIR`, started by the launcher, torchrun or srun.

Everything it needs is in the run directory's config.yaml and in torchrun's environment variables (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Exit status: 0 finished or stopped cleanly, 2 a user's error, 1 anything else.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from steerscale.errors import SteerscaleError
from steerscale.rundir import write_error
from steerscale.train.signals import StopRequest

logger = logging.getLogger("steerscale")


def main(argv: list[str] | None = None) -> int:
    """Run this rank; see the module's docstring."""
    stop = StopRequest()
    stop.install()
    parser = argparse.ArgumentParser(prog="steerscale.train.worker", description="Run one rank of a prepared run.")
    parser.add_argument("run_dir", type=Path, help="run directory with config.yaml")
    run_dir = parser.parse_args(argv).run_dir
    rank = int(os.environ.get("RANK", "0"))
    console = _redirect_output(run_dir / "logs" / f"rank_{rank}.log")
    _log_to(sys.stderr, console if rank == 0 else None, rank=rank)
    try:
        # Torch and Megatron-Core take seconds to import: a stop signal that comes meanwhile is already remembered.
        from steerscale.train.run import run

        run(run_dir, rank=rank, stop=stop)
    except Exception as error:
        logger.exception("rank %d failed", rank)
        write_error(run_dir, rank, error)
        sys.stderr.flush()
        # At once, past any clean-up that could wait for the other ranks: they learn of it by the broken connection.
        os._exit(2 if isinstance(error, SteerscaleError) else 1)
    return 0


def _redirect_output(path: Path) -> TextIO:
    """Send everything this process prints, C libraries included, to its log; returns the old standard output."""
    path.parent.mkdir(exist_ok=True)
    console = os.fdopen(os.dup(1), "w", buffering=1)
    with path.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return console


def _log_to(file: TextIO, console: TextIO | None, *, rank: int) -> None:
    logging.captureWarnings(True)
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    # Rank 0 speaks; what another rank has to say stands in its own log, and comes to light if the run fails.
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if console is not None:
        spoken = logging.StreamHandler(console)
        spoken.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(spoken)


if __name__ == "__main__":
    sys.exit(main())
