"""Gradients of weights that are added to `main_grad`, Megatron-Core's buffer, by the product that makes them.

Otherwise each micro-batch writes a gradient, and Megatron-Core's hook reads it again to add it: with b bytes a parameter that
is 2 b + 8 a micro-batch where one product reads and writes 8.
"""

from functools import cache

import torch


class GradientTarget:
    """Where a weight's gradient goes: into its `main_grad`, or to autograd."""

    def __init__(self, weight: torch.Tensor, into_main_grad: bool) -> None:
        """`into_main_grad` has an effect only if Megatron-Core's DDP has given the weight one."""
        self.weight = weight
        self.buffer: torch.Tensor | None = getattr(weight, "main_grad", None) if into_main_grad else None

    def done(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """What autograd gets for the `gradient` that was written."""
        if self.buffer is None:
            return gradient.to(self.weight.dtype)
        # DDP's hook adds `.grad` to `main_grad` unless this is set, but wants a `.grad` where it overlaps communication.
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.empty_like(self.weight) if self.weight.is_cuda else None

    def add_product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
        """What autograd gets for the gradient a @ b."""
        if self.buffer is None:
            return a @ b
        add_product(self.buffer, a, b)
        return self.done(self.buffer)


def add_product(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """into [M, N] += a [M, K] @ b [K, N]; factors of another type than the sum are multiplied in their own, added in its."""
    if into.dtype == a.dtype:
        into.addmm_(a, b)
    else:
        torch.addmm(into, a, b, out_dtype=into.dtype, out=into)


@cache
def can_add(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `add_product` works here for factors of `dtype` and a sum in float32: in 16 bits only on CUDA."""
    factor, into = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        add_product(into, factor, factor)
    except (RuntimeError, TypeError):  # no kernel, or a torch that knows no out_dtype
        return False
    return bool((into == 17).all())
