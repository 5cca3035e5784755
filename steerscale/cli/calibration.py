"""`steerscale plan --calibrate`: run directories -> measurements -> a file with fitted efficiency."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from steerscale.config import from_mapping
from steerscale.metrics import read_records
from steerscale.planning.calibration import Calibration, Measurement, calibrate, predicted_memory_gib, predicted_seconds
from steerscale.planning.machine import Machine, machine_mapping
from steerscale.planning.search import Task
from steerscale.rundir import read_config
from steerscale.train.config import RunConfig


def calibrate_from_runs(runs: Sequence[Path], *, machine: Machine | None, output: Path) -> str:
    """Fit `machine` (None: this machine's CPU) to run directories, write `output`, and say how well it fits.

    Raises ConfigError if a directory is no run, or none has a measured time.
    """
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
    output.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return (
        f"{_table(measured, result)}\n{output}: {', '.join(result.fitted)} fitted to {len(measured)} runs; use it with "
        f"--calibration {output}"
    )


def read_measurement(run_dir: Path, machine: Machine) -> Measurement | None:
    """What a run directory says about its iterations: the median of its records; None if it has no timed step, or trained
    sparse autoencoders."""
    config = from_mapping(RunConfig, read_config(run_dir))
    if config.sae is not None:
        return None
    layout, engine = config.layout(), config.engine
    records = [
        record
        for record in read_records(run_dir, "train")
        if record.get("seconds_per_step") and record.get("global_batch_size") == layout.global_batch_size
    ]
    if not records:
        return None
    peaks = [record["memory_peak_gib_max"] for record in records if record.get("memory_peak_gib_max")]
    return Measurement(
        name=run_dir.name,
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
        memory_gib=there / cores,
        bandwidth_gb_per_second=20.0,
        gpus_per_node=cores,
        intra_node_gb_per_second=5.0,
        inter_node_gb_per_second=1.0,
        overlaps=False,
    )


def _table(runs: Sequence[Measurement], result: Calibration) -> str:
    lines = [f"{'measured s':>11}{'predicted s':>13}{'error':>8}{'peak GiB':>10}{'predicted':>11}  run"]
    for run in runs:
        seconds = predicted_seconds(result.machine, run)
        peak = "-" if run.memory_gib is None else f"{run.memory_gib:.2f}"
        lines.append(
            f"{run.seconds:>11.4g}{seconds:>13.4g}{result.errors[run.name]:>+8.1%}{peak:>10}"
            f"{predicted_memory_gib(run):>11.2f}  {run.name}: {run.layout}"
        )
    return "\n".join([*lines, f"mean error {result.mean_error:.1%}, largest {result.largest_error:.1%}"])
