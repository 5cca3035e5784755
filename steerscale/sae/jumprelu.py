"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435; Gemma Scope, 2408.05147): a threshold for each latent, and L0.

f = z where z > theta. Neither f nor the count of active latents has a useful derivative by theta: the straight-through
estimator takes both from a window of width `bandwidth` around theta. Thresholds are float32 and not logarithms: under Adam
those hardly move.
"""

from typing import Any

import torch

from steerscale.parallel.context import ParallelContext
from steerscale.parallel.select import Selection, select_where
from steerscale.sae.base import Encoded, Losses, SparseAutoencoder
from steerscale.sae.config import SAESpec


class JumpReLUSAE(SparseAutoencoder):
    """|x - x_hat|^2 + sparsity * L0."""

    def __init__(self, spec: SAESpec, context: ParallelContext, *, dtype: torch.dtype = torch.float32) -> None:
        """See `SparseAutoencoder`."""
        super().__init__(spec, context, dtype=dtype)
        self.threshold = self.latent_parameter(len(self.W_enc), fill=spec.config.initial_threshold)

    def losses(self, encoded: Encoded, target_Bd: torch.Tensor) -> Losses:
        """See `SparseAutoencoder.losses`."""
        width = self.spec.config.bandwidth
        # What is just below its threshold has no value, but a derivative.
        lower_N = (self.threshold.detach() - width / 2).clamp_min(0).to(encoded.pre_BN.dtype)
        selection = select_where(encoded.pre_BN > lower_N)
        pre, threshold = self.values(encoded, selection), self.threshold[selection.latents]
        values = _Jump.apply(pre, threshold, width)
        self.note_active(selection, values)
        error_Bd = self.sum_over_shards(self.partial(values, selection)) + self.b_dec - target_Bd
        penalty = self.sparsity * _Step.apply(pre, threshold, width).sum()
        total = error_Bd.square().sum() + penalty
        return self.report(total, error_Bd=error_Bd, target_Bd=target_Bd, values=values, penalty=penalty)

    @torch.no_grad()
    def after_update(self) -> None:
        """See `SparseAutoencoder.after_update`."""
        self.threshold.clamp_min_(0)  # below it a latent would be active at values that a ReLU stops
        super().after_update()

    def features(self, pre_BN: torch.Tensor) -> tuple[Selection, torch.Tensor]:
        """See `SparseAutoencoder.features`."""
        selection = select_where(pre_BN > self.threshold.to(pre_BN.dtype))
        return selection, selection.gather(pre_BN)


class _Jump(torch.autograd.Function):
    """z where z > theta, else 0; by theta: -theta / width within the window (2407.14435, equation 11)."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, theta: torch.Tensor, width: float) -> torch.Tensor:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return z * (z > theta)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (z, theta), (grad,) = ctx.saved_tensors, grads
        return grad * (z > theta), -grad * theta / ctx.width * _window(z, theta, ctx.width), None


class _Step(torch.autograd.Function):
    """1 where z > theta, else 0; by theta: -1 / width within the window (2407.14435, equation 12)."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, theta: torch.Tensor, width: float) -> torch.Tensor:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (z, theta), (grad,) = ctx.saved_tensors, grads
        return None, -grad / ctx.width * _window(z, theta, ctx.width), None


def _window(z: torch.Tensor, theta: torch.Tensor, width: float) -> torch.Tensor:
    return ((z - theta).abs() < width / 2).to(z.dtype)
