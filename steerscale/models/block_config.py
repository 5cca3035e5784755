"""The configuration of a stack of layers."""

from dataclasses import dataclass

from steerscale.accelerators import TORCH, KernelChoice
from steerscale.parallel.megatron import TransformerConfig


@dataclass
class BlockConfig(TransformerConfig):
    """Megatron-Core's configuration and whose kernels the layers take."""

    kernels: KernelChoice = TORCH


def kernels_of(config: TransformerConfig) -> KernelChoice:
    """Whose kernels the layers of a model with `config` take."""
    return config.kernels if isinstance(config, BlockConfig) else TORCH
