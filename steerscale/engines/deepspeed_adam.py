"""The optimizer that DeepSpeed is given: torch's AdamW, fused, with the same groups as Megatron-Core's.

Without ZeRO, DeepSpeed steps the optimizer as it is: `ClippedAdamW` then measures, clips and skips as the ZeRO optimizers do.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from steerscale.optim import OptimConfig


class ClippedAdamW(torch.optim.AdamW):
    """AdamW on whole parameters with a global gradient norm; leaves everything as it is where that is not finite.

    `_global_grad_norm` and `overflow` are what DeepSpeed asks its optimizers for after a step.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, clip: float, tensor_rank: int, group: dist.ProcessGroup, **settings: Any
    ) -> None:
        """`group`: the ranks that hold one model between them (tensor x pipeline)."""
        super().__init__(groups, **settings)
        self._clip_norm, self._tensor_rank, self._group = clip, tensor_rank, group
        self.overflow, self._global_grad_norm = False, 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. All-reduces one number: the sum of squares of the gradients."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        counted = [p.grad for p in parameters if self._counts(p)]
        squares = torch.stack(torch._foreach_norm(counted)).square().sum() if counted else torch.zeros(())
        squares = squares.float().to(parameters[0].device)
        dist.all_reduce(squares, group=self._group)
        self._global_grad_norm = math.sqrt(squares.item()) if math.isfinite(squares.item()) else math.inf
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        if 0 < self._clip_norm < self._global_grad_norm:
            scale = self._clip_norm / (self._global_grad_norm + 1e-6)
            torch._foreach_mul_([p.grad for p in parameters], scale)
        super().step(closure)

    def _counts(self, parameter: torch.nn.Parameter) -> bool:
        """Every element of the model once: copies on other tensor ranks, and of tied embeddings, do not."""
        if getattr(parameter, "ds_pipe_replicated", False):
            return False
        return self._tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)


def parameter_groups(parameters: Iterable[torch.nn.Parameter], *, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, norms and biases do not; under tensor parallelism, ranks agree about it."""
    matrices, vectors = [], []
    for parameter in parameters:
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw_settings(optim: OptimConfig) -> dict[str, Any]:
    """torch's names for ours."""
    return {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps, "fused": True}


def create_state(adam: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> None:
    """Create AdamW's state now: checkpoints have one form from step 0 and memory is known before step 1."""
    for parameter in parameters:
        adam.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
