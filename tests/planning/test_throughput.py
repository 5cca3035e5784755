from dataclasses import asdict

import pytest

from steerscale.errors import ConfigError
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.throughput import FORMULAS, throughput
from tests.planning.shapes import SWIGLU, gpt3


def test_throughput_by_hand() -> None:
    # 2 x 3 x 5 = 30 sequences of 16 tokens on 2 x 2 x 3 = 12 ranks in 4 s: 10 tokens/s a rank
    layout = ParallelLayout(tensor=2, pipeline=2, data=3, micro_batch_size=2, gradient_accumulation_steps=5)
    record = throughput(4.0, model=SWIGLU, layout=layout, recompute="selective", peak_tflops=1e-6)
    assert record.samples_per_second == 7.5
    assert record.tokens_per_second_per_gpu == 10
    # FLOPs a token: worked out in test_flops
    assert record.model_tflops_per_gpu == pytest.approx(159360e-12)
    assert record.hardware_tflops_per_gpu == pytest.approx(183040e-12)
    assert record.mfu == pytest.approx(0.15936)
    assert record.hfu == pytest.approx(0.18304)
    assert record.peak_tflops == 1e-6
    # 32 x 4 L h^2 (1 + 16/48 + 128/256) a token, L h^2 = 128
    assert record.legacy_tflops_per_gpu == pytest.approx(10 * 128 * 128 * (1 + 1 / 3 + 1 / 2) * 1e-12)


def test_throughput_without_a_peak_has_no_utilisation() -> None:
    record = throughput(4.0, model=SWIGLU, layout=ParallelLayout(), recompute="none", peak_tflops=None)
    assert (record.peak_tflops, record.mfu, record.hfu) == (None, None, None)
    assert record.model_tflops_per_gpu > 0


@pytest.mark.parametrize(("data", "seconds"), [(2, 24.9), (4, 49.9), (8, 99.8)])
def test_a_legacy_tag_of_150_on_16_gpus(data: int, seconds: float) -> None:
    # 6.7B, GAS 128, MBS 2: one tag, 2,627 tokens/s/GPU, whatever the split into replicas
    layout = ParallelLayout(tensor=16 // data, data=data, micro_batch_size=2, gradient_accumulation_steps=128)
    record = throughput(seconds, model=gpt3(32, 4096), layout=layout, recompute="full", peak_tflops=312)
    assert record.legacy_tflops_per_gpu == pytest.approx(150, rel=0.003)
    assert record.tokens_per_second_per_gpu == pytest.approx(2627, rel=0.003)
    assert record.model_tflops_per_gpu == pytest.approx(150 / 1.375, rel=0.003)


def test_recomputation_raises_hardware_figures_only() -> None:
    none, full = (
        throughput(1.0, model=gpt3(24, 2048), layout=ParallelLayout(), recompute=mode, peak_tflops=312)
        for mode in ("none", "full")
    )
    assert none.model_tflops_per_gpu == full.model_tflops_per_gpu == none.hardware_tflops_per_gpu
    assert full.hardware_tflops_per_gpu > 1.2 * none.hardware_tflops_per_gpu


def test_every_figure_has_a_formula() -> None:
    record = throughput(1.0, model=SWIGLU, layout=ParallelLayout(), recompute="none", peak_tflops=None)
    assert set(FORMULAS) == set(asdict(record)) - {"peak_tflops"}


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_throughput_refuses_impossible_times(seconds: float) -> None:
    with pytest.raises(ConfigError, match="seconds_per_iteration must be positive"):
        throughput(seconds, model=SWIGLU, layout=ParallelLayout(), recompute="none", peak_tflops=None)
