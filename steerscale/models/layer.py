"""The transformer layer: what runs between two hidden states. Its matrices are Megatron-Core's, cut over the tensor ranks.

Megatron-Core's own layer serves many more architectures than ours; a forward pass of one page runs faster on small models,
can be read, and is one graph for torch.compile. Parameter names are Megatron-Core's.

Shapes: S sequence ([S / TP] between the matrices under sequence parallelism), B batch, M d_model, G key/value groups and H
heads of this rank, D head width.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from steerscale.errors import ConfigError
from steerscale.models.block_config import recomputes_pointwise
from steerscale.models.functions import linear, split_heads, swiglu
from steerscale.models.recompute import cheap
from steerscale.parallel.megatron import (
    AttnMaskType,
    ProcessGroupCollection,
    TransformerConfig,
    get_bias_dropout_add,
    tensor_parallel,
)


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """Which class does what in a layer; each is built with the arguments that Megatron-Core gives to its own."""

    norm: Callable[..., torch.nn.Module]
    column: Callable[..., torch.nn.Module]
    """Linear layer whose output is cut over the tensor ranks."""
    row: Callable[..., torch.nn.Module]
    """Linear layer whose input is cut over them."""
    core_attention: Callable[..., torch.nn.Module]
    gated_activation: Callable[[torch.Tensor], torch.Tensor] = swiglu
    """[..., 2 F], the gate first -> [..., F]."""
    split_heads: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = split_heads
    """The product of the QKV matrix and a rotation -> queries, keys and values."""


class Layer(torch.nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream.

    Args:
        layer_number: from 1 within the model chunk.
    """

    def __init__(
        self,
        config: TransformerConfig,
        parts: LayerParts,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.config, self.layer_number = config, layer_number
        self._keep = not recomputes_pointwise(config)
        norm: Any = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.input_layernorm = parts.norm(**norm)
        self.self_attention = Attention(config, parts, layer_number, pg_collection)
        self.pre_mlp_layernorm = parts.norm(**norm)
        self.mlp = MLP(config, parts, pg_collection)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: None = None,
        context_mask: None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden [S, B, M] -> (hidden, None); `rotary_pos_emb` as for `functions.split_heads`. Named as Megatron-Core does."""
        normed, saving = cheap(self.input_layernorm, hidden_states, keep=self._keep)
        with saving:
            attended = self.self_attention(normed, attention_mask, rotary_pos_emb)
        hidden_states = self._add(attended, hidden_states)
        normed, saving = cheap(self.pre_mlp_layernorm, hidden_states, keep=self._keep)
        with saving:
            out = self.mlp(normed)
        return self._add(out, hidden_states), None

    def _add(self, output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor) -> torch.Tensor:
        """Bias, where the matrix left it, dropout, residual."""
        out, bias = output
        if bias is None and not (self.config.hidden_dropout and self.training):
            return residual + out
        add = get_bias_dropout_add(self.training, self.config.bias_dropout_fusion)
        return add(output, residual, self.config.hidden_dropout)


def compile_layers(chunks: Iterable[Any], device: torch.device) -> None:
    """Hand every layer to torch.compile; each becomes a graph at its first forward pass, one for all layers alike.

    Raises ConfigError on a CPU without a C++ compiler.
    """
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise ConfigError(
            "engine.compile=blocks needs a C++ compiler on a CPU, and there is none (c++, g++, clang++, or $CXX): install one, "
            "or use engine.compile=none"
        )
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Layer):
                module.compile(dynamic=False)


class Attention(torch.nn.Module):
    """Causal self-attention; heads, queries with their keys and values, are spread over the tensor ranks."""

    def __init__(
        self,
        config: TransformerConfig,
        parts: LayerParts,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        size = pg_collection.tp.size()
        groups, heads, width = config.num_query_groups, config.num_attention_heads, config.kv_channels
        assert groups is not None
        assert width is not None
        self.groups, self.width = groups // size, width
        self._recompute = config.recompute_granularity == "selective"
        self._split_heads = parts.split_heads
        self.linear_qkv = _column(
            parts, config, pg_collection, (heads + 2 * groups) * width, name="qkv", bias=config.add_qkv_bias
        )
        self.core_attention = parts.core_attention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            cp_comm_type=None,
            softmax_scale=None,
            pg_collection=pg_collection,
        )
        self.linear_proj = _row(parts, config, pg_collection, heads * width, name="proj")

    def forward(
        self, x_SBM: torch.Tensor, mask: torch.Tensor | None, rotation: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv, _ = self.linear_qkv(x_SBM)
        sequence, batch, _ = qkv.shape
        q_SBHD, k_SBGD, v_SBGD = self._split_heads(qkv.view(sequence, batch, self.groups, -1, self.width), rotation)
        # Compiled, the attention keeps what its backward pass needs and nothing else, and the compiler decides what to keep.
        if self._recompute and self.training and not torch.compiler.is_compiling():
            out = tensor_parallel.checkpoint(self.core_attention, False, q_SBHD, k_SBGD, v_SBGD, mask)
        else:
            out = self.core_attention(q_SBHD, k_SBGD, v_SBGD, mask)
        return self.linear_proj(out)


class MLP(torch.nn.Module):
    """Two matrices around an activation; of a gated one the first holds [gate; up]."""

    def __init__(self, config: TransformerConfig, parts: LayerParts, pg_collection: ProcessGroupCollection) -> None:
        super().__init__()
        self._keep = not recomputes_pointwise(config)
        self.activation = parts.gated_activation if config.gated_linear_unit else config.activation_func
        assert config.ffn_hidden_size is not None
        width = config.ffn_hidden_size
        self.linear_fc1 = _column(
            parts, config, pg_collection, 2 * width if config.gated_linear_unit else width, name="fc1"
        )
        self.linear_fc2 = _row(parts, config, pg_collection, width, name="fc2")

    def forward(self, x_SBM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden, _ = self.linear_fc1(x_SBM)
        active, saving = cheap(self.activation, hidden, keep=self._keep)
        with saving:
            return self.linear_fc2(active)


def _column(
    parts: LayerParts,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    outputs: int,
    *,
    name: str,
    bias: bool = False,
) -> torch.nn.Module:
    """A matrix from d_model, cut along its outputs; it adds its bias itself."""
    return parts.column(
        config.hidden_size,
        outputs,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=bias or config.add_bias_linear,
        skip_bias_add=False,
        is_expert=False,
        tp_comm_buffer_name=name,
        tp_group=pg_collection.tp,
    )


def _row(
    parts: LayerParts, config: TransformerConfig, pg_collection: ProcessGroupCollection, inputs: int, *, name: str
) -> torch.nn.Module:
    """A matrix back to d_model, cut along its inputs; the bias is left to whoever adds the residual."""
    return parts.row(
        inputs,
        config.hidden_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=config.add_bias_linear,
        input_is_parallel=True,
        skip_bias_add=True,
        is_expert=False,
        tp_comm_buffer_name=name,
        tp_group=pg_collection.tp,
    )


class ColumnLinear(tensor_parallel.ColumnParallelLinear):
    """Megatron-Core's, which overlaps its communication; with one tensor rank a plain linear layer.

    torch.compile gets the plain form of both passes instead: a product, and a collective before it.
    """

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.output_size_per_partition < self.output_size:
            if not torch.compiler.is_compiling():
                return super().forward(input_, weight, runtime_gather_output)
            if self.sequence_parallel:
                # All-gather of S x B x M; backward, a reduce-scatter of it.
                input_ = tensor_parallel.gather_from_sequence_parallel_region(input_, group=self.tp_group)
            else:
                # Nothing; backward, an all-reduce of S x B x M.
                input_ = tensor_parallel.copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        weight = self.weight if weight is None else weight
        assert weight is not None
        return linear(input_, weight, self.bias, into_main_grad=self.gradient_accumulation_fusion), None


class RowLinear(tensor_parallel.RowParallelLinear):
    """Megatron-Core's; with one tensor rank a plain linear layer, bias included. For torch.compile as `ColumnLinear`."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:  # type: ignore[override]
        if self.input_size_per_partition == self.input_size:
            return linear(input_, self.weight, self.bias, into_main_grad=self.gradient_accumulation_fusion), None
        if not torch.compiler.is_compiling():
            return super().forward(input_)
        out = F.linear(input_, self.weight)
        if self.sequence_parallel:
            # Reduce-scatter of S x B x M; backward, an all-gather of it.
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group), self.bias
        # All-reduce of S x B x M; backward, nothing.
        return tensor_parallel.reduce_from_tensor_model_parallel_region(out, group=self.tp_group), self.bias
