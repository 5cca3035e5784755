"""Read what a model computes and change it: capture, patch, ablate, add, project out; logit lens and direct attribution.

`patch`, `ablate`, `add_direction` and `project_out` make functions for `models.hooks.hooked` and everything that takes
functions by hook point. They compute alike on all tensor ranks, so they work on any layout. Where a function takes `positions`
it acts there only, and elsewhere the activation stays bit by bit:

    None            all
    slice, ints     of the sequence; negative ones count from its end
    bool [B, S]     of each text

While text is generated with a key/value cache, functions see the new position alone: give None then.

Shapes: B sequences, S sequence, M d_model, V vocabulary, K directions.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
import torch.distributed as dist

from steerscale.config import require
from steerscale.language_model import LanguageModel
from steerscale.models.hook_points import KINDS, hook_point
from steerscale.models.hooks import HookFunction, hooked

Positions = slice | Sequence[int] | torch.Tensor | None


def capture(
    lm: LanguageModel,
    tokens_BS: torch.Tensor,
    names: Sequence[str],
    functions: Mapping[str, HookFunction] | None = None,
) -> dict[str, torch.Tensor]:
    """Activations [B, S, M] at these hook points, whole on every rank of the stage that has them, absent on others.

    `functions` act in the same pass: at one point, capture sees what they returned. Without a pipeline the pass ends at the
    last of the points.
    """
    points = {name: hook_point(name, lm.model) for name in names}
    last = max(names, key=lambda name: (points[name].layer, KINDS.index(points[name].kind)))
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, x_BSM: torch.Tensor) -> None:
        found[name] = x_BSM
        if name == last and lm.context.layout.pipeline == 1:
            raise _Enough

    with hooked(lm.chunks, functions or {}), suppress(_Enough):
        lm.logits(tokens_BS, {name: partial(keep, name) for name in names}, at_B=torch.zeros_like(tokens_BS[:, 0]))
    lm.close()
    return found


class _Enough(Exception):
    """Not an error: it ends a forward pass."""


def patch(replacement: torch.Tensor, positions: Positions = None) -> HookFunction:
    """Put `replacement` there, broadcast to [B, S, M]: an activation of another text, say."""
    return at_positions(positions, lambda x_BSM: replacement.to(x_BSM).expand_as(x_BSM))


def ablate(mean_M: torch.Tensor | None = None, positions: Positions = None) -> HookFunction:
    """Put zeros there, or a mean [M]."""
    if mean_M is None:
        return at_positions(positions, torch.zeros_like)
    return patch(mean_M, positions)


def add_direction(direction_M: torch.Tensor, strength: float = 1.0, positions: Positions = None) -> HookFunction:
    """Add `strength` times a direction [M], as long as it is; strength 0 changes nothing."""
    if strength == 0:
        return lambda x_BSM: None
    return at_positions(positions, lambda x_BSM: x_BSM + strength * direction_M.to(x_BSM))


def project_out(direction_M: torch.Tensor, positions: Positions = None) -> HookFunction:
    """Remove the part along a direction [M]. Raises ConfigError if that is zero."""
    norm = float(direction_M.norm())
    require(norm > 0, "a direction of zeros cannot be projected out")
    unit_M = direction_M / norm

    def remove(x_BSM: torch.Tensor) -> torch.Tensor:
        unit = unit_M.to(x_BSM)
        return x_BSM - (x_BSM @ unit).unsqueeze(-1) * unit

    return at_positions(positions, remove)


def at_positions(positions: Positions, change: HookFunction) -> HookFunction:
    """`change`, at these positions only: elsewhere the activation stays bit by bit."""
    if positions is None:
        return change

    def changed(x_BSM: torch.Tensor) -> torch.Tensor:
        replacement = change(x_BSM.clone())
        assert replacement is not None
        if isinstance(positions, torch.Tensor) and positions.dtype == torch.bool:
            mask_BS1 = positions.to(x_BSM.device).unsqueeze(-1)
            return torch.where(mask_BS1, replacement, x_BSM)
        index = positions if isinstance(positions, slice | torch.Tensor) else list(positions)
        if not isinstance(index, slice):
            length = x_BSM.shape[1]
            for position in torch.as_tensor(index).tolist():
                require(-length <= position < length, f"position {position} is outside of the text's {length} tokens")
        x_BSM[:, index] = replacement[:, index]
        return x_BSM

    return changed


def logit_lens(lm: LanguageModel, tokens_BS: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """What the model would say if the residual stream at these points were its last: logits [B, S, V] (nostalgebraist 2020).

    Final norm and unembedding, applied to each activation; on the last stage, elsewhere the dict is empty. Under a pipeline
    each activation is sent to the last stage, B x S x M, one broadcast a hook point.
    """
    found = capture(lm, tokens_BS, names)
    lenses = {}
    for name in names:
        x_BSM = _to_last_stage(lm, found.get(name), name, tokens_BS)
        if x_BSM is not None:
            with torch.no_grad():
                lenses[name] = lm.unembed(lm.final_norm(x_BSM))
    return lenses


def _to_last_stage(
    lm: LanguageModel, x_BSM: torch.Tensor | None, name: str, tokens_BS: torch.Tensor
) -> torch.Tensor | None:
    layout = lm.context.layout
    if layout.pipeline == 1:
        return x_BSM
    owner = hook_point(name, lm.model).layer // (lm.model.num_layers // layout.pipeline)
    if x_BSM is None:
        dtype = lm.chunks[0].config.params_dtype
        x_BSM = torch.empty(*tokens_BS.shape, lm.model.d_model, dtype=dtype, device=lm.context.device)
    x_BSM = x_BSM.contiguous()
    group = lm.context.groups.pp
    dist.broadcast(x_BSM, src=dist.get_process_group_ranks(group)[owner], group=group)
    return x_BSM if lm.context.is_last_stage else None


@torch.no_grad()
def logit_effect(lm: LanguageModel, directions_KM: torch.Tensor) -> torch.Tensor | None:
    """Logits [K, V] that directions of the residual stream add straight, by no later block; None but on the last stage.

    The unembedding of the direction times the final norm's weight (after LayerNorm's centering), for a residual stream of
    standard deviation (RMSNorm: root mean square) 1; divide by a token's own to have its logits. Of a latent's row of W_dec:
    the tokens it promotes and suppresses.
    """
    if not lm.context.is_last_stage:
        return None
    norm = lm.final_norm
    directions_KM = directions_KM.to(norm.weight)
    if lm.chunks[-1].config.normalization == "LayerNorm":
        directions_KM = directions_KM - directions_KM.mean(dim=-1, keepdim=True)
    return lm.unembed(directions_KM * norm.weight)


@torch.no_grad()
def direct_attribution(
    lm: LanguageModel, tokens_BS: torch.Tensor, parts_BSM: torch.Tensor, targets_BS: torch.Tensor
) -> torch.Tensor | None:
    """How much of the logits of `targets_BS` comes straight from a part of the residual stream; None but on the last stage.

    With the final norm's scale held at what it is in this text, the logit is a sum over parts of the last residual stream
    (plus LayerNorm's bias): float32 [B, S] is the part's own summand. Of a latent: parts_BSM = f_j W_dec[j].
    """
    last = f"blocks.{lm.model.num_layers - 1}.hook_resid_post"
    found = capture(lm, tokens_BS, [last])
    if not lm.context.is_last_stage:
        return None
    x_BSM = found[last].float()
    norm = lm.final_norm
    if lm.chunks[-1].config.normalization == "LayerNorm":
        x_BSM = x_BSM - x_BSM.mean(dim=-1, keepdim=True)
    scale_BS = (x_BSM.square().mean(dim=-1) + norm.eps).sqrt()
    effect_BSV = logit_effect(lm, parts_BSM)
    assert effect_BSV is not None
    return effect_BSV.gather(-1, targets_BS.unsqueeze(-1)).squeeze(-1) / scale_BS
