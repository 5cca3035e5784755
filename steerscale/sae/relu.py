"""ReLU with an L1 penalty (Cunningham et al. 2023, arXiv 2309.08600)."""

import torch

from steerscale.parallel.context import ParallelContext
from steerscale.parallel.select import Selection, select_where
from steerscale.sae.base import Encoded, Losses, SparseAutoencoder
from steerscale.sae.config import SAESpec


class ReLUSAE(SparseAutoencoder):
    """|x - x_hat|^2 + sparsity * sum of f_j |W_dec[j]|: norms in the penalty keep large rows from evading it."""

    def __init__(self, spec: SAESpec, context: ParallelContext, *, dtype: torch.dtype = torch.float32) -> None:
        """See `SparseAutoencoder`."""
        super().__init__(spec, context, dtype=dtype)
        self.into_main_grad = self._norms_are_one  # otherwise the penalty has a gradient for W_dec as well

    def losses(self, encoded: Encoded, target_Bd: torch.Tensor) -> Losses:
        """See `SparseAutoencoder.losses`."""
        selection = select_where(encoded.pre_BN > 0)
        values = self.values(encoded, selection)
        self.note_active(selection, values)
        error_Bd = self.sum_over_shards(self.partial(values, selection)) + self.b_dec - target_Bd
        penalty = self.sparsity * (values * self.decoder_norms()[selection.latents]).sum()
        total = error_Bd.square().sum() + penalty
        return self.report(total, error_Bd=error_Bd, target_Bd=target_Bd, values=values, penalty=penalty)

    def decoder_norms(self) -> torch.Tensor:
        """[N] norms of the decoder's rows, summed over the hook points of a crosscoder."""
        if self._norms_are_one:
            return torch.ones(len(self.W_dec), device=self.W_dec.device)
        parts = self.W_dec.unflatten(1, (len(self.spec.outputs), -1))
        return parts.norm(dim=2).sum(dim=1)

    @property
    def _norms_are_one(self) -> bool:
        return self.spec.config.unit_norm_decoder and len(self.spec.outputs) == 1

    def features(self, pre_BN: torch.Tensor) -> tuple[Selection, torch.Tensor]:
        """See `SparseAutoencoder.features`."""
        selection = select_where(pre_BN > 0)
        return selection, selection.gather(pre_BN)
