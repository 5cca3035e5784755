"""`steerscale plan --calibrate`: run directories -> measurements -> a file with fitted efficiency."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from steerscale.config import from_mapping, require
from steerscale.dashboard.runs import read_run
from steerscale.errors import ConfigError
from steerscale.planning.calibration import Calibration, Measurement, calibrate, predicted_memory_gib, predicted_seconds
from steerscale.planning.machine import Machine, machine_mapping
from steerscale.planning.search import Task
from steerscale.rundir import write_text
from steerscale.train.config import RunConfig


def calibrate_from_runs(runs: Sequence[Path], *, machine: Machine | None, output: Path) -> str:
    """Fit `machine` (None: this machine's CPU) to run directories, write `output`, and say how well it fits.

    Raises ConfigError if a directory is no run, or none has a measured time.
    """
    require(output.parent.is_dir(), f"-o {output}: {output.parent} is no directory; create it first")
    machine = machine or this_cpu()
    measured = [run for path in runs if (run := read_measurement(path, machine)) is not None]
    result = calibrate(machine, measured)
    content: dict[str, Any] = machine_mapping(result.machine)
    content["fitted"] = {
        "constants": result.fitted,
        "mean_error": round(result.mean_error, 4),
        "largest_error": round(result.largest_error, 4),
        "runs": [run.name for run in measured],
    }
    try:
        write_text(output, yaml.safe_dump(content, sort_keys=False))
    except OSError as error:
        raise ConfigError(f"-o {output} cannot be written: {error}") from error
    return (
        f"{_table(measured, result)}\n{output}: {', '.join(result.fitted)} fitted to {len(measured)} runs; use it with "
        f"--calibration {output}"
    )


def read_measurement(run_dir: Path, machine: Machine) -> Measurement | None:
    """What a run directory says about its iterations: the median of its reports since the last start, which may be of another
    layout than earlier ones; None if it has no timed step, or trained sparse autoencoders."""
    run = read_run(run_dir)
    config = from_mapping(RunConfig, run.config)
    if config.sae is not None:
        return None
    layout, engine = config.layout(), config.engine
    records = [
        record
        for record in run.train
        if (record.get("seconds_per_step") or 0) > 0 and record.get("global_batch_size") == layout.global_batch_size
    ]
    if not records:
        return None
    peaks = [record["memory_peak_gib_max"] for record in records if record.get("memory_peak_gib_max")]
    return Measurement(
        name=str(run_dir),
        task=Task(
            model=config.model,
            global_batch_size=layout.global_batch_size,
            gpus=layout.world_size,
            machine=machine,
            engine=engine,
        ),
        layout=layout,
        seconds=statistics.median(record["seconds_per_step"] for record in records),
        memory_gib=max(peaks, default=None),
    )


def this_cpu() -> Machine:
    """This machine's cores as devices, for runs without a GPU.

    Nobody knows the peak of a core: any number will do, since the fitted share of it is what counts.
    """
    cores = os.cpu_count() or 1
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine(
        name="cpu",
        peak_tflops=0.1,
        knows_peak=False,
        memory_gib=there / cores,
        bandwidth_gb_per_second=20.0,
        gpus_per_node=cores,
        intra_node_gb_per_second=5.0,
        inter_node_gb_per_second=1.0,
        overlaps=False,
    )


def _table(runs: Sequence[Measurement], result: Calibration) -> str:
    lines = [f"{'measured s':>11}{'predicted s':>13}{'error':>8}{'peak GiB':>10}{'predicted':>11}  run"]
    for run, error in zip(runs, result.errors):
        seconds = predicted_seconds(result.machine, run)
        peak = "-" if run.memory_gib is None else f"{run.memory_gib:.2f}"
        lines.append(
            f"{run.seconds:>11.4g}{seconds:>13.4g}{error:>+8.1%}{peak:>10}"
            f"{predicted_memory_gib(run):>11.2f}  {run.name}: {run.layout}"
        )
    return "\n".join([*lines, f"mean error {result.mean_error:.1%}, largest {result.largest_error:.1%}"])
