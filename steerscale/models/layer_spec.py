"""What the layers of our GPT are made of: norms, linear layers, core attention and activation, torch's or another library's.

`BlockConfig.kernels` says whose kernels each is (docs/kernels.md). Whichever they are, parameters have the same names, shapes
and attributes: checkpoints, imports and exports do not see the difference.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from steerscale.accelerators import KernelChoice, Library
from steerscale.models import cpu_functions, functions
from steerscale.models.block_config import kernels_of
from steerscale.models.core_attention import core_attention
from steerscale.models.layer import ColumnLinear, Layer, LayerParts, RowLinear
from steerscale.parallel.megatron import (
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    te_layers,
)


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension, as `config.normalization` says.

    It works under sequence parallelism, which Megatron-Core's torch norm refuses.
    Under sequence parallelism each rank normalises its own slice of the sequence, so the parameters' gradients are partial
    sums: the attribute `sequence_parallel` makes Megatron-Core all-reduce them over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        kwargs = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **kwargs))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, **kwargs))
        mark_sequence_parallel(self, config)
        self._normalize = normalization(kernels_of(config).norm)

    def forward(self, x_SBM: torch.Tensor) -> torch.Tensor:
        return self._normalize(x_SBM, self.weight, self.bias, self.eps)


Normalization = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
"""(x, weight, bias or None, eps) -> x normalised over its last dimension: with a bias LayerNorm, without RMSNorm."""


@cache  # one function for all layers: torch.compile would take each for another
def normalization(library: Library | None) -> Normalization:
    """The function by which `Norm` normalises: torch's, Apex's, Liger's or ours."""
    if library == "apex":
        apex = importlib.import_module("apex.normalization.fused_layer_norm")

        def by_apex(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
            if bias is None:
                return apex.fused_rms_norm_affine(x, weight, weight.shape, eps)
            return apex.fused_layer_norm_affine(x, weight, bias, weight.shape, eps)

        return by_apex
    if library == "liger":
        rms_norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        layer_norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction

        def by_liger(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
            if bias is None:
                # "gemma": all in fp32 until the end, as torch does. Not in place: the gradient may be someone else's too.
                return rms_norm.apply(x, weight, eps, 0.0, "gemma", False)
            return layer_norm.apply(x, weight, bias, eps)

        return by_liger
    rms = cpu_functions.rms_norm if library == "native" else functions.rms_norm

    def by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        if bias is None:
            return rms(x, weight, eps)
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    return by_torch


class TENorm:
    """Transformer Engine's norm, with parameters as `Norm` has them. A class, since Megatron-Core calls no functions."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> Any:
        norm = te_layers().TENorm(config=config, hidden_size=hidden_size, eps=eps)
        mark_sequence_parallel(norm, config)
        return norm


def mark_sequence_parallel(norm: torch.nn.Module, config: TransformerConfig) -> None:
    """Say on a norm's parameters whether their gradients are partial sums (see `Norm`)."""
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def liger_swiglu() -> Callable[[torch.Tensor], torch.Tensor]:
    """[..., gate and up] -> silu(gate) * up by Liger's kernel."""
    function = importlib.import_module("liger_kernel.ops.swiglu").LigerFusedGateUpSiLUMulFunction

    def by_liger(gate_up: torch.Tensor) -> torch.Tensor:
        # Flat: Liger's gradient comes back as a matrix whatever the shape was (0.8.5).
        return function.apply(gate_up.flatten(end_dim=-2)).unflatten(0, gate_up.shape[:-1])

    return by_liger


def layer_parts(kernels: KernelChoice) -> LayerParts:
    """The classes and functions that `kernels` stands for."""
    column: Callable[..., torch.nn.Module] = ColumnLinear
    row: Callable[..., torch.nn.Module] = RowLinear
    if kernels.linear == "te":
        te = te_layers()
        column, row = te.TEColumnParallelLinear, te.TERowParallelLinear
    gated = {"liger": liger_swiglu, "native": lambda: cpu_functions.swiglu}.get(kernels.activation or "torch")
    ours = "native" in (kernels.norm, kernels.attention, kernels.activation)
    return LayerParts(
        norm=TENorm if kernels.norm == "te" else Norm,
        column=column,
        row=row,
        core_attention=core_attention(kernels),
        gated_activation=functions.swiglu if gated is None else gated(),
        split_heads=(cpu_functions if ours else functions).split_heads,
    )


def block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """Specification of `num_layers` transformer layers (one model chunk) with the kernels that `config` names."""
    parts = layer_parts(kernels_of(config))
    layer = ModuleSpec(module=Layer, params={"parts": parts})
    norm: Any = parts.norm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
