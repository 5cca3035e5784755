"""A quick look at what an SAE is worth in its model, whatever format it came in: `sae_eval` has the whole picture for runs.

Shapes: B sequences, S sequence, M d_model.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from steerscale.config import require
from steerscale.errors import LayoutError
from steerscale.interp.interventions import ablate, capture
from steerscale.interp.sources import SAESource
from steerscale.interp.steering import acting
from steerscale.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Splice:
    """Means over tokens that the SAE knows; losses over all tokens, in nats."""

    l0: float
    """Active latents of a vector."""
    fvu: float
    """sum |x - x_hat|^2 / sum |x - mean x|^2; nan of fewer than two vectors, as is l0 of none."""
    loss: float
    """Of the model as it is."""
    spliced_loss: float
    """With the reconstruction in the activation's place."""
    zero_loss: float
    """With zeros there."""
    tokens: int
    """That were predicted."""

    @property
    def recovered(self) -> float:
        """Share of the loss between zeros and the activation that it wins back; nan where zeros cost nothing."""
        won = self.zero_loss - self.loss
        return (self.zero_loss - self.spliced_loss) / won if won else math.nan


@torch.no_grad()
def evaluate_splice(lm: LanguageModel, source: SAESource, sequences: Iterable[torch.Tensor]) -> Splice:
    """Read `sequences` (int64 [B, S + 1]); four forward passes. Tokens that the SAE does not know stay as they are.

    Raises LayoutError under a pipeline.
    """
    if lm.context.layout.pipeline > 1:
        raise LayoutError(f"parallel.pipeline must be 1 to evaluate an SAE here, it is {lm.context.layout.pipeline}")
    sae, hook = source.sae.to(lm.context.device), source.hook
    sums, losses, known, tokens = [0.0, 0.0], [0.0, 0.0, 0.0], [], 0

    def spliced(acts_BS1: torch.Tensor, x_BSM: torch.Tensor) -> torch.Tensor:
        return torch.where(acts_BS1, sae.reconstruct(x_BSM).to(x_BSM.dtype), x_BSM)

    for batch_BT in sequences:
        inputs_BS, labels_BS = batch_BT[:, :-1].contiguous(), batch_BT[:, 1:].contiguous()
        acts_BS = acting(lm, inputs_BS, spare_special=source.spare_special, spare_first=source.spare_first)
        x = capture(lm, inputs_BS, [hook])[hook][acts_BS].float()
        f = sae.encode(x)
        sums[0] += float((f > 0).sum())
        sums[1] += float((x - sae.reconstruct(x)).double().square().sum())
        known.append(x)
        zeros = ablate(positions=acts_BS)
        for index, functions in enumerate(({}, {hook: partial(spliced, acts_BS.unsqueeze(-1))}, {hook: zeros})):
            losses_BS = lm.losses(inputs_BS, labels_BS, functions)
            assert losses_BS is not None
            losses[index] += float(losses_BS.double().sum())
        tokens += labels_BS.numel()
    require(tokens > 0, "there is no text to evaluate on: give more of it")
    x = torch.cat(known).double()
    variance = float((x - x.mean(dim=0)).square().sum())
    return Splice(
        l0=sums[0] / len(x) if len(x) else math.nan,
        fvu=sums[1] / variance if variance else math.nan,
        loss=losses[0] / tokens,
        spliced_loss=losses[1] / tokens,
        zero_loss=losses[2] / tokens,
        tokens=tokens,
    )
