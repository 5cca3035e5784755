"""Runs in the Slurm allocation that this command is in (salloc, or a job of one's own): one after the other on the same nodes.

Ranks start from srun as they do in a job (`slurm/job.sbatch.template`), in the environment of this shell: `cluster.setup`
is for jobs. What Slurm does with the allocation at its end, and with a node that fails, ends the run with it.
"""

import ctypes
import functools
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from launch.caution import warnings_about
from launch.local import INTERRUPTED, ROOT, SIGNALS, TORCHRUN, WORKER, Failure, report_failure, summarize_failure
from steerscale.errors import LaunchError
from steerscale.jobs.script import cluster_of, nodes_and_tasks
from steerscale.jobs.slurm import run_slurm
from steerscale.jobs.submit import refuse_live
from steerscale.rundir import create_run_dir, hold, read_status
from steerscale.train.config import RunConfig
from steerscale.train.worker import PR_SET_PDEATHSIG

PORTS = range(20_000, 32_000)
"""Below those that are given out to clients."""


def hosts_of_allocation() -> list[str]:
    """The nodes of the allocation this process is in. Raises LaunchError if it is in none."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if not listed:
        raise LaunchError(
            "sweep.allocation=true runs the points in an allocation of Slurm's, and this shell is in none: get one with "
            "`salloc --nodes=N ...` and start the command in it"
        )
    answer = run_slurm(["scontrol", "show", "hostnames", listed])
    if answer.returncode or not answer.stdout.split():
        raise LaunchError(f"scontrol does not know the nodes of {listed}: {answer.stderr.strip()}")
    return answer.stdout.split()


def run_in_allocation(config: RunConfig) -> int:
    """Run a checked configuration to its end; returns 0 if it finished or stopped cleanly, else says why.

    Raises LaunchError if the allocation is too small, SystemExit if the ranks failed or were killed after the user had asked to
    stop: whatever would have come after this run is off, too.
    """
    hosts, (nodes, tasks) = hosts_of_allocation(), nodes_and_tasks(config)
    if nodes > len(hosts):
        raise LaunchError(
            f"{config.layout()} needs {nodes} nodes of {tasks} ranks, this allocation has {len(hosts)}: {', '.join(hosts)}"
        )
    for warning in warnings_about(config):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    run_dir = Path(config.run_dir)
    existed = create_run_dir(run_dir, config, command=sys.argv, check=functools.partial(refuse_live, [run_dir]))
    print(f"{'resuming' if existed else 'new run'}: {run_dir}", flush=True)
    with hold(run_dir, config):
        status, asked = _run_ranks(config, hosts[0], nodes=nodes, tasks=tasks)
        if read_status(run_dir).state in ("finished", "stopped"):
            return 0
        # Without a word of a rank's own, srun's status is all there is.
        failure = Failure(rank=0, status=status or 1, time=time.time())
        summary, code = summarize_failure(run_dir, [failure])
        report_failure(run_dir, config, summary)
        if asked:
            raise SystemExit(INTERRUPTED)
        return code


def _run_ranks(config: RunConfig, first_host: str, *, nodes: int, tasks: int) -> tuple[int, bool]:
    """srun's exit status, and whether a stop was asked for. The first Ctrl-C, SIGTERM or SIGUSR1 asks the ranks to stop after
    their step, a second kills them."""
    cluster = cluster_of(config)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in TORCHRUN},
        **cluster.environment,
        "MASTER_ADDR": first_host + cluster.master_addr_suffix,
        "MASTER_PORT": str(random.choice(PORTS)),
        "OMP_NUM_THREADS": str(config.launcher.threads_per_rank or cluster.cpus_per_task),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    worker = [cluster.python or sys.executable, "-u", "-m", WORKER, config.run_dir]
    command = [
        *("srun", "--export=ALL", "--kill-on-bad-exit=1", f"--nodes={nodes}", f"--ntasks={nodes * tasks}"),
        *(f"--ntasks-per-node={tasks}", f"--cpus-per-task={cluster.cpus_per_task}"),
        *shlex.split(cluster.container or ""),
        # USR1 is ignored until the rank can take it.
        *("sh", "-c", 'trap "" USR1; exec "$@"', "rank", *worker),
    ]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_launcher
    )
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        process.send_signal(signal.SIGTERM if asked else signal.SIGUSR1)
        asked = True

    old = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        return process.wait(), asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _end_with_launcher() -> None:
    """In srun's process: have the kernel end it, and with it the ranks, when the launcher is gone, whose lock is gone then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
