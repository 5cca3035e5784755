"""Runs as jobs on a Slurm cluster: checks, a dry run that shows the whole job, submission. Torch-free."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from steerscale.errors import ConfigError
from steerscale.jobs.journal import slurm_directory
from steerscale.jobs.script import cluster_of, nodes_and_tasks, options_of, render_script
from steerscale.jobs.submit import sbatch_command, submit
from steerscale.train.config import RunConfig


def check_job(config: RunConfig) -> None:
    """What can be said of a job before Slurm is asked. Raises SteerscaleErrors; writes nothing."""
    cluster = cluster_of(config)
    nodes_and_tasks(config)
    if cluster.needs_account and cluster.account is None:
        raise ConfigError(f"{cluster.name} takes no job without an account: add cluster.account=YOUR_PROJECT")
    for local in cluster.node_local_paths:
        if Path(config.run_dir).is_relative_to(local):
            raise ConfigError(
                f"run_dir={config.run_dir} is below {local}, which each node of {cluster.name} has for itself: choose one on a "
                "file system that all nodes share (or correct cluster.node_local_paths)"
            )
    render_script([config])


def show_job(config: RunConfig) -> str:
    """The script that would be submitted, the command that would do it, and a line on why for each option."""
    options = options_of(config)
    width = max(len(option.name) for option in options)
    path = slurm_directory(Path(config.run_dir)) / "job.sbatch"
    lines = [
        render_script([config]).rstrip("\n"),
        "",
        f"# Nothing was submitted. Without launcher.dry_run=true this script would be written to {path}",
        f"# and submitted with: {shlex.join(sbatch_command(path))}",
        "#",
        *(f"# {option.name:<{width}}  {option.value or 'yes'}  <- {option.why}" for option in options),
    ]
    return "\n".join(lines)


def submit_run(config: RunConfig) -> int:
    """Submit a checked run; returns the exit status. Raises LaunchError if Slurm refuses."""
    job = submit([config], command=sys.argv)
    run_dir = config.run_dir
    print(f"submitted: job {job} for {run_dir}\nhow it stands: steerscale status {shlex.quote(run_dir)}", flush=True)
    return 0


def submit_array(configs: Sequence[RunConfig], *, at_once: int | None = None) -> str:
    """Submit checked runs of equal shape (nodes, ranks, cluster, launcher) as one job array; returns its number.

    Args:
        configs: one run a task, in this order; a single one becomes a plain job.
        at_once: how many may run at the same time; None: as many as the cluster has room for.
    Raises:
        ConfigError: the runs differ in what they ask Slurm for, or one has a job already.
        LaunchError: Slurm refuses.
    """
    if not configs:
        raise ConfigError("a job array needs at least one run")
    for config in configs:
        check_job(config)
    return submit(configs, command=sys.argv, at_once=at_once)
