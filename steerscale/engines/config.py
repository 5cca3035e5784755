"""Settings that an engine needs beside the layout and the model. Torch-free."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How forward, backward and the optimizer step are carried out."""

    name: Literal["megatron"] = "megatron"
    """The engine."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Parameters and activations; bf16 keeps fp32 main weights. Gradients are reduced and accumulated in fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recompute: none, the core attention only, or every block."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel replicas (ZeRO-1)."""
    overlap: bool = True
    """On CUDA, overlap gradient reduction and parameter gathering with computation."""
