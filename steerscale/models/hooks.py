"""Read and replace activations inside a model that stays cut over tensor and pipeline ranks.

Shapes: B batch, S sequence, M d_model; `_local` marks what this rank holds of it: everything, or S / TP positions under
sequence parallelism. Megatron-Core's blocks work on [S, B, M]; hook functions see [B, S, M], whole, on every tensor rank
of the stage that owns the layer. They must compute the same on each, as the ranks go on with what each was given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from steerscale.errors import ConfigError
from steerscale.models.gpt import GPT
from steerscale.models.hook_points import hook_point
from steerscale.parallel.megatron import tensor_parallel

HookFunction = Callable[[torch.Tensor], torch.Tensor | None]
"""activation [B, S, M] -> None to leave it, or a replacement of the same shape.

The activation is the function's own copy, free to keep or to change; only what is returned has an effect. B counts this
replica's micro-batch.
"""


@contextmanager
def hooked(chunks: Sequence[GPT], functions: Mapping[str, HookFunction]) -> Iterator[None]:
    """Call `functions[name]` at each forward pass through the hook point `name`, until the context ends.

    Every rank names the same points; functions are called where the layer lives. Contexts nest: an inner function sees
    what the outer one returned. With gradients enabled they flow through replacements, and into whatever these were
    computed from. Under full recompute a training forward calls a function again during backward, so the context must
    then include the backward.

    Args:
        chunks: this rank's model chunks, unwrapped.
        functions: by hook point; see `hook_points.hook_points`.
    Raises:
        ConfigError: on entry, a name the model has not; in the forward, a replacement of another shape.
    """
    points = {hook_point(name, chunks[0].model): function for name, function in functions.items()}
    with ExitStack() as stack:
        for point, function in points.items():
            for chunk in chunks:
                index = point.layer - chunk.first_layer
                if 0 <= index < len(chunk.decoder.layers):
                    call = partial(_call, function, chunk, str(point))
                    stack.enter_context(_ATTACH[point.kind](chunk.decoder.layers[index], call))
        yield


@contextmanager
def capture(chunks: Sequence[GPT], names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect activations [B, S, M] by hook point, detached.

    Yields a dict that each forward pass fills anew with the points of this rank's stage; on other stages they stay absent.
    Raises ConfigError for a name the model has not.
    """
    activations: dict[str, torch.Tensor] = {}

    def keep(name: str, activation_BSM: torch.Tensor) -> None:
        activations[name] = activation_BSM.detach()

    with hooked(chunks, {name: partial(keep, name) for name in names}):
        yield activations


_Call = Callable[[torch.Tensor], torch.Tensor | None]
"""The same in Megatron-Core's layout: [S, B, M] or this rank's slice of it -> None or a replacement of the same shape."""


def _call(function: HookFunction, chunk: GPT, name: str, x_SBM_local: torch.Tensor) -> torch.Tensor | None:
    group = chunk.pg_collection.tp
    x_SBM = x_SBM_local
    if chunk.config.sequence_parallel:
        # All-gather of S x B x M. From here to the scatter each rank computes the same, so each already holds the whole
        # gradient: backward takes this rank's slice of it, where a reduce-scatter would count it once a rank.
        x_SBM = tensor_parallel.gather_from_sequence_parallel_region(
            x_SBM_local, tensor_parallel_output_grad=False, group=group
        )
    # A copy: Megatron-Core adds bias and residual in place when no gradient is needed, and functions may write as well.
    x_BSM = x_SBM.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    replacement_BSM = function(x_BSM)
    if replacement_BSM is None:
        return None
    if replacement_BSM.shape != x_BSM.shape:
        raise ConfigError(
            f"the function at {name} returned shape {tuple(replacement_BSM.shape)}, expected {tuple(x_BSM.shape)}"
        )
    y_SBM = replacement_BSM.transpose(0, 1).to(x_SBM_local.dtype)
    if chunk.config.sequence_parallel:
        # Takes this rank's positions; backward all-gathers their gradient, S x B x M.
        y_SBM = tensor_parallel.scatter_to_sequence_parallel_region(y_SBM, group=group)
    # A copy again: the replacement stays the caller's, and pipeline schedules free outputs only if they are no views.
    return y_SBM.clone(memory_format=torch.contiguous_format)


def _before_layer(layer: torch.nn.Module, call: _Call) -> RemovableHandle:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        replacement = call(kwargs["hidden_states"])
        return None if replacement is None else (args, {**kwargs, "hidden_states": replacement})

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def _after_layer(layer: torch.nn.Module, call: _Call) -> RemovableHandle:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, Any]) -> Any:
        hidden, context = output
        replacement = call(hidden)
        return None if replacement is None else (replacement, context)

    return layer.register_forward_hook(hook)


def _after_sublayer(sublayer: torch.nn.Module, call: _Call) -> RemovableHandle:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor | None]) -> Any:
        # Megatron-Core leaves the bias to the fused bias-dropout-add, which takes None for it.
        out, bias = output
        replacement = call(out if bias is None else out + bias)
        return None if replacement is None else (replacement, None)

    return sublayer.register_forward_hook(hook)


_ATTACH: dict[str, Callable[[Any, _Call], RemovableHandle]] = {
    "hook_resid_pre": _before_layer,
    "hook_attn_out": lambda layer, call: _after_sublayer(layer.self_attention, call),
    "hook_mlp_out": lambda layer, call: _after_sublayer(layer.mlp, call),
    "hook_resid_post": _after_layer,
}
