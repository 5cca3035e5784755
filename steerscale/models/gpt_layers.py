"""The GPT as a list of layers, for an engine that cuts the list into pipeline stages itself.

Shapes as in `models.gpt`: B batch, S sequence, M d_model, V vocabulary; `_local` marks a tensor-parallel shard. Between layers
travels hidden [S, B, M], followed by positions [B, S] and documents [B, S] where documents are kept apart.

Every layer has the attributes by which `models.sharding` finds the place of its parameters in the whole model, as chunks of a
`GPT` have; so initial weights, checkpoints and imports are the same.
"""

from dataclasses import dataclass
from typing import Any

import torch

from steerscale.models.config import ModelConfig
from steerscale.models.gpt import document_mask, mark_tensor_parallel, mask_padding, rotary_table
from steerscale.models.layer import ColumnLinear
from steerscale.models.layer_spec import Norm, block_spec
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.megatron import (
    LanguageModelEmbedding,
    TransformerBlock,
    TransformerConfig,
)

Hidden = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Layer(torch.nn.Module):
    """What all layers have in common."""

    first_layer = 0
    """Number of the first transformer layer in it."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, context: ParallelContext) -> None:
        super().__init__()
        self.model, self._config, self._groups = model, config, context.groups


class EmbeddingLayer(Layer):
    """tokens [B, S] (or with positions and documents) -> hidden."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, context: ParallelContext) -> None:
        super().__init__(model, config, context)
        with context.device:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=model.padded_vocab,
                max_sequence_length=model.seq_len,
                position_embedding_type="learned_absolute" if model.position == "learned" else "rope",
                tp_group=context.groups.tp,
            )
        mark_tensor_parallel(self)

    @property
    def tied_weight(self) -> torch.nn.Parameter:
        """What the head shares."""
        return self.embedding.word_embeddings.weight

    def forward(self, inputs: Hidden) -> Hidden:
        tokens_BS, *rest = inputs if isinstance(inputs, tuple) else (inputs,)
        positions_BS = rest[0] if rest else torch.arange(tokens_BS.shape[1], device=tokens_BS.device).unsqueeze(0)
        return _with(self.embedding(tokens_BS, positions_BS), rest)


class BlockLayer(Layer):
    """Transformer layer `number` (from 0): hidden -> hidden."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, context: ParallelContext, number: int) -> None:
        super().__init__(model, config, context)
        self.first_layer = number
        # A block of one layer: it brings recompute and dropout's generators as in a whole block.
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(config, 1),
            post_layer_norm=False,
            pre_process=True,
            post_process=False,
            pg_collection=context.groups,
        )
        mark_tensor_parallel(self)

    def forward(self, inputs: Hidden) -> Hidden:
        hidden_SBM, *rest = inputs if isinstance(inputs, tuple) else (inputs,)
        mask = document_mask(rest[1]) if rest else None
        out = self.decoder(hidden_states=hidden_SBM, attention_mask=mask, rotary_pos_emb=self._rotary(hidden_SBM, rest))
        return _with(out, rest)

    def _rotary(self, hidden_SBM: torch.Tensor, rest: list[torch.Tensor]) -> torch.Tensor | None:
        if self.model.position != "rotary":
            return None
        positions = rest[0] if rest else torch.arange(hidden_SBM.shape[0], device=hidden_SBM.device).unsqueeze(0)
        return rotary_table(positions, self.model.head_width, self.model.rope_theta, hidden_SBM.dtype)


class HeadLayer(Layer):
    """Normalised hidden -> logits [S, B, V_local], padding columns at -inf.

    Its weight is its own also where it is tied: copies on the first and the last stage, kept equal by the engine.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, context: ParallelContext) -> None:
        super().__init__(model, config, context)
        self.output_layer = ColumnLinear(
            model.d_model,
            model.padded_vocab,
            config=config,
            init_method=torch.nn.init.zeros_,  # never called: weights are drawn by `sharding`
            bias=False,
            gather_output=False,
            tp_group=context.groups.tp,
        )
        mark_tensor_parallel(self)

    @property
    def tied_weight(self) -> torch.nn.Parameter:
        """What the embedding shares."""
        weight = self.output_layer.weight
        assert weight is not None
        return weight

    def forward(self, hidden_SBM: torch.Tensor) -> torch.Tensor:
        logits, _ = self.output_layer(hidden_SBM)
        mask_padding(logits, self.model, self._groups.tp)
        return logits


class FinalNormLayer(Layer):
    """hidden -> normalised hidden, alone."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, context: ParallelContext) -> None:
        super().__init__(model, config, context)
        self.decoder = torch.nn.Module()
        self.decoder.final_layernorm = Norm(config, model.d_model, model.norm_eps)

    def forward(self, inputs: Hidden) -> torch.Tensor:
        return self.decoder.final_layernorm(inputs[0] if isinstance(inputs, tuple) else inputs)  # type: ignore[operator]


@dataclass(frozen=True)
class LayerPlan:
    """A layer that is still to be built, by whichever stage it falls to."""

    kind: type[Layer]
    arguments: tuple[Any, ...]
    tied: bool = False
    """It shares its `tied_weight` with the other layer of which this is said."""


def gpt_layers(model: ModelConfig, config: TransformerConfig, context: ParallelContext) -> list[LayerPlan]:
    """The whole model, embedding to head; `config` and `context` are of one stage alone (`parallel.context.stage_context`)."""
    common, tied = (model, config, context), model.tie_embeddings
    return [
        LayerPlan(EmbeddingLayer, common, tied=tied),
        *(LayerPlan(BlockLayer, (*common, number)) for number in range(model.num_layers)),
        LayerPlan(FinalNormLayer, common),
        LayerPlan(HeadLayer, common, tied=tied),
    ]


def _with(hidden: torch.Tensor, rest: list[torch.Tensor]) -> Hidden:
    return (hidden, rest[0], rest[1]) if rest else hidden
