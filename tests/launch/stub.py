"""A rank without torch: the real worker around a `run` that does what the run directory's behaviour.json says."""

import json
import os
import signal
import sys
import time
import types
from pathlib import Path

from steerscale import errors
from steerscale.rundir import Status, write_status
from steerscale.train.signals import StopRequest
from steerscale.train.worker import main


def run(run_dir: Path, *, rank: int, stop: StopRequest, threads: int) -> None:
    """[what, argument ...] for each rank."""
    (run_dir / f"ready_{rank}").write_text(str(os.getpid()))
    behaviour = json.loads((run_dir / "behaviour.json").read_text())
    while len(list(run_dir.glob("ready_*"))) < len(behaviour):  # as ranks find each other
        time.sleep(0.001)
    what, *arguments = behaviour[rank]
    if what == "wait":  # trains until it is asked to stop
        while not stop:
            time.sleep(0.01)
        (run_dir / f"stopped_{rank}").write_text(str(stop.name))
        write_status(run_dir, Status(state="stopped", step=3))
    elif what == "raise":  # error, its text, and the rank that fails before
        name, text, *before = arguments
        _wait_for_death_of(before, run_dir)
        raise getattr(errors, name, RuntimeError)(text)
    elif what == "kill":  # signal, and the rank that fails before
        name, *before = arguments
        _wait_for_death_of(before, run_dir)
        sys.stdout.write("last words\n")
        sys.stdout.flush()
        os.kill(os.getpid(), getattr(signal, name))
    elif what == "exit":
        os._exit(arguments[0])
    elif what == "hang":  # deaf
        while True:
            time.sleep(1)


def _wait_for_death_of(ranks: list[int], run_dir: Path) -> None:
    """As a connection breaks."""
    for rank in ranks:
        ready = run_dir / f"ready_{rank}"
        while not ready.is_file() or not ready.read_text():
            time.sleep(0.001)
        while (
            Path(f"/proc/{ready.read_text()}/cmdline").is_file()
            and Path(f"/proc/{ready.read_text()}/cmdline").read_bytes()
        ):
            time.sleep(0.001)  # a process that waits to be reaped has no command line any more


# The worker imports this late; here it finds the stub instead.
module = types.ModuleType("steerscale.train.run")
module.run = run  # type: ignore[attr-defined]

if __name__ == "__main__":
    sys.modules["steerscale.train.run"] = module
    main()
