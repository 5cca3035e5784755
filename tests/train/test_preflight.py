"""The preflight on real ranks, one of them made slow; what is made of figures; a run that is refused."""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.memory import estimate_memory
from steerscale.rundir import read_errors, read_status
from steerscale.testing.ranks import RankPool
from steerscale.train import preflight
from steerscale.train.config import LauncherConfig
from steerscale.train.preflight import EFFORTS, PREFLIGHT, is_due, measure
from steerscale.train.preflight_report import RankResult, disagreements, find_slow, short_of_memory, summary
from tests.train.runs import prepare, run_config, train

SLOW_SECONDS = 0.2
"""Of a matrix product that otherwise takes a millisecond."""


def result(rank: int, *, gemm: float = 10.0, free: float = 30.0, torch: str = "2.8", **speeds: float) -> RankResult:
    """A rank of a run on four ranks: TP2 DP2, two to a host."""
    groups = {"tp": [rank // 2 * 2, rank // 2 * 2 + 1], "dp": [rank % 2, rank % 2 + 2], "world": [0, 1, 2, 3]}
    return RankResult(
        rank=rank,
        host=f"n{rank // 2}",
        device=f"NVIDIA A100-SXM4-40GB {rank % 2}",
        gemm_tflops=gemm,
        gb_per_second={"tp": 100.0, "dp": 20.0, "world": 15.0, **speeds},
        groups=groups,
        memory_free_gib=free,
        memory_total_gib=40.0,
        versions={"torch": torch},
    )


def measured(slow_rank: int | None) -> dict[str, Any]:
    """On each rank: what it finds, where the products of one rank take long."""
    product = torch.mm

    def late(*args: Any, **settings: Any) -> torch.Tensor:
        time.sleep(SLOW_SECONDS)
        return product(*args, **settings)

    layout = ParallelLayout(tensor=2, pipeline=2)
    with initialize(layout) as context:
        if context.rank == slow_rank:
            torch.mm = late
        try:
            found = measure(context, EFFORTS["cpu"])
        finally:
            torch.mm = product
    return {"result": found, "at": context.at}


def train_slowly(run_dir: Path, called_slow: float = EFFORTS["cpu"].slow) -> None:
    """Train on ranks of which the second is slow; less than `called_slow` of the median is warned of."""
    import torch.distributed as dist

    product, effort = torch.mm, EFFORTS["cpu"]

    def late(*args: Any, **settings: Any) -> torch.Tensor:
        time.sleep(SLOW_SECONDS)
        return product(*args, **settings)

    if dist.get_rank() == 1:
        torch.mm = late
    EFFORTS["cpu"] = replace(effort, slow=called_slow)
    try:
        train(run_dir)
    finally:
        torch.mm, EFFORTS["cpu"] = product, effort


def test_a_slow_rank_is_named(pool: RankPool) -> None:
    answers = pool.run(measured, 2, ranks=4)
    results = [answer["result"] for answer in answers]
    assert [one.rank for one in results] == [0, 1, 2, 3]
    assert results[0].groups == {"tp": [0, 1], "pp": [0, 2], "world": [0, 1, 2, 3]}
    assert results[3].groups == {"tp": [2, 3], "pp": [1, 3], "world": [0, 1, 2, 3]}
    for one in results:
        assert all(speed > 0 for speed in one.gb_per_second.values())
        assert 0 < one.memory_free_gib < one.memory_total_gib
        assert one.versions["torch"] == torch.__version__
    # Two of the others may be slow for a moment: the machine is shared.
    slowest = min(find_slow(results, below=0.5), key=lambda entry: entry.share)
    assert slowest.ranks == [2]
    assert f"{results[2].host}, CPU (rank 2)" in slowest.what
    assert slowest.share < 0.2


def test_slow_ranks_and_groups_are_those_below_the_median() -> None:
    fast = [result(rank) for rank in range(4)]
    assert find_slow(fast, below=0.85) == []
    # A group's members wait for each other: whatever one of them measured holds for it.
    mixed = [result(0), result(1, gemm=8.4), result(2, tp=40.0), result(3)]
    slow = find_slow(mixed, below=0.85)
    assert [(entry.ranks, round(entry.share, 2)) for entry in slow] == [([1], 0.84), ([2, 3], 0.57)]
    assert "n0, NVIDIA A100-SXM4-40GB 1 (rank 1) at 8.4 TFLOP/s" in slow[0].what
    assert slow[1].what == "the tp group of ranks 2, 3 on n1 at 40 GB/s"
    across = [result(rank, dp=5.0 if rank % 2 else 20.0) for rank in range(4)]
    assert [entry.what for entry in find_slow(across, below=0.85)] == ["the dp group of ranks 1, 3 on n0, n1 at 5 GB/s"]


def test_the_summary_has_the_share_of_the_peak() -> None:
    first, second = summary([result(rank, gemm=234.0) for rank in range(4)], seconds=1.5)
    assert (
        "preflight of 4 ranks on 2 hosts in 1.50 s: products 234 to 234 TFLOP/s (median 234, 75% of the peak)" in first
    )
    assert first.endswith("tp 100 to 100, dp 20 to 20, world 15 to 15")
    assert second == "least free memory 30.0 GiB; torch 2.8"


def test_too_little_memory_and_other_libraries_are_told() -> None:
    results = [result(0), result(1, free=3.0), result(2, torch="2.7"), result(3)]
    (text,) = short_of_memory(results, planned_gib=20.0, on_cpu=False)
    assert text.startswith("n0, NVIDIA A100-SXM4-40GB 1 (rank 1) has 3.0 of 40.0 GiB free, the plan needs 20.0")
    assert short_of_memory(results, planned_gib=None, on_cpu=False) == []
    # Both ranks of a host need theirs from the same memory.
    assert [text[:2] for text in short_of_memory([result(0), result(1)], planned_gib=20.0, on_cpu=True)] == ["n0"]
    assert short_of_memory([result(0), result(1)], planned_gib=14.0, on_cpu=True) == []
    (text,) = disagreements(results)
    assert text == "n1, NVIDIA A100-SXM4-40GB 0 (rank 2) has torch 2.7, 3 of 4 ranks have 2.8"


def test_it_is_due_on_several_nodes_and_where_it_is_asked_for(
    german_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    config = run_config(german_data, tmp_path)
    asked = run_config(german_data, tmp_path, launcher=LauncherConfig(preflight=True))
    with initialize(config.layout()) as context:
        assert not is_due(config, context)
        assert is_due(asked, context)
    two = ParallelLayout(data=2)
    with initialize(two, backend="fake", rank=0, device="meta") as context:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        assert is_due(config, context)
        assert not is_due(run_config(german_data, tmp_path, launcher=LauncherConfig(preflight=False)), context)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert not is_due(config, context)


def test_a_run_begins_with_it_and_leaves_its_figures(german_data: Path, tmp_path: Path, pool: RankPool) -> None:
    launcher = LauncherConfig(preflight=True)
    config = run_config(german_data, tmp_path / "run", parallel={"data": 2}, launcher=launcher)
    pool.run(train_slowly, prepare(config), ranks=2)
    assert read_status(tmp_path / "run").state == "finished"
    content = json.loads((tmp_path / "run" / PREFLIGHT).read_text(encoding="utf-8"))
    assert [entry["rank"] for entry in content["ranks"]] == [0, 1]
    assert content["ranks"][1]["gemm_tflops"] < 0.5 * content["ranks"][0]["gemm_tflops"]
    assert set(content["ranks"][0]["gb_per_second"]) == {"dp", "world"}
    assert any("rank 1" in warning and "every step waits for it" in warning for warning in content["warnings"])
    planned = estimate_memory(config.model, config.layout(), engine=config.engine).total_gib
    assert content["planned_gib"] == planned
    assert set(content["fused_kernels"]) == {"Apex", "Transformer Engine", "Liger", "flash-attention"}
    assert content["seconds"] > 0


@pytest.mark.parametrize("called_slow", [0.5, 0.0])
def test_a_run_on_a_slow_rank_is_refused_where_that_is_asked_for(
    german_data: Path, tmp_path: Path, pool: RankPool, called_slow: float
) -> None:
    launcher = LauncherConfig(preflight=True, preflight_least=0.3)
    config = run_config(german_data, tmp_path / "run", parallel={"data": 2}, launcher=launcher)
    with pytest.raises(RuntimeError, match=r"LaunchError: preflight: .*rank 1"):
        pool.run(train_slowly, prepare(config), called_slow, ranks=2)
    (error, *_) = read_errors(tmp_path / "run")
    assert error["user_error"]
    assert "launcher.preflight_least=0.3" in error["message"]
    assert (tmp_path / "run" / PREFLIGHT).is_file()


def test_a_full_disk_does_not_end_the_run(
    german_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError("no space")

    monkeypatch.setattr(preflight, "write_text", full)
    config = run_config(german_data, tmp_path)
    with initialize(config.layout()) as context, caplog.at_level(logging.INFO, logger="steerscale"):
        preflight.run_preflight(config, context, tmp_path)
    assert "was not written: no space" in caplog.text
    assert "preflight of 1 ranks on 1 host" in caplog.text
