"""TopK (Gao et al. 2024, arXiv 2406.04093): the k largest latents of each vector, and AuxK against dead ones."""

import torch

from steerscale.parallel.select import Selection, topk_across
from steerscale.sae.base import Encoded, Losses, SparseAutoencoder


class TopKSAE(SparseAutoencoder):
    """Exactly k latents a vector, over all shards; those that are negative count as 0."""

    def losses(self, encoded: Encoded, target_Bd: torch.Tensor) -> Losses:
        """See `SparseAutoencoder.losses`."""
        selection = self.select(encoded.pre_BN)
        values = self.values(encoded, selection).relu()
        self.note_active(selection, values)
        partials = [*self.partials(values, selection), *self._aux_partial(encoded)]
        sums = self.sum_over_shards(torch.stack(partials) if len(partials) > 1 else partials[0].unsqueeze(0))
        has_aux = self._uses_aux
        outputs = sums[:-1] if has_aux else sums
        errors = [output + self.b_dec - target_Bd for output in outputs.cumsum(0)]
        total = torch.stack([error.square().sum() for error in errors]).mean()
        aux_error = None
        if has_aux:
            # Dead latents learn to say what is missing; what is missing does not learn from them.
            missing_Bd = -errors[-1].detach()
            share_B = (sums[-1] - missing_Bd).square().sum(1) / missing_Bd.square().sum(1).clamp_min(1e-30)
            aux_error = self.spec.config.aux_coefficient * share_B.nan_to_num().sum()
            total = total + aux_error
        return self.report(total, error_Bd=errors[-1], target_Bd=target_Bd, values=values, aux_error=aux_error)

    def select(self, pre_BN: torch.Tensor) -> Selection:
        """The active latents in training."""
        return topk_across(pre_BN, self.spec.config.k, self.group)

    def partials(self, values: torch.Tensor, selection: Selection) -> list[torch.Tensor]:
        """Parts of the reconstruction whose running sums are to match the target; of this rank's latents."""
        return [self.partial(values, selection)]

    @property
    def _uses_aux(self) -> bool:
        return self.training and self.num_dead > 0 and self.spec.aux_k > 0

    def _aux_partial(self, encoded: Encoded) -> list[torch.Tensor]:
        """What the largest dead latents would add, with the reconstruction of the error in one all-reduce."""
        if not self._uses_aux:
            return []
        pre_BN = encoded.pre_BN.masked_fill(~self.dead, -torch.inf)
        selection = topk_across(pre_BN, min(self.spec.aux_k, self.num_dead), self.group)
        return [self.partial(self.values(encoded, selection).relu(), selection)]

    def features(self, pre_BN: torch.Tensor) -> tuple[Selection, torch.Tensor]:
        """See `SparseAutoencoder.features`."""
        selection = topk_across(pre_BN, self.spec.config.k, self.group)
        return selection, selection.gather(pre_BN).relu()
