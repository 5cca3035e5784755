"""Token batches in, activations at hook points out: from our GPT on any layout, or from any transformers model.

Shapes: B sequences, S sequence, M d_model, d width of a hook's activation.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from steerscale.errors import ConfigError, LayoutError
from steerscale.models.gpt import GPT
from steerscale.models.hook_points import KINDS, hook_point
from steerscale.models.hooks import HookFunction, hooked
from steerscale.parallel.context import ParallelContext
from steerscale.parallel.p2p import StageLink


class ActivationSource(Protocol):
    """A frozen language model, ready to be read."""

    widths: dict[str, int]
    """Width d of every hook's activation, on all ranks."""
    owned: frozenset[str]
    """Hooks that live on this rank's stage."""
    in_order: tuple[str, ...]
    """All hooks, as a forward pass comes by them."""
    dtype: torch.dtype
    """Of the activations."""
    seq_len: int
    """Tokens of the sequences it is to be given."""
    special_ids: frozenset[int]
    """Begin, end, padding and unknown tokens of its tokenizer, as far as there are any."""
    tokenizer_hash: str | None
    """Hash of its tokenizer; None: unknown."""
    vocab_size: int
    """Token ids it has embeddings for."""
    identity: str
    """What it is, for caches: equal only if the weights are."""

    def run(self, batches: Iterable[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Activations [B, S, d] by hook for each batch of tokens int64 [B, S] on the device, without gradients.

        Whole on every tensor rank of the stage that owns the hook; empty on other stages. All ranks of a replica must
        go through the same batches.
        """
        ...

    def losses(
        self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, functions: Mapping[str, HookFunction]
    ) -> torch.Tensor | None:
        """Losses float32 [B, S] of the whole model with `functions` called at these hooks; None but on the last stage.

        nan of a model that has no logits for each token. All ranks name the same hooks; see `models.hooks.hooked` for what a
        function may do.
        """
        ...

    def close(self) -> None:
        """Wait for messages that are on their way."""
        ...


class _Enough(Exception):
    """Not an error: it ends a forward pass behind the last hook."""


class GPTSource:
    """Our GPT on the context's layout. Its forward pass ends at the last hook point; later stages do nothing.

    Under sequence parallelism activations are gathered at the hook points only; between stages sequence-sharded hidden
    states travel.
    """

    def __init__(
        self,
        chunks: Sequence[GPT],
        hooks: Sequence[str],
        context: ParallelContext,
        *,
        seq_len: int,
        special_ids: Iterable[int] = (),
        tokenizer_hash: str | None = None,
        identity: str = "",
    ) -> None:
        """`chunks` stay whole, for those who want logits from them.

        Raises:
            ConfigError: a hook point the model has not, none or the same twice, or `seq_len` beyond its positions.
            LayoutError: an interleaved layout, or one that cannot cut the sequence.
        """
        model, layout = chunks[0].model, context.layout
        check_source_layout(context)
        _check_hooks(hooks)
        points = {name: hook_point(name, model) for name in hooks}
        if model.position == "learned" and seq_len > model.seq_len:
            raise ConfigError(f"stream.seq_len={seq_len} is longer than the model's {model.seq_len} learned positions")
        if layout.sequence and seq_len % layout.tensor:
            raise LayoutError(
                f"parallel.tensor must divide stream.seq_len under parallel.sequence: {layout.tensor} does not divide "
                f"{seq_len}"
            )
        self.chunks, self.context, self.model = list(chunks), context, model
        self.seq_len, self.special_ids = seq_len, frozenset(special_ids)
        self.tokenizer_hash, self.vocab_size, self.identity = tokenizer_hash, model.tokens, identity
        self.dtype = chunks[0].config.params_dtype
        self.widths = dict.fromkeys(hooks, model.d_model)
        per_stage = model.num_layers // layout.pipeline
        self.owned = frozenset(name for name, at in points.items() if at.layer // per_stage == context.at.pipeline)
        self.in_order = tuple(sorted(hooks, key=lambda name: (points[name].layer, KINDS.index(points[name].kind))))
        self._last_stage = points[self.in_order[-1]].layer // per_stage
        self._link = StageLink(context)

    def run(self, batches: Iterable[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """See `ActivationSource.run`."""
        if self.context.at.pipeline > self._last_stage:
            for _ in batches:
                yield {}
            return
        self.chunks[0].eval()  # whoever trains it on the side may have left it otherwise
        for tokens_BS in batches:
            yield self._forward(tokens_BS)

    @torch.no_grad()
    def _forward(self, tokens_BS: torch.Tensor) -> dict[str, torch.Tensor]:
        chunk, found = self.chunks[0], {}
        if not self.context.is_first_stage:
            chunk.set_input_tensor(self._link.receive(self._hidden_shape(tokens_BS), self.dtype))
        functions = {name: partial(self._keep, found, name) for name in self.widths}
        try:
            with hooked(self.chunks, functions):
                hidden = chunk(tokens_BS)
        except _Enough:
            return found
        finally:
            chunk.set_input_tensor(None)
        self._link.send(hidden)
        return found

    @torch.no_grad()
    def losses(
        self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, functions: Mapping[str, HookFunction]
    ) -> torch.Tensor | None:
        """See `ActivationSource.losses`."""
        chunk = self.chunks[0].eval()
        if not self.context.is_first_stage:
            chunk.set_input_tensor(self._link.receive(self._hidden_shape(tokens_BS), self.dtype))
        with hooked(self.chunks, functions):
            output = chunk(tokens_BS, labels_BS=labels_BS)
        chunk.set_input_tensor(None)
        if self.context.is_last_stage:
            return output.float()
        self._link.send(output)
        return None

    def _keep(self, found: dict[str, torch.Tensor], name: str, activation_BSM: torch.Tensor) -> None:
        found[name] = activation_BSM
        if name == self.in_order[-1]:
            raise _Enough

    def _hidden_shape(self, tokens_BS: torch.Tensor) -> tuple[int, int, int]:
        size, length = tokens_BS.shape
        layout = self.context.layout
        return length // layout.tensor if layout.sequence else length, size, self.model.d_model

    def close(self) -> None:
        """Wait until the next stage has received everything."""
        self._link.close()


class TransformersSource:
    """Any transformers model, whole on every tensor rank. Hooks are module paths; what is read is the module's output.

    A module that returns a tuple is read at its first entry. The forward pass ends behind the hooked module that comes
    last.
    """

    def __init__(
        self,
        model: Any,
        hooks: Sequence[str],
        context: ParallelContext,
        *,
        seq_len: int,
        special_ids: Iterable[int] = (),
        tokenizer_hash: str | None = None,
        identity: str = "",
    ) -> None:
        """`model`: a torch module on the context's device that takes input_ids; it stays whole.

        Raises:
            ConfigError: a path that is no module of the model, is not reached, or does not return [B, S, d].
            LayoutError: a pipeline.
        """
        if context.layout.pipeline > 1:
            raise LayoutError(
                f"parallel.pipeline must be 1 for a transformers model, which every rank holds whole; it is "
                f"{context.layout.pipeline}"
            )
        check_source_layout(context)
        _check_hooks(hooks)
        self.model, self.context = model.eval(), context
        self.seq_len, self.special_ids = seq_len, frozenset(special_ids)
        self.tokenizer_hash, self.identity = tokenizer_hash, identity
        self.vocab_size = model.config.get_text_config().vocab_size
        self.dtype = model.dtype
        self._modules = _find_modules(model, hooks)
        self._last: str | None = None
        probe = self._forward(torch.zeros(1, 2, dtype=torch.int64, device=context.device))
        if missing := [name for name in hooks if name not in probe]:
            raise ConfigError(f"the forward pass of {type(model).__name__} does not come through {missing[0]!r}")
        self.widths = {name: probe[name].shape[-1] for name in hooks}
        self.owned, self.in_order = frozenset(hooks), tuple(probe)
        self._last = self.in_order[-1]

    def run(self, batches: Iterable[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """See `ActivationSource.run`."""
        for tokens_BS in batches:
            yield self._forward(tokens_BS)

    @torch.no_grad()
    def _forward(self, tokens_BS: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        handles = [
            module.register_forward_hook(partial(self._keep, found, name, tokens_BS.shape))
            for name, module in self._modules.items()
        ]
        try:
            self.model(tokens_BS)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _keep(
        self, found: dict[str, torch.Tensor], name: str, shape: torch.Size, module: Any, args: Any, output: Any
    ) -> None:
        x_BSd = output[0] if isinstance(output, tuple) else output
        if not isinstance(x_BSd, torch.Tensor) or x_BSd.ndim != 3 or x_BSd.shape[:2] != shape:
            raise ConfigError(f"{name!r} returns no activation [B, S, d]: name another module")
        found[name] = x_BSd.clone()  # what comes after may write into it
        if name == self._last:
            raise _Enough

    @torch.no_grad()
    def losses(
        self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, functions: Mapping[str, HookFunction]
    ) -> torch.Tensor | None:
        """See `ActivationSource.losses`."""
        handles = [
            self._modules[name].register_forward_hook(partial(self._replace, function))
            for name, function in functions.items()
        ]
        try:
            logits_BSV = getattr(self.model(tokens_BS), "logits", None)
        finally:
            for handle in handles:
                handle.remove()
        if logits_BSV is None or logits_BSV.shape[:2] != labels_BS.shape:
            return torch.full(labels_BS.shape, torch.nan, device=labels_BS.device)
        losses = torch.nn.functional.cross_entropy(
            logits_BSV.float().flatten(0, 1), labels_BS.flatten(), reduction="none"
        )
        return losses.view_as(labels_BS)

    def _replace(self, function: HookFunction, module: Any, args: Any, output: Any) -> Any:
        x_BSd = output[0] if isinstance(output, tuple) else output
        replacement = function(x_BSd.clone())
        if replacement is None:
            return None
        return (replacement, *output[1:]) if isinstance(output, tuple) else replacement

    def close(self) -> None:
        """Nothing is on its way."""


def check_source_layout(context: ParallelContext) -> None:
    """Raise LayoutError for an interleaved layout: its stages hold the model in pieces that a stream would visit twice."""
    virtual = context.layout.virtual_pipeline
    if virtual > 1:
        raise LayoutError(
            f"parallel.virtual_pipeline must be 1 where a language model is streamed, got {virtual}: interleaving shortens "
            "the bubble of a backward pass, and a frozen model has none"
        )


def _check_hooks(hooks: Sequence[str]) -> None:
    if not hooks:
        raise ConfigError("no hook point is given: name at least one, like blocks.3.hook_resid_post")
    if len(set(hooks)) < len(hooks):
        raise ConfigError(f"hook points must differ, got {', '.join(hooks)}")


def _find_modules(model: torch.nn.Module, hooks: Sequence[str]) -> dict[str, torch.nn.Module]:
    modules = dict(model.named_modules())
    for name in hooks:
        if not name or name not in modules:
            close = difflib.get_close_matches(name, list(modules), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see model.named_modules()"
            raise ConfigError(f"there is no module {name!r} in {type(model).__name__}: {hint}")
    return {name: modules[name] for name in hooks}
