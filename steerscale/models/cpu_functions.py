"""SwiGLU, RMSNorm and rotated heads on the CPU in float32, each in one pass over memory (`native/pointwise.cpp`).

They stand in for those of `functions`, which take whatever is not float32 on a CPU and what torch.compile makes a graph of.
Shapes as there.
"""

import ctypes
from typing import Any

import torch

from steerscale import native
from steerscale.models import functions


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See `functions.swiglu`."""
    return _SwiGLU.apply(gate_up) if _takes(gate_up) else functions.swiglu(gate_up)  # type: ignore[return-value]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `functions.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps) if _takes(x, weight) else functions.rms_norm(x, weight, eps)  # type: ignore[return-value]


def split_heads(
    qkv_SBGED: torch.Tensor, rotation: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `functions.split_heads`."""
    if rotation is None or not _takes(qkv_SBGED, rotation):
        return functions.split_heads(qkv_SBGED, rotation)
    return _RotatedHeads.apply(qkv_SBGED, rotation)  # type: ignore[return-value]


def _takes(*tensors: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return all(x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() for x in tensors)


def _call(name: str, *arguments: Any) -> None:
    """Tensors as their addresses; the threads are torch's. Named for profiles."""
    addresses = (x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)
    with torch.profiler.record_function(f"steerscale::{name}"):
        getattr(native.pointwise_library(), name)(*addresses, torch.get_num_threads())


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        *shape, width = gate_up.shape
        out = gate_up.new_empty(*shape, width // 2)
        _call("swiglu_forward", gate_up, gate_up.numel() // width, width // 2, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        out, width = torch.empty_like(gate_up), gate_up.shape[-1]
        _call("swiglu_backward", gate_up, gradient.contiguous(), gate_up.numel() // width, width // 2, out)
        return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
        _call("rms_norm_forward", x, weight, scale.numel(), x.shape[-1], eps, out, scale)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
        tensors = (x, weight, scale, gradient.contiguous())
        _call("rms_norm_backward", *tensors, scale.numel(), x.shape[-1], d_x, d_weight)
        return d_x, d_weight, None


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_SBGED: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sequence, batch, groups, entries, width = qkv_SBGED.shape
        ctx.save_for_backward(rotation)
        ctx.shape = qkv_SBGED.shape
        heads = (qkv_SBGED.new_empty(sequence, batch, groups * each, width) for each in (entries - 2, 1, 1))
        return _rotate(qkv_SBGED, tuple(heads), rotation, back=False)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (rotation,) = ctx.saved_tensors
        out = rotation.new_empty(ctx.shape)
        _rotate(out, tuple(x if x.stride(-1) == 1 else x.contiguous() for x in gradients), rotation, back=True)
        return out, None


def _rotate(
    qkv_SBGED: torch.Tensor, heads: tuple[torch.Tensor, ...], rotation: torch.Tensor, *, back: bool
) -> tuple[torch.Tensor, ...]:
    """Fill `heads`, queries, keys and values, or, `back`, qkv from them."""
    sequence, batch, groups, entries, width = qkv_SBGED.shape
    cosines, sines = rotation.unbind()
    angle = (cosines.stride(0), cosines.stride(1) if cosines.shape[1] > 1 else 0)
    strides = [stride for x in heads for stride in x.stride()[:3]]
    shape = (sequence, batch, groups, entries - 2, width)
    _call("rotate_heads", qkv_SBGED, *heads, _numbers(strides), cosines, sines, _numbers(angle), _numbers(shape), back)
    return heads


def _numbers(values: Any) -> Any:
    return (ctypes.c_int64 * len(values))(*values)
