"""Toy models of superposition (Elhage et al. 2022): more sparse features than dimensions, stored and read back.

    x: n features, each 0 but with probability p, then even in [0, 1];  h = W x in m dimensions;  x' = ReLU(W'h + b)
    loss: the mean over features of importance_i (x_i - x'_i)^2

Many toys are trained at once. Shapes: K toys, B samples, n features, m hidden dimensions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

REPRESENTED = 0.5
"""A feature whose column of W is longer than this counts as represented: lengths gather near 0 and 1."""


class Toys(NamedTuple):
    """Trained toys."""

    W_Kmn: torch.Tensor
    b_Kn: torch.Tensor

    def hidden(self, x_KBn: torch.Tensor) -> torch.Tensor:
        """[K, B, m]"""
        return x_KBn @ self.W_Kmn.mT

    def outputs(self, h_KBm: torch.Tensor) -> torch.Tensor:
        """[K, B, n]"""
        return torch.relu(h_KBm @ self.W_Kmn + self.b_Kn.unsqueeze(1))


def draw_features(
    shape: tuple[int, int, int], p_K: torch.Tensor, generator: torch.Generator, *, correlation: float = 0.0
) -> torch.Tensor:
    """Features [K, B, n] with each toy's probability of being active.

    Args:
        correlation: probability that feature 2i + 1 is switched on by feature 2i; else they are independent.
    """
    on_KBn = torch.rand(shape, generator=generator) < p_K[:, None, None]
    if correlation:
        first = on_KBn[..., 0::2]
        on_KBn[..., 1::2] |= first & (torch.rand(first.shape, generator=generator) < correlation)
    return torch.rand(shape, generator=generator) * on_KBn


def train_toys(
    p_K: torch.Tensor,
    importance_Kn: torch.Tensor,
    *,
    hidden: int,
    steps: int,
    batch_size: int,
    seed: int,
    lr: float = 1e-2,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Toys:
    """Train a toy for each p and row of importances: Adam, cosine to 0."""
    number, features = importance_Kn.shape
    generator = torch.Generator().manual_seed(seed)
    W_Kmn = (torch.randn(number, hidden, features, generator=generator) / features**0.5).requires_grad_()
    b_Kn = torch.zeros(number, features, requires_grad=True)
    toys = Toys(W_Kmn, b_Kn)
    optimizer = torch.optim.Adam([W_Kmn, b_Kn], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x_KBn = draw_features((number, batch_size, features), p_K, generator)
        loss_K = toy_losses(toys, x_KBn, importance_Kn)
        optimizer.zero_grad()
        # Losses shrink with p; each toy is to take steps of its own size.
        (loss_K / p_K).sum().backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, steps)
    return Toys(W_Kmn.detach(), b_Kn.detach())


def toy_losses(toys: Toys, x_KBn: torch.Tensor, importance_Kn: torch.Tensor) -> torch.Tensor:
    """[K]"""
    errors_KBn = (toys.outputs(toys.hidden(x_KBn)) - x_KBn).square()
    return (errors_KBn * importance_Kn.unsqueeze(1)).mean(dim=(1, 2))


def lengths(toys: Toys) -> torch.Tensor:
    """[K, n] lengths of the features' directions."""
    return toys.W_Kmn.norm(dim=1)


def interference(toys: Toys) -> torch.Tensor:
    """[K, n] sum over the other features j of (W_i/|W_i| . W_j)^2: how much a feature's direction is shared."""
    unit_Kmn = toys.W_Kmn / toys.W_Kmn.norm(dim=1, keepdim=True).clamp_min(1e-9)
    overlaps_Knn = (unit_Kmn.mT @ toys.W_Kmn).square()
    return overlaps_Knn.sum(-1) - overlaps_Knn.diagonal(dim1=-2, dim2=-1)
