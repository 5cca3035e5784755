"""All of Megatron-Core that steerscale stands on, imported in one place.

Two reasons: the list is what has to be checked when Megatron-Core moves (0.16 to 0.19 have it all), and importing it prints a
warning for every accelerator that is not installed, which our own start-up report says once and better.
"""

import importlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from steerscale.parallel.main_grad import add_product, can_add

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import layers as megatron_linear
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.enums import AttnMaskType, ModelType
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = [
    "AttnMaskType",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "Float16Module",
    "LanguageModelEmbedding",
    "LanguageModule",
    "ModelType",
    "ModuleSpec",
    "OptimizerConfig",
    "ProcessGroupCollection",
    "TransformerBlock",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "add_in_products",
    "clip_grad_by_total_norm_fp32",
    "finalize_model_grads",
    "forward_backward_no_pipelining",
    "gathered_within",
    "get_bias_dropout_add",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_megatron_optimizer",
    "megatron_random",
    "optimizers_of",
    "parallel_state",
    "quiet",
    "te_layers",
    "tensor_parallel",
]

_KNOWN_WARNINGS = (
    # torch renamed two collectives that Megatron-Core calls by their old names.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    # DDP looks at `.grad` of gradient-accumulation nodes' inputs on purpose.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Megatron-Core's own warnings and the two that torch raises about it; everything else is shown."""
    log = logging.getLogger("megatron")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\.")
            for message in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        log.setLevel(level)


def te_layers() -> Any:
    """Megatron-Core's module of Transformer Engine's layers; for runs that use them, since without the library it is hollow."""
    return importlib.import_module("megatron.core.extensions.transformer_engine")


@contextmanager
def optimizers_of(adam: type) -> Iterator[None]:
    """Here Megatron-Core builds its optimizers with `adam`: torch's AdamW, or a FusedAdam with decoupled weight decay.

    By itself it takes the first library that it could import, whatever the device.
    """
    of_torch = adam.__module__.startswith("torch.")
    changes = [
        (megatron_optimizer, "Adam", adam),
        (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", of_torch),
        (distrib_optimizer, "Adam", adam),
    ]
    before = [getattr(module, name) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, before):
            setattr(module, name, value)


@contextmanager
def gathered_within(world: dist.ProcessGroup | None) -> Iterator[None]:
    """Here Megatron-Core gathers objects within `world` where it names no group; None: from all ranks, as it is.

    Its optimizers compare their parameter groups over all ranks when they are built. Pipeline stages that are worlds of their
    own build different numbers of optimizers, and would wait for each other for ever.
    """
    if world is None:
        yield
        return
    gather, size = dist.all_gather_object, dist.get_world_size

    def gather_within(objects: list[Any], own: Any, group: dist.ProcessGroup | None = None) -> None:
        gather(objects, own, group=group or world)

    def size_within(group: dist.ProcessGroup | None = None) -> int:
        return size(group or world)

    dist.all_gather_object, dist.get_world_size = gather_within, size_within
    try:
        yield
    finally:
        dist.all_gather_object, dist.get_world_size = gather, size


def add_in_products(chunks: Iterable[torch.nn.Module]) -> None:
    """Let the tensor-parallel matrices of `chunks`, which DDP has wrapped, add their gradients to `main_grad` where possible.

    A weight that is an embedding as well gets gradients from there, too: it is left alone. So are compiled layers: they go
    through autograd, but for micro-batches of a shape for which torch.compile gives up and runs them as they are, and once
    products have added to a weight in a step, DDP ignores what autograd has for it.
    """
    megatron_linear.fused_weight_gradient_mlp_cuda = _Extension
    for chunk in chunks:
        compiled = {part for module in chunk.modules() if module._compiled_call_impl for part in module.modules()}
        for module in chunk.modules():
            if isinstance(module, tensor_parallel.ColumnParallelLinear | tensor_parallel.RowParallelLinear):
                weight: Any = module.weight
                possible = weight is not None and can_add(weight.dtype, weight.device)
                module.gradient_accumulation_fusion = possible and module not in compiled


class _Extension:
    """What Megatron-Core calls of Apex's extension of this name, by torch."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x_TK: torch.Tensor, d_out_TN: torch.Tensor, into_NK: torch.Tensor) -> None:
        add_product(into_NK, d_out_TN.t(), x_TK)
