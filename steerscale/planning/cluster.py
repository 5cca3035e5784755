"""What is known of a cluster: its nodes and links for the planner, its Slurm for the launcher. Torch-free.

A cluster is a YAML file in configs/cluster/; `cluster=alpha` chooses one, `cluster.account=p_xyz` changes a key of it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from steerscale.config import from_mapping, load_yaml, require
from steerscale.errors import ConfigError
from steerscale.planning.hardware import DEVICES

PROFILES = Path(__file__).resolve().parents[2] / "configs" / "cluster"

_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?|(?P<parts>\d+(?::\d+){0,2}))")
_MEMORY = re.compile(r"(\d+)([KMGT]?)")
_MIB = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION_NAME = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The cluster a run is planned for or submitted to: nodes, links, and what its Slurm wants to be told."""

    name: str
    """Name of the cluster, for people."""
    device: str | None = None
    """Its GPUs by the name `steerscale.planning.hardware` knows them by, e.g. a100-sxm-40gb; null: unknown."""
    gpus_per_node: int
    """GPUs, and so ranks, of a whole node; on nodes without GPUs the ranks they take."""
    intra_node_gb_per_second: float | None = None
    """Usable bandwidth between the GPUs of a node, per GPU and one direction, 1e9 bytes/s; null: unknown."""
    inter_node_gb_per_second: float | None = None
    """Usable bandwidth between nodes, per GPU (the node's links divided among its GPUs) and one direction, 1e9 bytes/s;
    null: unknown."""
    partition: str | None = None
    """Slurm partition; null: the cluster's default."""
    account: str | None = None
    """Account (project) that is charged; null: your default one."""
    needs_account: bool = False
    """Whether the cluster refuses jobs without an account."""
    qos: str | None = None
    """Quality of service; null: the default one."""
    gres: str | None = "gpu"
    """Kind of GPU to ask for, e.g. gpu or gpu:a100: the number per node is added; null: ask for none."""
    cpus_per_task: int = 1
    """CPUs of each rank, as Slurm counts them; its threads, unless launcher.threads_per_rank is set."""
    memory: str | None = None
    """Main memory of a whole node that a job may use, e.g. 990000M: a job on part of a node asks for its share; null: do not
    ask, the cluster's default applies."""
    time: str = "08:00:00"
    """Time limit of a job, [DAYS-]HOURS:MINUTES:SECONDS, in quotes in YAML; the run goes on in the next job."""
    max_time: str | None = None
    """The longest limit that the cluster allows; null: unknown."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the ranks start: `module load ...`, `source .../environment.sh`."""
    container: str | None = None
    """Options of srun that start ranks in a container, e.g. --container-image=/images/torch.sqsh; null: none."""
    master_addr_suffix: str = ""
    """Appended to the first node's name where that name leads to a slow network, e.g. i on JUWELS."""
    signal_lead_seconds: int = 300
    """How long before the time limit the ranks are asked to write a checkpoint; Slurm may be up to 60 s early."""
    requeue: bool = True
    """Whether Slurm may put a job back into the queue, after the time limit or a node's failure; false: the next job is
    submitted from within the ending one."""
    max_restarts: int = 50
    """How often a submitted run may be started again before it has to be submitted anew."""
    options: dict[str, str] = field(default_factory=dict)
    """More options of sbatch by their long names without dashes, e.g. reservation: course; empty text for one that takes
    no value."""
    python: str | None = None
    """Python interpreter of the ranks; null: the one that submits."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables for the ranks, e.g. NCCL_SOCKET_IFNAME."""
    node_local_paths: list[str] = field(default_factory=lambda: ["/tmp", "/var/tmp", "/dev/shm"])
    """Directories that each node has for itself: a run directory in one of them is refused."""

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "cluster.name must not be empty")
        require(
            self.device is None or self.device in DEVICES,
            f"cluster.device={self.device} is not known: choose one of {', '.join(DEVICES)}, or leave it null",
        )
        for key in ("gpus_per_node", "cpus_per_task", "signal_lead_seconds"):
            require(getattr(self, key) > 0, f"cluster.{key} must be positive, got {getattr(self, key)}")
        for key in ("intra_node_gb_per_second", "inter_node_gb_per_second"):
            value = getattr(self, key)
            require(value is None or value > 0, f"cluster.{key} must be positive or null, got {value}")
        require(self.max_restarts >= 0, f"cluster.max_restarts must not be negative, got {self.max_restarts}")
        if self.memory is not None:
            memory_mib(self.memory)
        self._check_times()
        self._check_names()

    def _check_times(self) -> None:
        limit = time_seconds(self.time, key="cluster.time")
        if self.max_time is not None and limit > time_seconds(self.max_time, key="cluster.max_time"):
            raise ConfigError(
                f"cluster.time={self.time} is above the {self.max_time} that {self.name} allows (cluster.max_time): ask for "
                "less, the run goes on in the next job by itself"
            )
        require(
            self.signal_lead_seconds < limit,
            f"cluster.signal_lead_seconds={self.signal_lead_seconds} must be below cluster.time={self.time} ({limit} s): the "
            "job would be asked to stop before it starts",
        )

    def _check_names(self) -> None:
        for name in self.environment:
            require(
                bool(_ENVIRONMENT_NAME.fullmatch(name)),
                f"cluster.environment: {name!r} is no name of an environment variable",
            )
        for name in self.options:
            require(
                bool(_OPTION_NAME.fullmatch(name)),
                f"cluster.options: {name!r} is no long option of sbatch: write it without dashes, e.g. reservation",
            )


def load_cluster(name_or_path: str | Path) -> ClusterConfig:
    """The cluster of a profile in configs/cluster/ by its name, or of any file by its path (ending in .yaml).

    Raises ConfigError if there is none, or for what is wrong in it.
    """
    text = str(name_or_path)
    path = Path(text) if text.endswith((".yaml", ".yml")) else PROFILES / f"{text}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise ConfigError(f"there is no cluster {text!r}: {path} does not exist; known are {known or 'none'}")
    return from_mapping(ClusterConfig, load_yaml(path), at="cluster")


def time_seconds(text: str, *, key: str) -> int:
    """Seconds of a Slurm time limit: MINUTES, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ConfigError naming `key`."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(f"{key}={text} is no time limit: write HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
    if match["days"] is not None:
        days, hours, minutes, seconds = (int(match[part] or 0) for part in ("days", "dh", "dm", "ds"))
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    parts = [int(part) for part in match["parts"].split(":")]
    hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return (hours * 60 + minutes) * 60 + seconds


def memory_mib(text: str, *, key: str = "cluster.memory") -> float:
    """MiB of a Slurm memory size: a whole number and K, M, G or T (without: M). Raises ConfigError naming `key`."""
    match = _MEMORY.fullmatch(text)
    if match is None or not int(match[1]):
        raise ConfigError(f"{key}={text} is no memory size: write a whole number and K, M, G or T, e.g. 990000M")
    return int(match[1]) * _MIB[match[2]]
