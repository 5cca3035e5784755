"""The benchmark of one GPU on the CPU: every side runs and learns the same, cases fit the devices they are made for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpt_cpu_sides import write_data
from benchmarks.gpt_gpu import LOSSES_DIFFER, main
from benchmarks.gpt_gpu_cases import SHAPES, Blocks, Case, largest, make_case, planned_gib, tiny_cases
from benchmarks.gpt_gpu_sides import SIDES, run_side
from benchmarks.gpt_overhead import Size
from steerscale.planning.fit import usable_gib
from steerscale.testing.ranks import RankPool

H100_GIB = 79.1
NOT_COMPILED = [name for name in SIDES if name != "ours_compiled"]  # tests/parity/test_compile.py has that on the CPU
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/gpu_suite.py runs it on the GPU")


def losses_of(name: str, case: Case, directory: Path) -> dict[str, Any]:
    """On a rank: one side."""
    size = Size(case.model, case.micro_batches, case.micro_batch_size)
    write_data(directory / f"{name}-data", size, steps=case.total_steps)
    return run_side(name, case, directory / f"{name}-data", directory / name)


@on_cpu
def test_all_sides_learn_the_same(pool: RankPool, tmp_path: Path) -> None:
    (case,) = tiny_cases()
    figures = {name: pool.run(losses_of, name, case, tmp_path, ranks=1)[0] for name in NOT_COMPILED}
    for found in figures.values():
        assert len(found["step_seconds"]) == case.steps
        assert len(found["losses"]) == case.total_steps
        assert found["losses"] == pytest.approx(figures["ours"]["losses"], rel=LOSSES_DIFFER)
    assert figures["ours"]["losses"][0] != figures["ours"]["losses"][1]


@on_cpu
def test_the_command_measures_a_side_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--sides", "megatron"]) == 0
    said = capsys.readouterr().out.splitlines()
    result = json.loads(said[-1])
    (entry,) = result["cases"].values()
    side = entry["sides"]["megatron"]
    assert side["tokens_per_second"] > 0
    assert side["mfu"] is None  # of a CPU nobody knows the peak
    assert result["ratio"] is None
    assert result["environment"]["device"] == "CPU"
    assert not entry["trouble"]


@on_cpu
def test_without_time_or_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--seconds", "1"]) == 0
    (entry,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"].values()
    assert all("left of --seconds" in side["skipped"] for side in entry["sides"].values())
    assert main([]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("blocks", ["llama", "gpt"])
@pytest.mark.parametrize("seq_len", [2048, 4096])
def test_cases_fit_their_device(blocks: Blocks, seq_len: int) -> None:
    settings: dict[str, Any] = {"seq_len": seq_len, "step_tokens": 65536, "most": 16384, "steps": 8, "warmup": 3}
    for size in (*SHAPES, "largest"):
        case = make_case(size, blocks, device_gib=H100_GIB, **settings)
        if size == "6.7b":
            assert case is None  # whole, it needs 120 GiB
            continue
        assert case is not None
        assert case.tokens == 65536
        assert case.planned_gib <= usable_gib(H100_GIB)
        rows = case.micro_batch_size
        assert 2 * rows * seq_len > 16384 or planned_gib(case.model, 2 * rows) > usable_gib(H100_GIB)
        assert rows == 1 or case.halved().tokens == case.tokens
    name, model = largest(blocks, seq_len, H100_GIB)
    assert name.startswith("6.7b-width x ")
    more = replace(model, num_layers=model.num_layers + 1)
    assert planned_gib(model, 1) <= usable_gib(H100_GIB) < planned_gib(more, 1)
