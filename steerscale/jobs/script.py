"""The sbatch script of a run, or of several of equal shape as a job array: slurm/job.sbatch.template, filled in.

Everything that a user can set is quoted for the shell; only `cluster.setup` is shell code itself.
"""

import math
import shlex
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steerscale.errors import ConfigError, LaunchError, LayoutError
from steerscale.jobs.journal import slurm_directory
from steerscale.planning.cluster import ClusterConfig, memory_mib
from steerscale.train.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "slurm" / "job.sbatch.template"
OWN_OPTIONS = {
    *(
        "account",
        "array",
        "chdir",
        "cpus-per-task",
        "dependency",
        "error",
        "export",
        "gres",
        "job-name",
        "mem",
        "nodes",
    ),
    *(
        "no-requeue",
        "ntasks",
        "ntasks-per-node",
        "open-mode",
        "output",
        "parsable",
        "partition",
        "qos",
        "requeue",
        "signal",
    ),
    *("time", "wait", "wrap"),
}
"""Options of sbatch that follow from other settings."""
REQUEUE = """\
if scontrol requeue "$job"; then
  sleep 600 # Slurm ends this script before that
fi
say "Slurm did not requeue the job: submitting the next one"
"""


class _Template(string.Template):
    """`@@{name}`: a shell script is full of dollars."""

    delimiter = "@@"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of sbatch."""

    name: str
    value: str
    """Empty: an option without a value."""
    why: str
    """Where it comes from, for a dry run."""

    @property
    def directive(self) -> str:
        """The line of the script. Raises ConfigError for a value that is no single line."""
        if not self.value.isprintable():
            raise ConfigError(
                f"{self.why.split(':')[0]}: sbatch's --{self.name} cannot hold {self.value!r}: one line only"
            )
        return f"#SBATCH --{self.name}" + (f"={shlex.quote(self.value)}" if self.value else "")


def cluster_of(config: RunConfig) -> ClusterConfig:
    """The run's cluster. Raises ConfigError if it has none."""
    if config.cluster is None:
        raise ConfigError("launcher=slurm needs a cluster: add cluster=NAME (a file of configs/cluster/)")
    return config.cluster


def nodes_and_tasks(config: RunConfig) -> tuple[int, int]:
    """Nodes, and ranks on each. Raises LayoutError if the ranks do not fill whole nodes."""
    cluster, layout = cluster_of(config), config.layout()
    per_node, ranks = cluster.gpus_per_node, config.num_ranks()
    if ranks <= per_node:
        return 1, ranks
    if ranks % per_node:
        fewer = ranks // per_node * per_node
        if (placement := config.placement()) is not None:
            raise LayoutError(
                f"{layout.world_size} ranks that train and {placement.producers.world_size} producers are {ranks}, which do "
                f"not fill whole nodes of {cluster.name} (cluster.gpus_per_node={per_node}): choose parallel.* and "
                f"stream.producers.* for {fewer} or {fewer + per_node} together"
            )
        raise LayoutError(
            f"{layout} has {ranks} ranks, which do not fill whole nodes of {cluster.name} (cluster.gpus_per_node={per_node}): "
            f"choose parallel.tensor x .pipeline x .data = {fewer} or {fewer + per_node}"
        )
    return ranks // per_node, per_node


def options_of(config: RunConfig) -> list[Option]:
    """What sbatch is asked for, without the files of output. Raises ConfigError for what contradicts itself."""
    cluster, layout = cluster_of(config), config.layout()
    nodes, tasks = nodes_and_tasks(config)
    options = [Option(name="job-name", value=config.name, why="name")]
    options += [
        Option(name=key, value=value, why=f"cluster.{key}")
        for key in ("partition", "account", "qos")
        if (value := getattr(cluster, key)) is not None
    ]
    options += [
        Option(
            name="nodes",
            value=str(nodes),
            why=f"parallel: {layout.world_size} ranks (tensor {layout.tensor} x pipeline {layout.pipeline} x data "
            f"{layout.data}){_producers(config)} at most cluster.gpus_per_node={cluster.gpus_per_node} to a node",
        ),
        Option(name="ntasks-per-node", value=str(tasks), why="parallel: one task for each rank"),
    ]
    if cluster.gres is not None:
        options.append(
            Option(name="gres", value=f"{cluster.gres}:{tasks}", why="cluster.gres: one for each rank of a node")
        )
    cpus = cluster.cpus_per_task
    options.append(Option(name="cpus-per-task", value=str(cpus), why="cluster.cpus_per_task: for each rank"))
    if cluster.memory is not None:
        options.append(_memory(cluster, cluster.memory, tasks))
    limit = f", at most {cluster.max_time} on {cluster.name}" if cluster.max_time else ""
    lead = cluster.signal_lead_seconds
    options += [
        Option(name="time", value=cluster.time, why=f"cluster.time: of one job{limit}; the run goes on in the next"),
        Option(
            name="signal",
            value=f"B:USR1@{lead}",
            why=f"cluster.signal_lead_seconds: {lead} to {lead + 60} s before the limit the ranks write a checkpoint",
        ),
        _requeue(cluster),
        Option(name="open-mode", value="append", why="restarts write on in the same file"),
    ]
    for name, value in cluster.options.items():
        if name in OWN_OPTIONS:
            raise ConfigError(
                f"cluster.options.{name}={value}: --{name} follows from other settings (see launcher.dry_run=true), set those"
            )
        options.append(Option(name=name, value=value, why="cluster.options"))
    return options


def render_script(configs: Sequence[RunConfig], *, at_once: int | None = None) -> str:
    """The script of these runs: of one as a plain job, of several as an array.

    Args:
        configs: runs that ask sbatch for the same (but for their names) and start their ranks in the same way.
        at_once: tasks of the array that may run at the same time; None: all.
    Raises:
        ConfigError: they differ, or a value cannot stand in a script.
    """
    first, cluster = configs[0], cluster_of(configs[0])
    for other in configs[1:]:
        _check_alike(first, other)
    options = options_of(first)
    array, pattern = len(configs) > 1, "job_%j.out"
    if array:
        limit = f"%{at_once}" if at_once is not None else ""
        options.append(Option(name="array", value=f"0-{len(configs) - 1}{limit}", why="one task for each run"))
        pattern = "job_%A_%a.out"
    # Output that comes before the script can send it to its own run's directory.
    directory = str(slurm_directory(Path(first.run_dir))).replace("%", "%%")
    options.append(Option(name="output", value=f"{directory}/{pattern}", why="run_dir"))
    if "\\" in directory:
        raise ConfigError(f"run_dir={first.run_dir}: Slurm cannot write to a path with a backslash, choose another")
    for config in configs:
        Option(name="output", value=config.run_dir, why="run_dir").directive  # noqa: B018 - refuses what is no single line
    if not TEMPLATE.is_file():
        raise LaunchError(f"{TEMPLATE} is not there: jobs are submitted from a checkout of the project")
    container = "".join(f"{shlex.quote(part)} " for part in shlex.split(cluster.container or ""))
    return _Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        directives="\n".join(option.directive for option in options),
        run_dirs="\n".join(f"  {shlex.quote(config.run_dir)}" for config in configs),
        setup="\n".join(["# cluster.setup", *cluster.setup]) if cluster.setup else "# cluster.setup is empty",
        python=shlex.quote(cluster.python or sys.executable),
        root=shlex.quote(str(ROOT)),
        threads=str(first.launcher.threads_per_rank or cluster.cpus_per_task),
        environment="".join(f"export {name}={shlex.quote(value)}\n" for name, value in cluster.environment.items()),
        in_container=f"srun --nodes=1 --ntasks=1 --export=ALL {container}" if container else "",
        container=container,
        master_addr_suffix=shlex.quote(cluster.master_addr_suffix),
        cpus_per_task=str(cluster.cpus_per_task),
        requeue=REQUEUE if cluster.requeue else "# cluster.requeue is false: the next job is submitted from here.",
    )


def _producers(config: RunConfig) -> str:
    placement = config.placement()
    if placement is None:
        return ""
    layout = placement.producers
    return (
        f" and stream.producers: {layout.world_size} ranks (tensor {layout.tensor} x pipeline {layout.pipeline} x data "
        f"{layout.data})"
    )


def _memory(cluster: ClusterConfig, memory: str, tasks: int) -> Option:
    if tasks == cluster.gpus_per_node:
        return Option(name="mem", value=memory, why="cluster.memory: of a whole node")
    share = math.floor(memory_mib(memory) * tasks / cluster.gpus_per_node)
    why = f"cluster.memory: {tasks} of a node's {cluster.gpus_per_node} GPUs, so as much of its {memory}"
    return Option(name="mem", value=f"{share}M", why=why)


def _requeue(cluster: ClusterConfig) -> Option:
    if cluster.requeue:
        times = f"at most cluster.max_restarts={cluster.max_restarts} times"
        why = f"cluster.requeue: after the time limit or a node's failure, {times}"
        return Option(name="requeue", value="", why=why)
    return Option(
        name="no-requeue", value="", why="cluster.requeue=false: the next job is submitted from within the last"
    )


def _check_alike(first: RunConfig, other: RunConfig) -> None:
    """Raise ConfigError unless one array can hold both."""
    mine, yours = (
        [(option.name, option.value) for option in options_of(config) if option.name != "job-name"]
        for config in (first, other)
    )
    differing = [f"--{a[0]}={a[1]} and --{b[0]}={b[1]}" for a, b in zip(mine, yours) if a != b]
    if len(mine) != len(yours) or cluster_of(first) != cluster_of(other):
        differing.append("other keys of cluster")
    if first.launcher != other.launcher:
        differing.append("other keys of launcher")
    if differing:
        raise ConfigError(
            f"{first.name} and {other.name} cannot share a job array, they differ in {'; '.join(differing)}: submit them apart"
        )
