"""A trained language model ready for use: text in, logits, losses and activations out, on whatever layout it lies.

Shapes: B sequences, S sequence, M d_model, V vocabulary; `_local` marks what this rank holds.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

from steerscale.activations.config import StreamConfig
from steerscale.activations.loading import load_source
from steerscale.activations.shape import find_kind
from steerscale.activations.source import GPTSource, check_source_layout
from steerscale.errors import ConfigError, DataError
from steerscale.load import run_tokenizer
from steerscale.models.gpt import GPT
from steerscale.models.hooks import HookFunction, hooked
from steerscale.models.layer_spec import Norm
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.megatron import tensor_parallel
from steerscale.parallel.p2p import StageLink
from steerscale.tokenizers.base import Tokenizer
from steerscale.tokenizers.registry import load_tokenizer


class LanguageModel:
    """Our GPT on the context's layout. What runs the model is a collective of all ranks of a replica, with equal arguments."""

    def __init__(
        self,
        chunks: Sequence[GPT],
        context: ParallelContext,
        *,
        seq_len: int | None = None,
        tokenizer: Tokenizer | None = None,
        prefix: Sequence[int] = (),
        special_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`chunks`: this rank's. Raises LayoutError for an interleaved layout.

        Args:
            seq_len: tokens the model looks back on; None: as many as it was made for.
            prefix: tokens that go before a text.
            special_ids: begin, end, padding and unknown tokens.
        """
        check_source_layout(context)
        self.chunks, self.context, self.model = list(chunks), context, chunks[0].model
        self.seq_len = seq_len or self.model.seq_len
        self.prefix, self.special_ids = tuple(prefix), special_ids
        self._tokenizer = tokenizer
        self._link = StageLink(context)
        self.tokens_BS: torch.Tensor | None = None
        """Tokens of the forward pass that runs, for hook functions that ask what they act on."""
        self.positions_BS: torch.Tensor | None = None
        """And their positions, if they are not 0 .. S-1."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's. Raises ConfigError if it is unknown."""
        if self._tokenizer is None:
            raise ConfigError("this language model was loaded without a tokenizer")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one."""
        return self._tokenizer is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as the model was trained to see its beginning. Raises DataError for halves of characters."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{text[:60]!a} is no text: it has bytes or halves of characters that are no Unicode"
            ) from error
        return [*self.prefix, *self.tokenizer.encode(text)] or [self.tokenizer.eos_id]

    def logits(
        self,
        tokens_BS: torch.Tensor,
        functions: Mapping[str, HookFunction] | None = None,
        *,
        positions_BS: torch.Tensor | None = None,
        at_B: torch.Tensor | None = None,
        gradients: bool = False,
    ) -> torch.Tensor | None:
        """Logits float32 [B, S, V] on every tensor rank of the last stage, None on others.

        Args:
            functions: to be called at these hook points; see `models.hooks.hooked`.
            positions_BS: of the tokens; None: 0 .. S-1.
            at_B: index into the sequence for each row: its logits [B, V] are all that is gathered.
            gradients: keep what is needed to differentiate the logits with respect to what functions returned; no pipeline.
        One all-gather of the logits over the tensor group.
        """
        length = tokens_BS.shape[1]
        with torch.set_grad_enabled(gradients):
            output = self._forward(tokens_BS, functions or {}, positions_BS=positions_BS)
            if output is None:
                return None
            logits_BSV_local = output.transpose(0, 1)[:, :length]
            if at_B is not None:
                logits_BSV_local = logits_BSV_local[torch.arange(len(at_B), device=at_B.device), at_B]
            return self.gather_vocabulary(logits_BSV_local)

    @torch.no_grad()
    def losses(
        self,
        tokens_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        functions: Mapping[str, HookFunction] | None = None,
    ) -> torch.Tensor | None:
        """Losses float32 [B, S] in nats on the last stage, None on others; see `logits`."""
        output = self._forward(tokens_BS, functions or {}, labels_BS=self._padded(labels_BS))
        return None if output is None else output[:, : tokens_BS.shape[1]].float()

    def gather_vocabulary(self, logits_local: torch.Tensor) -> torch.Tensor:
        """Whole logits float32 [..., V] without padding columns, from this tensor rank's columns; last stage only."""
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits_local, group=self.context.groups.tp)
        return whole[..., : self.model.tokens].float()

    @property
    def final_norm(self) -> Norm:
        """What stands between the last residual stream and the unembedding; last stage only."""
        norm = self.chunks[-1].decoder.final_layernorm
        assert isinstance(norm, Norm)
        return norm

    def unembed(self, x_M: torch.Tensor) -> torch.Tensor:
        """Logits float32 [..., V] of what the final norm returned, [..., M]; last stage only, one all-gather."""
        return self.gather_vocabulary(F.linear(x_M.to(self.unembedding.dtype), self.unembedding))

    @property
    def unembedding(self) -> torch.Tensor:
        """[V_local, M]; last stage only."""
        chunk = self.chunks[-1]
        weight = chunk.shared_embedding_or_output_weight() if self.model.tie_embeddings else chunk.output_layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def tell(self, values: list[int] | None) -> list[int]:
        """What the last stage says, on all ranks of the replica. A broadcast of a few bytes from its first tensor rank."""
        group = self.context.groups.mp
        if group.size() == 1:
            assert values is not None
            return values
        told = [values]
        source = dist.get_process_group_ranks(group)[-self.context.layout.tensor]
        dist.broadcast_object_list(told, src=source, group=group, device=self.context.device)
        assert told[0] is not None
        return told[0]

    def close(self) -> None:
        """Wait for messages between stages that are on their way."""
        self._link.close()

    def _forward(
        self,
        tokens_BS: torch.Tensor,
        functions: Mapping[str, HookFunction],
        *,
        positions_BS: torch.Tensor | None = None,
        labels_BS: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        chunk, layout = self.chunks[0].eval(), self.context.layout
        self.tokens_BS, self.positions_BS, real = tokens_BS, positions_BS, tokens_BS.shape[1]
        tokens_BS = self._padded(tokens_BS)
        size, length = tokens_BS.shape
        if self.model.position == "learned" and real > self.model.seq_len:
            raise ConfigError(f"the text has {real} tokens, this model has learned positions for {self.model.seq_len}")
        if length > real:
            functions = {name: partial(_on_text, function, real) for name, function in functions.items()}
        if not self.context.is_first_stage:
            shape = (length // layout.tensor if layout.sequence else length, size, self.model.d_model)
            chunk.set_input_tensor(self._link.receive(shape, chunk.config.params_dtype))
        try:
            with hooked(self.chunks, functions):
                output = chunk(tokens_BS, positions_BS, labels_BS=labels_BS)
        finally:
            chunk.set_input_tensor(None)
            self.tokens_BS = self.positions_BS = None
        if self.context.is_last_stage:
            return output
        self._link.send(output)
        return None

    def _padded(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        # Sequence parallelism cuts the sequence into equal parts; what follows the text, causal attention never sees.
        layout = self.context.layout
        missing = -tokens_BS.shape[1] % layout.tensor if layout.sequence else 0
        return F.pad(tokens_BS, (0, missing))


def _on_text(function: HookFunction, length: int, x_BSM: torch.Tensor) -> torch.Tensor | None:
    """Call a function with the text without its padding."""
    replacement = function(x_BSM[:, :length].contiguous())
    return None if replacement is None else torch.cat([replacement, x_BSM[:, length:]], dim=1)


def load_language_model(
    path: Path,
    context: ParallelContext,
    *,
    checkpoint: Path | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> LanguageModel:
    """Load a run of ours or a Hugging Face directory of a family that our GPT can be, each rank its own part, frozen.

    Args:
        checkpoint: of a run; None: its newest.
        precision: auto is the run's own, or the one the Hugging Face files are in.
    Raises:
        ConfigError: `path` is no such model.
        LayoutError: it cannot be cut so, or the layout interleaves.
        CheckpointError: no whole checkpoint, or weights that do not fit.
    """
    config = StreamConfig(lm=str(path), checkpoint=None if checkpoint is None else str(checkpoint), precision=precision)
    kind = find_kind(config)
    if kind == "transformers":
        raise ConfigError(f"{path} is of a family that our GPT cannot be: generation and steering need our GPT")
    # A source wants to know what will be read: the one hook point that every model has.
    source = load_source(config, ["blocks.0.hook_resid_pre"], context)
    assert isinstance(source, GPTSource)
    tokenizer = run_tokenizer(path) if kind == "run" else load_tokenizer(path)
    return LanguageModel(
        source.chunks,
        context,
        seq_len=source.seq_len,
        tokenizer=tokenizer,
        # In our datasets a text begins where another one has ended.
        prefix=[tokenizer.eos_id] if kind == "run" else tokenizer.prefix,
        special_ids=source.special_ids,
    )
