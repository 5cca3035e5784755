"""Does a run fit its GPUs? Asked before a launch, which is refused if not, and by sweeps, which leave such points out."""

from dataclasses import dataclass
from pathlib import Path

from launch.sae_plan import refuse_oversized_saes
from steerscale.errors import ConfigError
from steerscale.planning.cluster import ClusterConfig
from steerscale.planning.fit import Fit
from steerscale.planning.hardware import find_device
from steerscale.planning.layouts import Plan, plan_layouts, plan_one
from steerscale.planning.machine import Machine, machine_of, machine_of_cluster
from steerscale.planning.search import Task
from steerscale.train.config import RunConfig

NVIDIA = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the planner says of a run."""

    machine: Machine
    """The GPUs it was held against."""
    fit: Fit
    """Memory of the fullest rank by part."""
    seconds_per_iteration: float | None
    """Predicted; None in fp32, for which no peak is known."""

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits."""
        return self.fit.fits


def does_it_fit(config: RunConfig, *, machine: Machine | None = None) -> Verdict | None:
    """Hold a checked run against its GPUs; None where they are not known, there are none, or sparse autoencoders are trained,
    which the planner knows nothing of.

    Args:
        config: with a known vocabulary and a layout that fits the model.
        machine: None: that of the cluster for launcher=slurm and for a dry run, this machine's GPUs for launcher=local.
    """
    machine = machine or machine_of_run(config)
    if machine is None or config.sae is not None:
        return None
    plan = plan_run(config, machine)
    known = config.engine.precision != "fp32"
    return Verdict(machine=machine, fit=plan.fit, seconds_per_iteration=plan.time.total if known else None)


def machine_of_run(config: RunConfig) -> Machine | None:
    """The GPUs that a run will have, if they are known."""
    if config.launcher.name == "local":
        device = local_device()
        return None if device is None else machine_of(device)
    cluster: ClusterConfig | None = config.cluster
    return None if cluster is None or cluster.device is None else machine_of_cluster(cluster)


def local_device(directory: Path | None = None) -> str | None:
    """Name of this machine's GPUs as the driver tells it, without importing torch; None: no GPU, several kinds, or unknown."""
    names = set()
    for path in (directory or NVIDIA).glob("*/information"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        names |= {line.partition(":")[2].strip() for line in lines if line.startswith("Model:")}
    (name, *others) = names or {""}
    return name if not others and find_device(name) is not None else None


def refuse_oversized(config: RunConfig) -> None:
    """Raise ConfigError if the run cannot fit its GPUs, unless launcher.force=true."""
    if config.launcher.force:
        return
    if config.sae is not None:
        if (machine := machine_of_run(config)) is not None:
            refuse_oversized_saes(config, machine)
        return
    verdict = does_it_fit(config)
    if verdict is None or verdict.fits:
        return
    fit, machine = verdict.fit, verdict.machine
    raise ConfigError(
        f"{config.layout()} with engine.recompute={config.engine.recompute} does not fit {machine.name} of "
        f"{fit.device_gib:g} GiB: {fit.over_gib:,.1f} GiB too much ({fit.spoken_parts()} GiB). {_advice(config, machine)}; "
        "launcher.force=true starts it all the same"
    )


def _advice(config: RunConfig, machine: Machine) -> str:
    task = _task(config, machine)
    plans = plan_layouts(task).plans
    if not plans:
        return (
            f"No layout of this model fits {task.gpus} of them at a global batch of {task.global_batch_size}: use more GPUs "
            "(parallel.data, .tensor, .pipeline) or a smaller model or sequence"
        )
    now = set(plan_run(config, machine).overrides())
    changes = [[text for text in plan.overrides() if text not in now] for plan in plans]
    # The fewest changes, and among those the fastest: plans come in the order of their times.
    return f"What would fit: {' '.join(min(changes, key=len))}; the fastest: {' '.join(changes[0])}"


def plan_run(config: RunConfig, machine: Machine) -> Plan:
    """Memory and predicted time of a checked run with a known vocabulary, on these GPUs."""
    return plan_one(_task(config, machine), config.layout(), config.engine)


def _task(config: RunConfig, machine: Machine) -> Task:
    layout = config.layout()
    return Task(
        model=config.model,
        global_batch_size=layout.global_batch_size,
        gpus=layout.world_size,
        machine=machine,
        engine=config.engine,
    )
