"""Slurm's commands, and nothing else of ours: submit, look, cancel. Torch-free.

Formats rather than `--json`: in Slurm 22.05 `squeue --json` leaves its own filters out of account and prints every job of
the cluster, and where it was built without a JSON library it prints none.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from steerscale.errors import LaunchError

TIMEOUT_SECONDS = 60
"""For an answer of Slurm's; a busy controller takes long."""
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
"""States of a job that does not run at the moment."""
LIVE = WAITING | {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
"""States of a job that is still to do something."""


@dataclass(frozen=True)
class Job:
    """A job as Slurm describes it."""

    id: str
    """A number, or NUMBER_INDEX in an array."""
    state: str
    """Slurm's word: PENDING, RUNNING, TIMEOUT, ..."""
    reason: str = ""
    """Why it waits or ended, in Slurm's word; empty if there is no reason."""
    nodes: str = ""
    """Where it runs."""

    @property
    def live(self) -> bool:
        """Whether it runs or waits."""
        return self.state in LIVE


def require_slurm() -> None:
    """Raise LaunchError unless Slurm's commands are here."""
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch was not found: submit from a login node of the cluster (or `module load slurm` first); "
            "slurm/testbed.sh starts a Slurm on this machine to try things out"
        )


def run_slurm(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. Raises LaunchError if it is not there or does not answer, not if it fails."""
    # Inside a job (an interactive one, say) its own numbers would contradict what another job asks for.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False, env=environment
        )
    except FileNotFoundError as error:
        raise LaunchError(f"{command[0]} was not found: this needs a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{command[0]} gave no answer within {TIMEOUT_SECONDS} s: try again later") from error


def query(ids: Collection[str]) -> dict[str, Job]:
    """What Slurm knows of these jobs: from its queue, which remembers ended ones for some minutes, then from its accounting,
    if there is any. Jobs it has forgotten are left out. Raises LaunchError if the queue cannot be asked.
    """
    if not ids or shutil.which("squeue") is None:
        return {}
    jobs = _queue(ids)
    if forgotten := set(ids) - jobs.keys():
        jobs.update(_accounting(forgotten))
    return jobs


def cancel(ids: Sequence[str]) -> None:
    """End jobs, waiting or running. Raises LaunchError with Slurm's words if it refuses."""
    answer = run_slurm(["scancel", *ids])
    if answer.returncode or "error" in answer.stderr:
        raise LaunchError(f"scancel refused: {answer.stderr.strip()}")


def signal_script(job: str, name: str) -> None:
    """Send a signal to a job's script. Raises LaunchError with Slurm's words if it refuses."""
    answer = run_slurm(["scancel", "--batch", f"--signal={name}", job])
    if answer.returncode or "error" in answer.stderr:
        raise LaunchError(f"scancel refused: {answer.stderr.strip()}")


def nodes_down(nodes: str) -> list[str]:
    """Those of a job's nodes (as in SLURM_JOB_NODELIST) that are down or do not answer; none if Slurm cannot be asked."""
    try:
        answer = run_slurm(["sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N %T"])
    except LaunchError:
        return []
    lines = [line.split() for line in answer.stdout.splitlines() if len(line.split()) == 2]
    # A star marks a node that does not answer.
    return sorted({name for name, state in lines if state.startswith(("down", "fail")) or state.endswith("*")})


def _base(job: str) -> str:
    return job.partition("_")[0]


def _queue(ids: Collection[str]) -> dict[str, Job]:
    listed = ",".join(sorted({_base(job) for job in ids}))
    answer = run_slurm(["squeue", "--noheader", "--array", "--states=all", f"--jobs={listed}", "--format=%i|%T|%N|%r"])
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise LaunchError(f"squeue failed: {answer.stderr.strip()}")
    jobs = {}
    for line in answer.stdout.splitlines():
        fields = line.split("|", 3)
        if len(fields) == 4 and fields[0] in ids:
            reason = "" if fields[3] == "None" else fields[3]
            jobs[fields[0]] = Job(id=fields[0], state=fields[1], reason=reason, nodes=fields[2])
    return jobs


def _accounting(ids: Collection[str]) -> dict[str, Job]:
    """From sacct, which lags some seconds behind; nothing where accounting is off."""
    if shutil.which("sacct") is None:
        return {}
    listed = ",".join(sorted({_base(job) for job in ids}))
    answer = run_slurm(
        ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={listed}", "--format=JobID,State,NodeList"]
    )
    jobs = {}
    for line in answer.stdout.splitlines():
        fields = line.split("|")
        if len(fields) == 3 and fields[0] in ids:
            state = re.split(r"[ +]", fields[1])[0]  # "CANCELLED by 1000"
            jobs[fields[0]] = Job(id=fields[0], state=state, nodes=fields[2])
    return jobs
