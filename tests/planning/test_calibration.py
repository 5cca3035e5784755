from dataclasses import replace

import pytest

from steerscale.engines.config import EngineConfig
from steerscale.errors import ConfigError
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.calibration import Measurement, calibrate, predicted_memory_gib, predicted_seconds
from steerscale.planning.machine import Efficiency, machine_of
from steerscale.planning.memory import estimate_memory
from steerscale.planning.search import Task
from tests.planning.shapes import gpt3

H200 = machine_of("h200")
MODEL = gpt3(24, 2048)


def measurements(efficiency: Efficiency) -> list[Measurement]:
    """What a machine of this efficiency would have measured."""
    truth = replace(H200, efficiency=efficiency)
    runs = []
    for tensor, pipeline, size in (
        (1, 1, 1),
        (1, 1, 8),
        (8, 1, 2),
        (4, 1, 4),
        (2, 4, 2),
        (1, 2, 4),
        (8, 1, 8),
        (2, 1, 4),
    ):
        data = 8 // (tensor * pipeline)
        layout = ParallelLayout(
            tensor=tensor,
            pipeline=pipeline,
            data=data,
            micro_batch_size=size,
            gradient_accumulation_steps=64 // (data * size),
        )
        task = Task(model=MODEL, global_batch_size=64, gpus=8, machine=H200)
        run = Measurement(name=f"{layout}", task=task, layout=layout, seconds=1.0)
        runs.append(replace(run, seconds=predicted_seconds(truth, run)))
    return runs


def test_calibrate_finds_the_constants_back() -> None:
    truth = Efficiency(matmul=0.55, network=0.4, layer_seconds=2e-3)
    result = calibrate(H200, measurements(truth), constants=("matmul", "network", "layer_seconds"))
    found = result.machine.efficiency
    assert found.matmul == pytest.approx(0.55, rel=0.05)
    assert found.network == pytest.approx(0.4, rel=0.1)
    assert found.layer_seconds == pytest.approx(2e-3, rel=0.05)
    assert found.memory == Efficiency().memory
    assert result.largest_error < 0.02
    assert result.mean_error <= result.largest_error


def test_few_runs_fit_few_constants() -> None:
    runs = measurements(Efficiency(matmul=0.5))
    assert calibrate(H200, runs[:1]).fitted == ["matmul"]
    assert calibrate(H200, runs[:4]).fitted == ["matmul", "network"]
    one = calibrate(H200, runs[1:2]).machine.efficiency
    assert one.matmul == pytest.approx(0.5, rel=0.02)
    assert one.network == Efficiency().network


def test_calibrate_needs_a_measured_time() -> None:
    with pytest.raises(ConfigError, match="no run has a measured time"):
        calibrate(H200, [])


def test_predicted_memory_is_the_estimate() -> None:
    run = measurements(Efficiency())[0]
    estimate = estimate_memory(MODEL, run.layout, engine=EngineConfig(precision="bf16"))
    assert predicted_memory_gib(run) == estimate.total_gib
