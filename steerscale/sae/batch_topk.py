"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): the k B largest latents of a batch of B vectors.

The batch is a micro-batch of all replicas, so k B is exact over data and tensor ranks. At inference a vector stands alone: the
threshold is then a running mean of the smallest value that was selected in training.
"""

import torch

from steerscale.parallel.context import ParallelContext
from steerscale.parallel.select import Selection, batch_topk_across, select_where
from steerscale.sae.config import SAESpec
from steerscale.sae.topk import TopKSAE


class BatchTopKSAE(TopKSAE):
    """See the module's docstring."""

    def __init__(self, spec: SAESpec, context: ParallelContext, *, dtype: torch.dtype = torch.float32) -> None:
        """See `SparseAutoencoder`."""
        super().__init__(spec, context, dtype=dtype)
        self.threshold = torch.full((), -1.0, device=context.device)
        """Running mean of the smallest selected value; negative: there was none yet."""

    def select(self, pre_BN: torch.Tensor) -> Selection:
        """See `TopKSAE.select`."""
        total = self.spec.config.k * len(pre_BN) * self.context.layout.data
        selection, smallest = batch_topk_across(pre_BN.relu(), total, tensor_group=self.group, data_group=self.replicas)
        if self.training:
            decay = self.spec.config.threshold_decay
            mean = torch.where(self.threshold < 0, smallest, self.threshold.lerp(smallest.float(), 1 - decay))
            self.threshold.copy_(torch.where(smallest.isfinite(), mean, self.threshold))
        return selection

    @property
    def scalar_state(self) -> dict[str, torch.Tensor]:
        """See `SparseAutoencoder.scalar_state`."""
        return {**super().scalar_state, "batch_threshold": self.threshold}

    def features(self, pre_BN: torch.Tensor) -> tuple[Selection, torch.Tensor]:
        """See `SparseAutoencoder.features`."""
        selection = select_where(pre_BN > self.threshold.clamp_min(0).to(pre_BN.dtype))
        return selection, selection.gather(pre_BN)
