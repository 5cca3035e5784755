import logging

import pytest

from steerscale.errors import ConfigError
from steerscale.planning.hardware import DEVICE_NAMES, DEVICES, find_device, peak_tflops


@pytest.mark.parametrize(
    ("name", "tflops", "gib"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 40),
        ("A100-SXM4-40GB", 312, 40),
        ("NVIDIA A100-PCIE-40GB", 312, 40),
        ("NVIDIA A100-SXM4-80GB", 312, 80),
        ("NVIDIA A100 80GB PCIe", 312, 80),
        ("NVIDIA H100 80GB HBM3", 989, 80),
        ("NVIDIA H100 PCIe", 756, 80),
        ("NVIDIA H200", 989, 141),
        ("h100-sxm", 989, 80),
    ],
)
def test_find_device_knows_names_that_cuda_reports(name: str, tflops: float, gib: float) -> None:
    device = find_device(name)
    assert device is not None
    assert (device.bf16_tflops, device.memory_gib) == (tflops, gib)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM-64GB",  # Leonardo's own part, with more multiprocessors than any A100 on sale
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 NVL",
        "NVIDIA GH200 120GB",
        "Tesla V100-SXM2-32GB",
        "cpu",
        "",
    ],
)
def test_find_device_does_not_guess_from_a_family_name(name: str) -> None:
    assert find_device(name) is None


def test_device_names_and_table_name_the_same_devices() -> None:
    assert set(DEVICE_NAMES.values()) == set(DEVICES)


def test_peak_tflops_of_an_unknown_device_is_none_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert peak_tflops("Tesla V100-SXM2-32GB") is None
    assert "no bf16 peak is known for 'Tesla V100-SXM2-32GB'" in caplog.text


def test_peak_tflops_of_bf16_is_not_applied_to_fp32() -> None:
    assert peak_tflops("NVIDIA H200", precision="bf16") == peak_tflops("NVIDIA H200", precision="fp16") == 989
    assert peak_tflops("NVIDIA H200", precision="fp32") is None


def test_peak_tflops_override_comes_first_and_must_be_positive() -> None:
    assert peak_tflops("NVIDIA H200", override=500.0) == 500
    assert peak_tflops("cpu", precision="fp32", override=0.1) == 0.1
    with pytest.raises(ConfigError, match="peak_tflops must be positive"):
        peak_tflops("NVIDIA H200", override=0.0)
