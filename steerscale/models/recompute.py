"""Not keeping what is cheap to compute again: the results of norms and activation functions.

A matrix keeps its input for the gradient of its weight, while the norm or activation function before it keeps its own input,
from which that follows: two tensors of which one would do. `torch.utils.checkpoint` drops what lies within a function; here it
is a function's result, which someone else keeps.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def cheap(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, keep: bool
) -> tuple[torch.Tensor, AbstractContextManager]:
    """`function(x)`, and the context in which whoever wants it for a backward pass keeps it or, unless `keep`, only `x`.

    Args:
        function: gives the same each time, contiguous, and keeps `x` for its own backward pass.
    """
    if keep:
        return function(x), nullcontext()
    if torch.compiler.is_compiling():
        # To the compiler this says that the result, too, is not worth keeping.
        return checkpoint(function, x, use_reentrant=False), nullcontext()
    output = function(x)
    return output, _computed_again(output, function, x.detach())


@contextmanager
def _computed_again(
    output: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> Iterator[None]:
    """Whoever would keep `output`, or a view of all of it, computes `function(x)` when it is wanted."""
    where, size = output.data_ptr(), output.numel()

    def pack(tensor: torch.Tensor) -> Any:
        same = tensor.data_ptr() == where and tensor.numel() == size
        return tensor.shape if same else tensor

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad():
            return function(x).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
