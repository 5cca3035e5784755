"""What vendors' datasheets say of the accelerators we know. Unknown ones are reported as unknown, never guessed.

A peak belongs to one exact device name: a cut-down or custom part (Leonardo's A100 of 64 GB, a MIG slice) carries its
family's name and another peak, so a substring is not enough. V100 is left out: it has no bf16 matrix units.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from steerscale.config import require

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
"""Of weights and matrix products; gradients are accumulated and parameters updated in fp32 either way."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator by its datasheet."""

    bf16_tflops: float
    """Dense bf16 peak with fp32 accumulation, 1e12 FLOP/s, and fp16's, which the datasheets of all these say is the same; their
    sparse figures are twice this."""
    memory_gib: float
    """Memory as sold. The driver keeps about 1 GiB: where the device can be asked, its own answer is better."""
    bandwidth_gb_per_second: float
    """Memory bandwidth, 1e9 bytes/s."""


DEVICES: dict[str, Device] = {
    # NVIDIA A100 datasheet, June 2021
    "a100-pcie-40gb": Device(bf16_tflops=312, memory_gib=40, bandwidth_gb_per_second=1555),
    "a100-sxm-40gb": Device(bf16_tflops=312, memory_gib=40, bandwidth_gb_per_second=1555),
    "a100-pcie-80gb": Device(bf16_tflops=312, memory_gib=80, bandwidth_gb_per_second=1935),
    "a100-sxm-80gb": Device(bf16_tflops=312, memory_gib=80, bandwidth_gb_per_second=2039),
    # NVIDIA H100 datasheet: 1513 (PCIe) and 1979 (SXM) with sparsity
    "h100-pcie": Device(bf16_tflops=756, memory_gib=80, bandwidth_gb_per_second=2000),
    "h100-sxm": Device(bf16_tflops=989, memory_gib=80, bandwidth_gb_per_second=3350),
    # NVIDIA H200 datasheet, SXM: 1979 with sparsity
    "h200": Device(bf16_tflops=989, memory_gib=141, bandwidth_gb_per_second=4800),
}

# What torch.cuda.get_device_name() answers; drivers before 2021 leave out the vendor.
DEVICE_NAMES: dict[str, str] = {
    "A100-PCIE-40GB": "a100-pcie-40gb",
    "A100-SXM4-40GB": "a100-sxm-40gb",
    "A100 80GB PCIe": "a100-pcie-80gb",
    "A100-SXM4-80GB": "a100-sxm-80gb",
    "H100 PCIe": "h100-pcie",
    "H100 80GB HBM3": "h100-sxm",
    "H200": "h200",
}


def find_device(name: str) -> Device | None:
    """The device called `name`: a key of `DEVICES`, or what `torch.cuda.get_device_name()` answers. None if unknown."""
    return DEVICES.get(DEVICE_NAMES.get(name.removeprefix("NVIDIA "), name))


def peak_tflops(name: str, *, precision: Precision = "bf16", override: float | None = None) -> float | None:
    """Peak of one device in 1e12 FLOP/s, the denominator of MFU and HFU; None where it is not known, with a warning.

    Args:
        name: as for `find_device`.
        precision: fp32 has no peak here: what it reaches depends on whether TF32 is allowed.
        override: the user's own figure, for devices missing from the table or clocked differently.
    """
    if override is not None:
        require(override > 0, f"peak_tflops must be positive or null, got {override}")
        return override
    device = find_device(name)
    if device is not None and precision != "fp32":
        return device.bf16_tflops
    logger.warning("no %s peak is known for %r: no MFU and no HFU; set peak_tflops to have them", precision, name)
    return None
