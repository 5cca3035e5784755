"""Hand-written backward passes against autograd through the plain formulas."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from steerscale.models.functions import CHUNK_ELEMENTS, cross_entropy, rms_norm, rotate, split_heads, swiglu
from steerscale.models.gpt import rotary_table
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.ranks import RankPool

SEQUENCE, BATCH, GROUPS, WIDTH, VOCABULARY = 7, 2, 3, 8, 40


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def positions(batch: int) -> torch.Tensor:
    """Other ones in each row, as where documents begin anew."""
    return (torch.arange(SEQUENCE) + 3 * torch.arange(batch)[:, None]) % 5


@pytest.mark.parametrize("queries", [1, 2], ids=["MHA", "GQA"])
@pytest.mark.parametrize("batch", [1, BATCH], ids=["one row of positions", "positions by row"])
def test_split_heads_rotates(queries: int, batch: int) -> None:
    qkv = random(SEQUENCE, BATCH, GROUPS, queries + 2, WIDTH)
    rotation = rotary_table(positions(batch), WIDTH, 100.0, torch.float64)
    got = split_heads(qkv, rotation)
    q, k, v = qkv.split([queries, 1, 1], dim=3)
    expected = rotate(q.flatten(2, 3), rotation), rotate(k.squeeze(3), rotation), v.squeeze(3)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other)
    weights = [random(*one.shape, seed=seed) for seed, one in enumerate(expected)]
    gradients = [
        torch.autograd.grad(torch.cat([(one * weight).flatten() for one, weight in zip(outputs, weights)]).sum(), qkv)[
            0
        ]
        for outputs in (got, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_rotate_turns_pairs_by_their_angle() -> None:
    x = random(SEQUENCE, 1, 1, WIDTH)
    turned = rotate(x, rotary_table(positions(1), WIDTH, 100.0, torch.float64))
    pairs, turned_pairs = (torch.complex(*one.chunk(2, dim=-1)) for one in (x, turned))
    angles = positions(1).T[:, :, None, None] * 100.0 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    torch.testing.assert_close(turned_pairs, pairs * torch.exp(1j * angles), rtol=1e-6, atol=1e-6)


def test_split_heads_without_rotation() -> None:
    qkv = random(SEQUENCE, BATCH, GROUPS, 4, WIDTH)
    q, k, v = split_heads(qkv, None)
    assert torch.equal(q, qkv[..., :2, :].flatten(2, 3))
    assert torch.equal(torch.stack((k, v), dim=3), qkv[..., 2:, :])


def test_swiglu_gradient() -> None:
    gate_up = random(5, 3, 16)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    torch.testing.assert_close(swiglu(gate_up), expected)
    assert torch.autograd.gradcheck(swiglu, gate_up)


def test_rms_norm_repeats_torch() -> None:
    x, weight = random(5, 3, 16, dtype=torch.float32), random(16, seed=1, dtype=torch.float32)
    got, expected = rms_norm(x, weight, 1e-3), F.rms_norm(x, (16,), weight, 1e-3)
    torch.testing.assert_close(got, expected)
    upstream = random(5, 3, 16, seed=2, dtype=torch.float32)
    for one, other in zip(*(torch.autograd.grad((out * upstream).sum(), (x, weight)) for out in (got, expected))):
        torch.testing.assert_close(one, other)


def losses_and_gradient(dtype: torch.dtype, scale: float, tensor: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """On this rank: losses [S, B], the gradient of its columns, and whether that took the logits' memory."""
    with initialize(ParallelLayout(tensor=tensor)) as context:
        columns = VOCABULARY // tensor
        mine = slice(context.at.tensor * columns, (context.at.tensor + 1) * columns)
        logits = (scale * random(SEQUENCE, BATCH, VOCABULARY)[..., mine]).to(dtype).detach().requires_grad_()
        labels = torch.arange(SEQUENCE * BATCH).view(SEQUENCE, BATCH) * 5 % VOCABULARY
        inner = logits * 1
        losses = cross_entropy(inner, labels, context.groups.tp)
        (gradient,) = torch.autograd.grad(losses, inner, random(SEQUENCE, BATCH, seed=1).float())
        return losses.detach(), gradient, gradient.data_ptr() == inner.data_ptr()


@pytest.mark.parametrize("tensor", [1, 2], ids=["TP1", "TP2"])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1), (torch.float32, 200), (torch.bfloat16, 3)])
def test_cross_entropy_repeats_torch(pool: RankPool, dtype: torch.dtype, scale: float, tensor: int) -> None:
    parts = pool.run(losses_and_gradient, dtype, scale, tensor, ranks=tensor)
    logits = (scale * random(SEQUENCE, BATCH, VOCABULARY)).to(dtype).float().detach().requires_grad_()
    labels = torch.arange(SEQUENCE * BATCH) * 5 % VOCABULARY
    expected = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view(SEQUENCE, BATCH)
    (gradient,) = torch.autograd.grad(expected, logits, random(SEQUENCE, BATCH, seed=1).float())
    got = torch.cat([part[1] for part in parts], dim=-1)
    for losses, _, in_place in parts:
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-5)
        assert in_place
    # The gradient is rounded once, to the type of the logits.
    torch.testing.assert_close(got, gradient.to(dtype), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)


def test_cross_entropy_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = losses_and_gradient_alone()
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 3 * VOCABULARY)
    for one, other in zip(whole, losses_and_gradient_alone()):
        assert torch.equal(one, other)


def losses_and_gradient_alone() -> tuple[Any, Any]:
    losses, gradient, _ = losses_and_gradient(torch.float32, 1.0, 1)
    return losses, gradient


def test_cross_entropy_keeps_no_float32_logits() -> None:
    with initialize(ParallelLayout()) as context:
        logits = random(SEQUENCE, BATCH, VOCABULARY, dtype=torch.bfloat16)
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            cross_entropy(logits * 1, torch.zeros(SEQUENCE, BATCH, dtype=torch.int64), context.groups.tp)
    assert kept
    assert all(tensor.numel() <= SEQUENCE * BATCH for tensor in kept if tensor.dtype == torch.float32)
