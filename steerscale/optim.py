"""Learning-rate schedules and optimizer settings; AdamW itself is the engine's.

Schedules are functions of the step alone, so a resumed run needs no scheduler state.
"""

import math
from dataclasses import dataclass
from typing import Literal

from steerscale.config import require


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) and its learning-rate schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the decay (cosine, wsd)."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine to min_lr; warm-up/stable/decay (linear over the last `decay_steps`); or constant."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """wsd: steps of the final decay (None: a tenth of the run). cosine: step at which min_lr is reached (None: the end)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr must be positive, got {self.lr}")
        require(
            0 <= self.min_lr <= self.lr, f"optim.min_lr must be between 0 and optim.lr={self.lr}, got {self.min_lr}"
        )
        require(self.warmup_steps >= 0, f"optim.warmup_steps must not be negative, got {self.warmup_steps}")
        require(
            self.decay_steps is None or self.decay_steps > 0,
            f"optim.decay_steps must be positive or null, got {self.decay_steps}",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name} must be in [0, 1), got {value}")
        for name in ("weight_decay", "clip"):
            require(getattr(self, name) >= 0, f"optim.{name} must not be negative, got {getattr(self, name)}")
        require(self.eps > 0, f"optim.eps must be positive, got {self.eps}")


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0) in a run of `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay = config.decay_steps or max(total_steps // 10, 1)
        progress = min(max(step + 1 - (total_steps - decay), 0) / decay, 1.0)
        return config.lr + (config.min_lr - config.lr) * progress
    end = config.decay_steps or total_steps
    progress = min((step - config.warmup_steps) / max(end - config.warmup_steps, 1), 1.0)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))
