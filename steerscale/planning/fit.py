"""Does a rank fit its device? What the run needs by part, what the device keeps for itself, what is left."""

from dataclasses import dataclass
from typing import Any

from steerscale.planning.memory import GIB, PARTS, MemoryEstimate

CONTEXT_GIB = 1.0
"""CUDA context, cuBLAS workspaces and NCCL's channels, on any GPU; between half and two GiB have been seen."""
FRAGMENTATION = 0.075
"""Share of a device's memory that is left free: what the driver keeps of the sold size, and what PyTorch's caching
allocator holds in blocks of the wrong size. With the context, a tenth of a 40 GB device is not used."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """An estimate held against a device."""

    memory: MemoryEstimate
    """What the fullest rank needs."""
    device_gib: float
    """Memory of the device as sold."""

    @property
    def margin_gib(self) -> float:
        """Left free against fragmentation."""
        return FRAGMENTATION * self.device_gib

    @property
    def usable_gib(self) -> float:
        """What an estimate may fill."""
        return usable_gib(self.device_gib)

    @property
    def over_gib(self) -> float:
        """What is missing; not positive if it fits."""
        return self.memory.total_gib - self.usable_gib

    @property
    def fits(self) -> bool:
        """Whether everything has its place."""
        return self.over_gib <= 0

    def parts_gib(self) -> dict[str, float]:
        """GiB by part; context and margin included, so that they add up to what the device must have."""
        parts = {part: getattr(self.memory, part) / GIB for part in PARTS}
        return {**parts, "context": CONTEXT_GIB, "margin": self.margin_gib}

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "parts_gib": self.parts_gib(),
            "needed_gib": sum(self.parts_gib().values()),
            "device_gib": self.device_gib,
            "over_gib": self.over_gib,
            "host_gib": self.memory.host / GIB,
            "fits": self.fits,
        }

    def spoken_parts(self) -> str:
        """The parts as a list of words and GiB, the largest first."""
        parts = sorted(self.parts_gib().items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {gib:,.1f}" for name, gib in parts if gib >= 0.05)


def usable_gib(device_gib: float) -> float:
    """What is left of a device for weights, states, activations and buffers."""
    return device_gib * (1 - FRAGMENTATION) - CONTEXT_GIB
