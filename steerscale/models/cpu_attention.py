"""Causal attention on the CPU in float32, by the kernels of `native/attention.cpp`; for autograd one operation.

Shapes: S positions, B batch, H heads, G groups of heads that share keys and values, D head width.
"""

import ctypes
from typing import Any

import torch

from steerscale import native
from steerscale.accelerators import NATIVE_HEAD_WIDTHS


def is_possible(q: torch.Tensor) -> bool:
    """Whether these queries, and keys and values with them, are what the kernels take."""
    return q.device.type == "cpu" and q.dtype == torch.float32 and q.shape[-1] % NATIVE_HEAD_WIDTHS == 0


def causal_attention(q_SBHD: torch.Tensor, k_SBGD: torch.Tensor, v_SBGD: torch.Tensor) -> torch.Tensor:
    """Attention [S, B, H, D], contiguous; scores are scaled by D ** -0.5.

    Any strides, of which the last had better be 1. Memory: no S x S scores; S * B * H numbers for the gradients.

    Raises RuntimeError where there is no C++ compiler (`native.attention_library`).
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_SBHD, k_SBGD, v_SBGD))
    return _forward(q, k, v)[0]


def _library() -> Any:
    library = native.attention_library()
    if library is None:
        raise RuntimeError("this process could not compile native/attention.cpp: use engine.kernels=torch")
    return library


def _numbers(rows: list[tuple[int, ...]]) -> Any:
    flat = [number for row in rows for number in row]
    return (ctypes.c_int64 * len(flat))(*flat)


@torch.library.custom_op("steerscale::causal_attention", mutates_args=())
def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, log_sums = _empty(q)
    with torch.profiler.record_function("steerscale::attention_forward"):
        _library().attention_forward(
            *(x.data_ptr() for x in (q, k, v)),
            _numbers([q.shape[:3], (k.shape[2], q.shape[3])]),
            _numbers([x.stride()[:3] for x in (q, k, v)]),
            q.shape[3] ** -0.5,
            out.data_ptr(),
            log_sums.data_ptr(),
            torch.get_num_threads(),
        )
    return out, log_sums


@torch.library.custom_op("steerscale::causal_attention_backward", mutates_args=())
def _backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor, out: torch.Tensor, log_sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = _empty_gradients(q, k)
    _library().attention_backward(
        *(x.data_ptr() for x in (q, k, v, d_out)),
        _numbers([q.shape[:3], (k.shape[2], q.shape[3])]),
        _numbers([x.stride()[:3] for x in (q, k, v, d_out)]),
        q.shape[3] ** -0.5,
        *(x.data_ptr() for x in (out, log_sums, dq, dk, dv)),
        torch.get_num_threads(),
    )
    return dq, dk, dv


def _empty(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sequence, batch, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, sequence)


def _empty_gradients(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, d_out: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    q, k, v, out, log_sums = ctx.saved_tensors
    return _backward(q, k, v, d_out if d_out.stride(-1) == 1 else d_out.contiguous(), out, log_sums)


# What torch.compile asks for instead of running them.
_forward.register_fake(lambda q, k, v: _empty(q))
_backward.register_fake(lambda q, k, v, d_out, out, log_sums: _empty_gradients(q, k))
_forward.register_autograd(_gradients, setup_context=_save)
