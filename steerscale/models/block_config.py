"""The configuration of a stack of layers."""

from dataclasses import dataclass

from steerscale.accelerators import TORCH, KernelChoice
from steerscale.parallel.megatron import TransformerConfig


@dataclass
class BlockConfig(TransformerConfig):
    """Megatron-Core's configuration, whose kernels the layers take, and what of them is not kept for the backward pass."""

    kernels: KernelChoice = TORCH
    recompute_pointwise: bool = False
    """Compute the results of norms and activation functions again instead of keeping them."""


def recomputes_pointwise(config: TransformerConfig) -> bool:
    """Whether the layers of a model with `config` compute the results of norms and activation functions again."""
    return isinstance(config, BlockConfig) and config.recompute_pointwise


def kernels_of(config: TransformerConfig) -> KernelChoice:
    """Whose kernels the layers of a model with `config` take."""
    return config.kernels if isinstance(config, BlockConfig) else TORCH
