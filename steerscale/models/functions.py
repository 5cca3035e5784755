"""Linear layers, rotary position embedding, SwiGLU, RMSNorm and cross-entropy with their own backward: fewer passes over
memory, less kept.

Each equals the plain formula that stands beside it in the tests. Under torch.compile the plain formulas are used, which the
compiler fuses better than any hand-written order of operations.

Shapes: S sequence, B batch, G key/value groups of this rank, R query heads a group, D head width, F width of the MLP on this
rank, V_local this rank's part of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from steerscale.parallel.main_grad import GradientTarget

# Tensors that autograd saves are read only; what is written here is new or has been handed over by its only reader.


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, into_main_grad: bool = False
) -> torch.Tensor:
    """`x @ weight^T + bias`.

    Args:
        into_main_grad: the product that gives the weight's gradient adds it to Megatron-Core's buffer (`parallel.main_grad`).
    """
    if not into_main_grad or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.target = GradientTarget(weight, True)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(end_dim=-2)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = (rows @ weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            d_weight = ctx.target.add_product(rows.t(), x.flatten(end_dim=-2))
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(dim=0)
        return d_x, d_weight, d_bias


def split_heads(
    qkv_SBGED: torch.Tensor, rotation: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, rotated by their positions.

    Args:
        qkv_SBGED: E = R + 2: each group's queries, its key, its value.
        rotation: cosines and sines, [2, S, B or 1, 1, D / 2], of the same type; None: no rotary embedding.
    Returns:
        queries [S, B, G * R, D], keys and values [S, B, G, D].
    """
    *_, entries, _ = qkv_SBGED.shape
    if rotation is not None and not torch.compiler.is_compiling():
        return _RotatedHeads.apply(qkv_SBGED, rotation)  # type: ignore[return-value]
    q, k, v = qkv_SBGED.split([entries - 2, 1, 1], dim=3)
    q, k, v = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
    # As a view, v would keep all of `qkv_SBGED` for the attention's backward pass, beside the rotated q and k.
    return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v.contiguous())


def rotate(x_SBHD: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D / 2) by their angles (Su et al. 2021, in the order of GPT-NeoX and Llama)."""
    cosines, sines = rotation.unbind()
    first, second = x_SBHD.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def _rotate_into(out: torch.Tensor, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
    """out = x rotated; with the sines negated it undoes that, and is the backward pass."""
    half = x.shape[-1] // 2
    (first, second), (out_first, out_second) = (x[..., :half], x[..., half:]), (out[..., :half], out[..., half:])
    torch.mul(first, cosines, out=out_first).addcmul_(second, sines, value=-1)
    torch.mul(second, cosines, out=out_second).addcmul_(first, sines)


def _empty_heads(like: torch.Tensor, sequence: int, batch: int, *heads: int) -> torch.Tensor:
    """New [S, B, *heads]; on a CPU a head's positions lie side by side, as its attention wants them."""
    if like.is_cuda:
        return like.new_empty(sequence, batch, *heads)
    return like.new_empty(batch, *heads[:-1], sequence, heads[-1]).permute(3, 0, 1, 2, 4)


class _RotatedHeads(torch.autograd.Function):
    """`split_heads` with one pass over queries and keys, and gradients written where the QKV matrix wants them."""

    @staticmethod
    def forward(ctx: Any, qkv_SBGED: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sequence, batch, groups, entries, width = qkv_SBGED.shape
        cosines, sines = rotation.unsqueeze(4).unbind()
        ctx.save_for_backward(cosines, sines)
        q = _empty_heads(qkv_SBGED, sequence, batch, groups, entries - 2, width)
        k, v = (_empty_heads(qkv_SBGED, sequence, batch, groups, 1, width) for _ in range(2))
        _rotate_into(q, qkv_SBGED[..., :-2, :], cosines, sines)
        _rotate_into(k, qkv_SBGED[..., -2:-1, :], cosines, sines)
        v.copy_(qkv_SBGED[..., -1:, :])  # no view, as in `split_heads`
        return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        cosines, sines = ctx.saved_tensors
        dq, dk, dv = gradients
        sequence, batch, groups, width = dk.shape
        dq = dq.reshape(sequence, batch, groups, -1, width)
        out = dq.new_empty(sequence, batch, groups, dq.shape[3] + 2, width)
        _rotate_into(out[..., :-2, :], dq, cosines, -sines)
        _rotate_into(out[..., -2:-1, :], dk.unsqueeze(3), cosines, -sines)
        out[..., -1, :] = dv
        return out, None


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 F], the gate first -> silu(gate) * up, [..., F] (Shazeer 2020)."""
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)  # type: ignore[return-value]


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only: silu is cheaper to compute again than to keep."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=d_gate)
        return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019).

    torch has one kernel for it on CUDA; on a CPU it is ten operations, and twice as many backward.
    """
    if x.is_cuda or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        products = (gradient * normal).flatten(end_dim=-2)
        d_weight = products.sum(dim=0)
        # The part of the gradient along x: moving along x changes nothing.
        along = (products @ weight).div_(x.shape[-1]).view_as(scale)
        return (gradient * weight).addcmul_(normal, along, value=-1).mul_(scale), d_weight, None


CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}
"""Logits that are float32 at a time: what fits a core's cache, and 512 MiB of a GPU's memory."""


def cross_entropy(logits_SBV_local: torch.Tensor, labels_SB: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Losses [S, B] in float32 over a vocabulary that is cut over `group`. The backward pass overwrites the logits.

    Softmax and sums are in float32, some rows at a time: neither the logits nor their gradient exist in float32 as a whole
    (unless the model is float32), and the gradient takes the memory of the logits, which nobody else may read afterwards.

    Two all-reduces over `group`: the maxima, then sums and targets; 3 S B numbers in all.

    Args:
        labels_SB: tokens of the whole vocabulary, int64.
    """
    return _CrossEntropy.apply(logits_SBV_local, labels_SB, group)  # type: ignore[return-value]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        columns = logits.shape[-1]
        rows = logits.reshape(-1, columns)
        targets = labels.reshape(-1) - group.rank() * columns
        here = (targets >= 0) & (targets < columns)
        targets = targets.clamp(0, columns - 1).unsqueeze(1)
        maxima = rows.amax(dim=1).float()
        if group.size() > 1:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)  # S B numbers
        sums = torch.empty(2, len(rows), dtype=torch.float32, device=rows.device)
        for part in _chunks(rows):
            torch.sum((rows[part].float() - maxima[part, None]).exp_(), dim=1, out=sums[0, part])
        # The target's logit, from the one rank that has it.
        torch.mul(rows.gather(1, targets).squeeze(1).float() - maxima, here, out=sums[1])
        if group.size() > 1:
            dist.all_reduce(sums, group=group)  # 2 S B numbers
        log_sums = sums[0].log()
        ctx.rows, ctx.shape = rows, logits.shape
        ctx.save_for_backward(maxima + log_sums, targets, here.to(maxima.dtype).neg_().unsqueeze(1))
        return (log_sums - sums[1]).view_as(labels)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        normalisers, targets, minus_here = ctx.saved_tensors
        rows, ctx.rows = ctx.rows, None
        scale = gradient.reshape(-1, 1)
        for part in _chunks(rows):
            softmax = (rows[part].float() - normalisers[part, None]).exp_()
            rows[part] = softmax.scatter_add_(1, targets[part], minus_here[part]).mul_(scale[part])
        return rows.view(ctx.shape), None, None


def _chunks(rows: torch.Tensor) -> list[slice]:
    count = max(1, CHUNK_ELEMENTS["cuda" if rows.is_cuda else "cpu"] // rows.shape[1])
    return [slice(begin, begin + count) for begin in range(0, len(rows), count)]
