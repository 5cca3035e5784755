"""What an iteration's time depends on beside the run: devices, their links, and how much of both programs reach."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from steerscale.config import from_mapping, load_yaml, require
from steerscale.errors import ConfigError
from steerscale.planning.cluster import ClusterConfig
from steerscale.planning.hardware import DEVICES, Precision, find_device

ALIASES = {
    "a100-40gb": "a100-sxm-40gb",
    "a100-80gb": "a100-sxm-80gb",
    "a100": "a100-sxm-80gb",
    "h100": "h100-sxm",
    "h100-80gb": "h100-sxm",
}
"""Short names on the command line; a PCIe card is asked for by its whole name."""

LINK_GB_PER_SECOND = {
    # Vendors' datasheets, one direction a GPU, 1e9 bytes/s: NVLink 3 (600 in both), NVLink 4 (900), PCIe 4 and 5 x16.
    "a100-sxm-40gb": 300.0,
    "a100-sxm-80gb": 300.0,
    "h100-sxm": 450.0,
    "h200": 450.0,
    "a100-pcie-40gb": 32.0,
    "a100-pcie-80gb": 32.0,
    "h100-pcie": 64.0,
}
GPUS_PER_NODE = 8
NIC_GB_PER_SECOND = 25.0
"""One direction a GPU where no cluster says otherwise: one 200 Gb/s port for each, as in NVIDIA's DGX A100."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of datasheet figures that programs reach, and fixed costs; what `steerscale plan --calibrate` fits."""

    matmul: float = 0.88
    """Of the peak, in a matrix product without its memory traffic; 0.88 is fitted to the A100 figures of SC21 and arXiv
    2205.05198 (benchmarks/planner_accuracy.py) and only assumed of other devices."""
    attention: float = 0.5
    """Of the peak, in a fused attention kernel (FlashAttention-2, arXiv 2307.08691, reports 0.5 to 0.73)."""
    memory: float = 0.80
    """Of the memory bandwidth, in norms, activation functions, softmax and the optimizer."""
    network: float = 0.75
    """Of a link's bandwidth, in collectives and sends."""
    layer_seconds: float = 0.0
    """Fixed cost of a layer's forward pass (twice that for its backward pass): launching kernels, Python."""
    collective_seconds: float = 20e-6
    """Fixed cost of a collective or a send."""

    def __post_init__(self) -> None:
        for name in ("matmul", "attention", "memory", "network"):
            require(getattr(self, name) > 0, f"efficiency.{name} must be positive, got {getattr(self, name)}")
        for name in ("layer_seconds", "collective_seconds"):
            require(getattr(self, name) >= 0, f"efficiency.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Equal devices in equal nodes. What `steerscale plan --calibration` reads and `--calibrate` writes."""

    name: str
    """For people: a device's name, or that of a cluster."""
    peak_tflops: float
    """Dense peak of one device in the precision of the run, 1e12 FLOP/s."""
    knows_peak: bool = True
    """False: nobody knows the peak, the figure only scales `efficiency.matmul`, and there is no MFU."""
    memory_gib: float
    """Memory of one device as sold."""
    bandwidth_gb_per_second: float
    """Memory bandwidth of one device."""
    gpus_per_node: int = GPUS_PER_NODE
    """Devices that share the fast link."""
    intra_node_gb_per_second: float
    """Between devices of a node, each, in one direction."""
    inter_node_gb_per_second: float = NIC_GB_PER_SECOND
    """Out of a node, a device's share of it, in one direction."""
    overlaps: bool = True
    """Whether communication can run beside computation; false for ranks on a CPU."""
    efficiency: Efficiency = field(default_factory=Efficiency)
    """What is reached of all this."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                require(value > 0, f"machine.{spec.name} must be positive, got {value}")


def device_key(name: str) -> str:
    """The name in `DEVICES` that a user's name means. Raises ConfigError with the known ones."""
    key = ALIASES.get(name.lower(), name.lower())
    if key in DEVICES:
        return key
    device = find_device(name)
    for known, other in DEVICES.items():
        if device is other:
            return known
    raise ConfigError(
        f"unknown GPU {name!r}: known are {', '.join([*DEVICES, *ALIASES])}; for another one measure a few runs and give "
        "their --calibration FILE (steerscale plan --calibrate RUNS)"
    )


def machine_of(
    device: str,
    *,
    precision: Precision = "bf16",
    name: str | None = None,
    gpus_per_node: int | None = None,
    intra_node_gb_per_second: float | None = None,
    inter_node_gb_per_second: float | None = None,
) -> Machine:
    """The machine of a device by its datasheet; what is None is taken from `GPUS_PER_NODE`, the link, the port.

    Raises ConfigError for an unknown device, and for fp32: whether TF32 is allowed decides about its peak.
    """
    key = device_key(device)
    known = DEVICES[key]
    if precision == "fp32":
        raise ConfigError(
            f"no {precision} peak is known for {key}: plan with precision bf16, or give a --calibration FILE of fp32 runs"
        )
    return Machine(
        name=name or key,
        peak_tflops=known.bf16_tflops,
        memory_gib=known.memory_gib,
        bandwidth_gb_per_second=known.bandwidth_gb_per_second,
        gpus_per_node=gpus_per_node or GPUS_PER_NODE,
        intra_node_gb_per_second=intra_node_gb_per_second or LINK_GB_PER_SECOND[key],
        inter_node_gb_per_second=inter_node_gb_per_second or NIC_GB_PER_SECOND,
    )


def machine_of_cluster(
    cluster: ClusterConfig, *, device: str | None = None, precision: Precision = "bf16", notes: list[str] | None = None
) -> Machine:
    """The machine of a cluster profile. Where the profile does not know a link, the datasheet's or a usual one is taken and
    a sentence about it added to `notes`.

    Raises ConfigError if neither the profile nor `device` says which GPUs it has.
    """
    name = device or cluster.device
    if name is None:
        raise ConfigError(f"cluster {cluster.name} does not say which GPUs it has: set cluster.device, or give --gpu")
    machine = machine_of(
        name,
        precision=precision,
        name=f"{device_key(name)} ({cluster.name})",
        gpus_per_node=cluster.gpus_per_node,
        intra_node_gb_per_second=cluster.intra_node_gb_per_second,
        inter_node_gb_per_second=cluster.inter_node_gb_per_second,
    )
    for key in ("intra_node_gb_per_second", "inter_node_gb_per_second"):
        if getattr(cluster, key) is None and notes is not None:
            notes.append(f"{getattr(machine, key):g} GB/s for cluster.{key}, which the profile leaves open")
    return machine


def group_bandwidth(machine: Machine, *, size: int, stride: int) -> float:
    """GB/s a device has in a ring over `size` ranks, `stride` apart; the ports of its members in a node add up.

    Ranks fill nodes in order. Of a group of d ranks, t apart, g/t share a node of g: a ring enters and leaves the node
    once whoever its members are, so that all their ports carry it, while the other groups of the node use their own.
    """
    together = max(machine.gpus_per_node // stride, 1)
    if together >= size:
        return machine.intra_node_gb_per_second
    return min(machine.intra_node_gb_per_second, machine.inter_node_gb_per_second * together)


def read_calibration(path: Path) -> Machine:
    """A machine with fitted efficiency, as `--calibrate` wrote it. Raises ConfigError if it is something else."""
    content = load_yaml(path)
    content.pop("fitted", None)  # which runs it was fitted to, and how well: for people
    return from_mapping(Machine, content, at=str(path))


def machine_mapping(machine: Machine) -> dict:
    """Plain values that `read_calibration` takes."""
    return asdict(machine)
