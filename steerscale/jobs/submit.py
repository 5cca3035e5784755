"""Submitting runs: run directories, one script, one sbatch. A refusal of Slurm's is shown in its own words. Torch-free."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from steerscale.errors import ConfigError, LaunchError
from steerscale.jobs.batch import newest_step
from steerscale.jobs.journal import read_journal, record, slurm_directory
from steerscale.jobs.script import cluster_of, render_script
from steerscale.jobs.slurm import cancel, query, require_slurm, run_slurm
from steerscale.planning.cluster import ClusterConfig
from steerscale.rundir import STATUS, Status, create_run_dir, hold, write_status, write_text
from steerscale.train.config import RunConfig

# A part of what sbatch says -> keys to change, the likeliest first. More particular texts come first.
REJECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("invalid account or account/partition", ("account", "partition")),
    ("invalid partition", ("partition",)),
    ("invalid qos", ("qos",)),
    ("time limit", ("time",)),
    ("generic resource", ("gres",)),
    ("gres", ("gres",)),
    ("memory", ("memory",)),
    ("node count", ("gpus_per_node", "partition")),
    ("more processors requested", ("cpus_per_task", "gpus_per_node")),
    ("cpu count per node", ("cpus_per_task", "gpus_per_node")),
    ("node configuration is not available", ("gpus_per_node", "gres", "cpus_per_task", "memory", "partition")),
    ("partition", ("partition",)),
    ("policy", ("qos", "time", "account")),
    ("limit", ("qos", "time", "account")),
    ("unrecognized option", ("options",)),
    ("reservation", ("options",)),
)


def submit(configs: Sequence[RunConfig], *, command: Sequence[str], at_once: int | None = None) -> str:
    """Write the run directories (or take them up), submit one run as a job or several as a job array; the job's number.

    Args:
        configs: checked configurations; see `render_script` for what they must share.
        command: the command line, for environment.json.
        at_once: tasks of the array that may run at the same time; None: all.
    Raises:
        ConfigError: a run has a job already, or the runs cannot share an array.
        LaunchError: Slurm is not here, or refuses; new run directories are removed again.
    """
    require_slurm()
    script = render_script(configs, at_once=at_once)
    run_dirs = [Path(config.run_dir) for config in configs]
    refuse_live(run_dirs)
    new: list[Path] = []
    before: dict[Path, bytes] = {}
    with contextlib.ExitStack() as held:
        try:
            for run_dir, config in zip(run_dirs, configs):
                existed = create_run_dir(run_dir, config, command=command, check=partial(refuse_live, [run_dir]))
                held.enter_context(hold(run_dir, config))
                if not existed:
                    new.append(run_dir)
            refuse_live(run_dirs)  # of two equal ones at the same time the other was first
            for run_dir, config in zip(run_dirs, configs):
                if (run_dir / STATUS).is_file():
                    before[run_dir] = (run_dir / STATUS).read_bytes()
                slurm_directory(run_dir).mkdir(exist_ok=True)
                # Before the job, which may begin at once and says more.
                step = newest_step(run_dir)
                write_status(run_dir, Status(state="created", step=step, steps=config.train.steps, reason="submitted"))
            path = slurm_directory(run_dirs[0]) / ("array.sbatch" if len(configs) > 1 else "job.sbatch")
            write_text(path, script)
            job = _sbatch(path, cluster_of(configs[0]))
            _record(run_dirs, job, path)
        except Exception as error:
            for run_dir in new:
                shutil.rmtree(run_dir, ignore_errors=True)
            for run_dir in before.keys() - set(new):
                write_text(run_dir / STATUS, before[run_dir].decode())
            if isinstance(error, OSError):
                raise LaunchError(f"nothing was submitted, since a run directory cannot be written: {error}") from error
            raise
    return job


def _record(run_dirs: Sequence[Path], job: str, script: Path) -> None:
    """Note the job in each run's journal. A job that cannot be noted is ended again: nobody would know of it."""
    try:
        for index, run_dir in enumerate(run_dirs):
            record(run_dir, "submit", f"{job}_{index}" if len(run_dirs) > 1 else job, script=str(script))
    except OSError:
        cancel([job])
        raise


def resubmit(config: RunConfig, *, cluster: ClusterConfig | None = None, command: Sequence[str]) -> str:
    """Submit a run again as a job of its own, on another setting of the cluster if one is given; the job's number."""
    changed = replace(config, cluster=cluster or config.cluster, launcher=replace(config.launcher, name="slurm"))
    return submit([changed], command=command)


def refuse_live(run_dirs: Sequence[Path]) -> None:
    """Raise ConfigError if one of these runs has a job that waits or runs: two would overwrite each other's checkpoints."""
    newest = {run_dir: job for run_dir in run_dirs if (job := read_journal(run_dir).job) is not None}
    jobs = query(newest.values())
    for run_dir, job in newest.items():
        if job in jobs and jobs[job].live:
            raise ConfigError(
                f"run_dir={run_dir} has a job already: {job} is {jobs[job].state}; wait for it, end it with `steerscale cancel "
                f"{run_dir}`, or choose another run_dir or name"
            )


def sbatch_command(path: Path) -> list[str]:
    """The command that submits a script."""
    return ["sbatch", "--parsable", str(path)]


def keys_to_change(message: str) -> tuple[str, ...]:
    """Keys of the section cluster that a rejection of sbatch's is about; none if that is not known."""
    text = message.lower()
    return next((keys for part, keys in REJECTIONS if part in text), ())


def _sbatch(path: Path, cluster: ClusterConfig) -> str:
    answer = run_slurm(sbatch_command(path))
    if answer.returncode == 0:
        return answer.stdout.strip().split(";")[0]  # on a federation the cluster's name follows
    words = answer.stderr.strip() or answer.stdout.strip() or f"exit status {answer.returncode}"
    keys = keys_to_change(words)
    if keys:
        now = ", ".join(f"cluster.{key} (now {getattr(cluster, key) or 'null'})" for key in keys)
        hint = f"change {now}; launcher.dry_run=true shows the whole script"
    else:
        hint = "launcher.dry_run=true shows the whole script"
    raise LaunchError(f"Slurm refused the job; it says:\n  {words.replace(chr(10), chr(10) + '  ')}\n{hint}")
