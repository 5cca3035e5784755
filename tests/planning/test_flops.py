from dataclasses import replace

import pytest

from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig, Recompute
from steerscale.planning.flops import (
    forward_flops_per_token,
    hardware_flops,
    hardware_flops_per_token,
    korthikanti_2022_hardware_flops,
    korthikanti_2022_model_flops,
    legacy_flops,
    model_flops,
    model_flops_per_token,
    narayanan_2021_hardware_flops,
    palm_flops_per_token,
)
from tests.planning.shapes import GELU, SWIGLU, TEUKEN_LIKE, gpt3

A100_PEAK = 312e12


def test_forward_flops_of_mha_and_gelu_by_hand() -> None:
    # a layer: QKV 8 x 24 = 192, output 8 x 8 = 64, MLP 2 x 8 x 32 = 512: 768 multiply-adds
    forward = forward_flops_per_token(GELU, vocab_size=100)
    assert forward.matrices == 2 * 2 * 768
    # a token sees 16/2 others on average: 8 x 8 for scores, 8 x 8 for values, a layer
    assert forward.attention == 2 * 2 * (64 + 64)
    assert forward.logits == 2 * 8 * 100
    assert forward.total == 3072 + 512 + 1600


def test_model_flops_of_gqa_swiglu_and_wide_heads_by_hand() -> None:
    # a layer: QKV 8 x (4 + 2 + 2) x 4 = 256, output 16 x 8 = 128, MLP 3 x 8 x 12 = 288: 672 multiply-adds, and
    # attention 16 x 16/2 twice = 256; head 8 x 100 = 800. Two FLOPs each, three passes:
    assert model_flops_per_token(SWIGLU) == 3 * 2 * (2 * (672 + 256) + 800)
    assert model_flops(SWIGLU, batch_size=3) == 3 * 16 * 15936


def test_hardware_flops_by_hand() -> None:
    # as above with 128 padded tokens: head 8 x 128 = 1024
    assert hardware_flops_per_token(SWIGLU, recompute="none") == 17280
    assert hardware_flops_per_token(SWIGLU, recompute="selective") == 17280 + 2 * 2 * 256
    assert hardware_flops_per_token(SWIGLU, recompute="full") == 17280 + 2 * 2 * (672 + 256)
    assert hardware_flops(SWIGLU, batch_size=3, recompute="none") == 3 * 16 * 17280


def test_model_flops_equal_the_closed_form() -> None:
    model = TEUKEN_LIKE
    layers, h, f, s = model.num_layers, model.d_model, model.ffn_width, model.seq_len
    closed = 6 * layers * (h**2 * (2 + 2 * 2 / 32) + 3 * h * f) + 6 * layers * h * s + 6 * h * 250680
    assert model_flops_per_token(model) == pytest.approx(closed, rel=1e-12)


def test_padding_of_the_vocabulary_is_hardware_work_only() -> None:
    padded = replace(GELU, pad_vocab_to=512)
    assert model_flops_per_token(padded) == model_flops_per_token(GELU)
    more = hardware_flops_per_token(padded, recompute="none") - hardware_flops_per_token(GELU, recompute="none")
    assert more == 6 * 8 * (512 - 128)


def test_model_flops_need_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match="vocab_size is not known"):
        model_flops(replace(GELU, vocab_size=None), batch_size=1)


@pytest.mark.parametrize(
    ("num_layers", "d_model", "batch_size", "num_gpus", "seconds", "mfu", "hfu"),
    [
        (48, 6144, 4, 8, 1.10, 41.5, 43.7),
        (96, 12288, 64, 64, 13.75, 51.4, 52.8),
        (105, 20480, 280, 280, 37.83, 56.0, 57.0),
        (128, 25600, 512, 512, 71.49, 56.3, 57.0),
    ],
    ids=["22B", "175B", "530B", "1T"],
)
def test_korthikanti_2022_table_5_is_reproduced(
    num_layers: int, d_model: int, batch_size: int, num_gpus: int, seconds: float, mfu: float, hfu: float
) -> None:
    model = gpt3(num_layers, d_model)
    available = seconds * num_gpus * A100_PEAK
    model_share = korthikanti_2022_model_flops(model, batch_size=batch_size) / available
    hardware = korthikanti_2022_hardware_flops(model, batch_size=batch_size, recompute="selective")
    assert 100 * model_share == pytest.approx(mfu, abs=0.3)
    assert 100 * hardware / available == pytest.approx(hfu, abs=0.3)


def test_korthikanti_2022_selective_is_the_printed_formula() -> None:
    # h = 16, s = 48: s/3h = 1; V = 384, L = 2: V/12hL = 1
    model = ModelConfig(num_layers=2, d_model=16, num_heads=2, seq_len=48, vocab_size=384)
    assert korthikanti_2022_hardware_flops(model, batch_size=5, recompute="selective") == 72 * 5 * 2 * 48 * 256 * 3
    assert korthikanti_2022_hardware_flops(model, batch_size=5, recompute="none") == 72 * 5 * 2 * 48 * 256 * 2.5


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_papers_count_the_masked_half_and_are_exact_otherwise(recompute: Recompute) -> None:
    model = gpt3(24, 2048)
    square = 4 * 2048**2 * 2048 * 24  # one forward pass over the whole attention square, one sequence
    if recompute == "full":
        excess = korthikanti_2022_hardware_flops(model, batch_size=1, recompute="full")
        excess -= hardware_flops(model, batch_size=1, recompute="full")
        assert excess == pytest.approx(4 * square / 2, rel=1e-9)
    else:
        excess = korthikanti_2022_model_flops(model, batch_size=1) - model_flops(model, batch_size=1)
        assert excess == pytest.approx(3 * square / 2, rel=1e-9)


@pytest.mark.parametrize(
    ("num_layers", "d_model", "tokens", "num_gpus", "tflops", "days"),
    [(96, 12288, 300e9, 1024, 140, 34), (128, 25600, 450e9, 3072, 163, 84)],
    ids=["GPT-3", "1T"],
)
def test_narayanan_2021_training_times_are_reproduced(
    num_layers: int, d_model: int, tokens: float, num_gpus: int, tflops: float, days: float
) -> None:
    # Section 5.1. The paper rounds its formula to 8 T P / (n X), which leaves out attention: hence 3 %.
    flops = narayanan_2021_hardware_flops(gpt3(num_layers, d_model), batch_size=1) / 2048 * tokens
    assert flops / (num_gpus * tflops * 1e12) / 86400 == pytest.approx(days, rel=0.03)


def test_narayanan_2021_is_the_printed_formula() -> None:
    # h = 16, s = 96: s/6h = 1; V = 512, L = 2: V/16Lh = 1
    model = ModelConfig(num_layers=2, d_model=16, num_heads=2, seq_len=96, vocab_size=512)
    assert narayanan_2021_hardware_flops(model, batch_size=5) == 96 * 5 * 96 * 2 * 256 * 3
    assert narayanan_2021_hardware_flops(model, batch_size=5, recompute=False) == 72 * 5 * 96 * 2 * 256 * 3


def test_legacy_flops_by_hand() -> None:
    model = ModelConfig(num_layers=2, d_model=16, num_heads=2, seq_len=96, vocab_size=512)
    tokens_and_width = 5 * 96 * 2 * 256 * 3
    assert legacy_flops(model, batch_size=5, recompute="none") == 24 * 3 * tokens_and_width
    assert legacy_flops(model, batch_size=5, recompute="selective") == 24 * 4 * tokens_and_width
    assert legacy_flops(model, batch_size=5, recompute="full") == 24 * 4 * tokens_and_width
    gated = replace(model, activation="swiglu", d_ff=40, num_kv_groups=1)
    assert legacy_flops(gated, batch_size=5, recompute="none") == 32 * 3 * tokens_and_width


@pytest.mark.parametrize(
    ("model", "recompute", "ratio"),
    [(gpt3(32, 4096), "full", 1.375), (gpt3(32, 4096), "none", 1.03), (TEUKEN_LIKE, "full", 1.84)],
    ids=["6.7B-full", "6.7B-none", "teuken-like-full"],
)
def test_legacy_flops_over_report(model: ModelConfig, recompute: Recompute, ratio: float) -> None:
    legacy = legacy_flops(model, batch_size=1, recompute=recompute)
    assert legacy / model_flops(model, batch_size=1) == pytest.approx(ratio, abs=0.005)


def test_palm_flops_by_hand() -> None:
    # two layers of 672 in matrices and 16 in norms, the final norm's 8, and the head 8 x 128
    assert palm_flops_per_token(SWIGLU) == 6 * (2 * 688 + 8 + 1024) + 6 * 2 * 4 * (4 + 4) * 16
    assert palm_flops_per_token(replace(SWIGLU, tie_embeddings=True)) == palm_flops_per_token(SWIGLU)


def test_palm_flops_reproduce_published_utilisation() -> None:
    # MPT-7B on A100-40GB: 3,645 tokens/s/GPU, 50.4 % MFU; with everything recomputed 67.3 % HFU
    mpt = ModelConfig(
        num_layers=32, d_model=4096, num_heads=32, seq_len=2048, vocab_size=50432, position="rotary", bias=False
    )
    mfu = 100 * palm_flops_per_token(mpt) * 3645 / A100_PEAK
    assert mfu == pytest.approx(50.4, abs=0.3)
    assert mfu * 4 / 3 == pytest.approx(67.3, abs=0.3)
    # torchtitan, Llama-3.1-8B on H100: 5,762 tokens/s/GPU, 33 % MFU
    llama = ModelConfig(
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_groups=8,
        d_ff=14336,
        seq_len=8192,
        vocab_size=128256,
        position="rotary",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
    )
    assert 100 * palm_flops_per_token(llama) * 5762 / 989e12 == pytest.approx(33.5, abs=0.5)
