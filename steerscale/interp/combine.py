"""Interventions together: where they act, how strongly, and several of them at one hook point.

Shapes: B sequences, S sequence, M d_model.
"""

from collections.abc import Sequence

import torch

from steerscale.language_model import LanguageModel
from steerscale.models.hooks import HookFunction


def acting(
    lm: LanguageModel,
    tokens_BS: torch.Tensor,
    positions_BS: torch.Tensor | None = None,
    *,
    spare_special: bool = True,
    spare_first: int = 0,
) -> torch.Tensor:
    """bool [B, S]: which tokens are neither special nor at one of the first positions; `positions_BS` None: 0 .. S-1."""
    if positions_BS is None:
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    acts_BS = positions_BS >= spare_first
    if spare_special:
        special = torch.tensor(sorted(lm.special_ids), dtype=torch.int64, device=tokens_BS.device)
        acts_BS &= ~torch.isin(tokens_BS, special)
    return acts_BS


def weighted(
    lm: LanguageModel,
    function: HookFunction,
    strength: float,
    *,
    spare_special: bool = True,
    spare_first: int = 0,
) -> HookFunction:
    """What `function` changes times `strength`, at tokens that are not spared; the others stay bit by bit, at 0 all do."""

    def act(x_BSM: torch.Tensor) -> torch.Tensor | None:
        changed_BSM = function(x_BSM.clone()) if strength else None
        if changed_BSM is None:
            return None
        if strength != 1:
            changed_BSM = x_BSM + strength * (changed_BSM - x_BSM)
        if lm.tokens_BS is None:
            return changed_BSM
        acts_BS = acting(lm, lm.tokens_BS, lm.positions_BS, spare_special=spare_special, spare_first=spare_first)
        return torch.where(acts_BS.unsqueeze(-1), changed_BSM, x_BSM)

    return act


def chained(functions: Sequence[HookFunction]) -> HookFunction:
    """One after the other, each on what the one before it returned."""

    def act(x_BSM: torch.Tensor) -> torch.Tensor | None:
        changed = False
        for function in functions:
            replacement_BSM = function(x_BSM)
            if replacement_BSM is not None:
                x_BSM, changed = replacement_BSM, True
        return x_BSM if changed else None

    return functions[0] if len(functions) == 1 else act
