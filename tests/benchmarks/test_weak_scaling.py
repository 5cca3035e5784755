"""Weak scaling: what efficiency is, that predictions fit their devices and are called predictions, and that it runs."""

import json
from pathlib import Path

import pytest

from benchmarks.weak_scaling import AXES, SPOKEN, efficiency, layout_of, main
from benchmarks.weak_scaling_predicted import GPUS, PREDICTIONS, fits, read_model, smallest
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.machine import machine_of


def test_efficiency_is_against_the_cores_there_are() -> None:
    alone = [[(1.0, 1.0), (1.0, 1.0), (9.0, 1.0)]]
    four = [[(2.0, 1.25), (2.5, 1.25), (2.0, 1.25)] for _ in range(4)]  # the slowest rank of a step counts
    found = efficiency(four, alone, tokens=100, cores=2)
    assert found["ranks"] == 4
    assert found["tokens_per_second"] == 200  # 4 x 100 in 2 s
    assert found["wall_efficiency"] == 1.0  # twice as fast as one, on two cores
    assert found["cpu_efficiency"] == 0.8
    assert efficiency(four, alone, tokens=100, cores=8)["wall_efficiency"] == 0.5


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("ranks", [2, 8])
def test_each_rank_has_the_work_of_one_alone(axis: str, ranks: int) -> None:
    alone, many = (ParallelLayout.resolve(layout_of(axis, count)) for count in (1, ranks))
    assert many.world_size == ranks
    assert many.global_batch_size == ranks * alone.global_batch_size


@pytest.mark.parametrize("case", PREDICTIONS, ids=lambda case: case.title)
def test_predicted_layouts_fit(case: object) -> None:
    model = read_model(case.model)  # type: ignore[attr-defined]
    machine = machine_of("a100-sxm-40gb", inter_node_gb_per_second=case.inter_node_gb_per_second)  # type: ignore[attr-defined]
    gpus, layout, engine = smallest(case, model, machine)  # type: ignore[arg-type]
    assert layout.world_size == gpus
    assert gpus in GPUS
    assert layout.tensor <= machine.gpus_per_node
    assert fits(model, layout, machine, engine)


def test_the_command_keeps_measured_and_predicted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weak.svg"
    assert main(["--quick", "-o", str(path)]) == 0
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert list(result["measured"]) == [SPOKEN[axis] for axis in AXES]
    efficiencies = [point["cpu_efficiency"] for points in result["measured"].values() for point in points]
    assert result["ratio"] == min(efficiencies)
    for case in result["predicted"].values():
        assert case["points"][0]["efficiency"] == 1
        assert all(0 < point["efficiency"] <= 1.01 for point in case["points"])
    assert said.index("MEASURED") < said.index("PREDICTED, not measured")
    assert said.count("PREDICTED, not measured") == len(PREDICTIONS)
    picture = path.read_text(encoding="utf-8")
    assert "MEASURED" in picture
    assert "nobody ran these" in picture
