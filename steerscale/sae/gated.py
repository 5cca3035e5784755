"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): a gate decides what is active, a magnitude how much.

gate pi = x W_enc + b_enc, active where pi > 0; magnitude = relu(exp(r_mag) x W_enc + b_mag). The penalty and an auxiliary
reconstruction, by relu(pi) through a frozen decoder, train the gate, which the main loss does not reach.
"""

import torch

from steerscale.parallel.context import ParallelContext
from steerscale.parallel.select import Selection, select_where
from steerscale.sae.base import Encoded, Losses
from steerscale.sae.config import SAESpec
from steerscale.sae.relu import ReLUSAE
from steerscale.sae.sparse import decode


class GatedSAE(ReLUSAE):
    """See the module's docstring; b_enc is the gate's bias."""

    def __init__(self, spec: SAESpec, context: ParallelContext, *, dtype: torch.dtype = torch.float32) -> None:
        """See `SparseAutoencoder`."""
        super().__init__(spec, context, dtype=dtype)
        self.r_mag = self.latent_parameter(len(self.W_enc))
        self.b_mag = self.latent_parameter(len(self.W_enc))

    def losses(self, encoded: Encoded, target_Bd: torch.Tensor) -> Losses:
        """See `SparseAutoencoder.losses`."""
        selection = select_where(encoded.pre_BN > 0)
        gate = self.values(encoded, selection)
        # Less b_enc alone: b_dec's part in `gate` is in the magnitudes as well.
        values = self._magnitudes(gate - self.b_enc[selection.latents], selection)
        self.note_active(selection, values)
        frozen = decode(gate, selection, self.W_dec.detach())
        both = self.sum_over_shards(torch.stack([self.partial(values, selection), frozen]))
        error_Bd = both[0] + self.b_dec - target_Bd
        gate_error_Bd = both[1] + self.b_dec.detach() - target_Bd
        penalty = self.sparsity * (gate * self.decoder_norms().detach()[selection.latents]).sum()
        aux_error = gate_error_Bd.square().sum()
        total = error_Bd.square().sum() + penalty + aux_error
        return self.report(
            total, error_Bd=error_Bd, target_Bd=target_Bd, values=values, penalty=penalty, aux_error=aux_error
        )

    def _magnitudes(self, projected: torch.Tensor, selection: Selection) -> torch.Tensor:
        at = selection.latents
        return (projected * self.r_mag[at].exp() + self.b_mag[at]).relu()

    def features(self, pre_BN: torch.Tensor) -> tuple[Selection, torch.Tensor]:
        """See `SparseAutoencoder.features`."""
        selection = select_where(pre_BN > 0)
        gate = selection.gather(pre_BN).float()
        return selection, self._magnitudes(gate - self.b_enc[selection.latents], selection)
