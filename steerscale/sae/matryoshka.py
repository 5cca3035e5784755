"""Matryoshka BatchTopK (Bussmann et al. 2025, arXiv 2503.17547): every prefix of the latents is an SAE that reconstructs."""

import torch

from steerscale.parallel.select import Selection
from steerscale.sae.batch_topk import BatchTopKSAE


class MatryoshkaSAE(BatchTopKSAE):
    """The loss is the mean over the nested widths; early latents have to be of general use."""

    @property
    def bounds(self) -> list[int]:
        """Nested widths in latents, ascending to all of them."""
        return [max(round(share * self.spec.width), 1) for share in self.spec.config.prefixes]

    def partials(self, values: torch.Tensor, selection: Selection) -> list[torch.Tensor]:
        """One part for each ring between two nested widths; their running sums are the prefixes' reconstructions."""
        latents, begin, parts = selection.latents + self.first_latent, 0, []
        for end in self.bounds:
            ring = (latents >= begin) & (latents < end)
            parts.append(self.partial(values[ring], selection.keep(ring)))
            begin = end
        return parts
