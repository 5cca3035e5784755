"""Kernels of `native/pointwise.cpp` against the plain formulas in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from steerscale import native
from steerscale.models import cpu_functions, functions
from steerscale.models.cpu_functions import rms_norm, split_heads, swiglu
from steerscale.models.gpt import rotary_table

pytestmark = pytest.mark.skipif(native.pointwise_library() is None, reason="there is no C++ compiler")

BATCH = 2


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).requires_grad_()


def compare(ours: Callable[..., Any], plain: Callable[..., Any], *inputs: torch.Tensor, calls: list[str]) -> None:
    """Results and gradients; `calls` must have grown: the kernels did it."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for function, tensors in ((ours, inputs), (plain, exact)):
        out = function(*tensors)
        outs = out if isinstance(out, tuple) else (out,)
        upstream = [random(*x.shape, seed=9).detach().to(x.dtype) for x in outs]
        grads = torch.autograd.grad(outs, tensors, upstream)
        results.append([x.float() for x in (*outs, *grads)])
    assert len(calls) == 2
    torch.testing.assert_close(*results, rtol=2e-6, atol=2e-5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    call = cpu_functions._call

    def recorded(name: str, *arguments: Any) -> None:
        found.append(name)
        call(name, *arguments)

    monkeypatch.setattr(cpu_functions, "_call", recorded)
    return found


@pytest.mark.parametrize("width", [1, 7, 16, 40, 86])
def test_swiglu(width: int, calls: list[str]) -> None:
    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    compare(swiglu, plain, random(9, BATCH, 2 * width), calls=calls)


@pytest.mark.parametrize("tokens", [1, 9, 131], ids=str)
@pytest.mark.parametrize("width", [1, 16, 43])
def test_rms_norm(width: int, tokens: int, calls: list[str]) -> None:
    x, weight = random(tokens, BATCH, width), random(width, seed=1)
    compare(
        lambda x, weight: rms_norm(x, weight, 1e-3),
        lambda x, weight: x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight,
        x,
        weight,
        calls=calls,
    )


@pytest.mark.parametrize("queries", [1, 3], ids=["MHA", "GQA"])
@pytest.mark.parametrize("rows", [1, BATCH], ids=["one row of positions", "positions by row"])
@pytest.mark.parametrize("width", [2, 16, 64])
def test_split_heads(width: int, rows: int, queries: int, calls: list[str]) -> None:
    positions = (torch.arange(11) + 3 * torch.arange(rows)[:, None]) % 7
    rotation = rotary_table(positions, width, 100.0, torch.float32)

    def plain(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = qkv.split([queries, 1, 1], dim=3)
        turned = (functions.rotate(x.flatten(2, 3), rotation.double()) for x in (q, k))
        return (*turned, v.flatten(2, 3))

    qkv = random(11, BATCH, 2, queries + 2, width)
    compare(lambda x: split_heads(x, rotation), plain, qkv, calls=calls)
    # Gradients may come in any order of dimensions.
    heads = split_heads(qkv, rotation)
    transposed = [random(*x.transpose(0, 2).shape).detach().transpose(0, 2) for x in heads]
    results = [
        torch.autograd.grad(split_heads(qkv, rotation), qkv, upstream)
        for upstream in (transposed, [x.contiguous() for x in transposed])
    ]
    assert torch.equal(*(gradient for (gradient,) in results))


def test_the_same_bits_for_any_number_of_threads() -> None:
    x, weight, threads = random(200, BATCH, 48), random(48, seed=1), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            out = rms_norm(swiglu(torch.cat((x, x.flip(0)), dim=-1)), weight, 1e-5)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


def test_what_is_large_or_not_finite() -> None:
    gate = torch.tensor([-200.0, -88.0, 88.0, 200.0, 1e30, torch.inf, torch.nan])
    out = swiglu(torch.cat((gate, torch.ones(7))))
    torch.testing.assert_close(out, F.silu(gate), equal_nan=True, rtol=1e-6, atol=1e-30)
    x = torch.ones(2, 5)
    x[0, 3] = torch.nan
    normed = rms_norm(x, torch.ones(5), 1e-5)
    assert normed[0].isnan().all()
    assert normed[1].isfinite().all()


def test_everything_else_is_left_to_torch(calls: list[str]) -> None:
    x = random(3, BATCH, 16).detach()
    torch.testing.assert_close(swiglu(x.bfloat16()), functions.swiglu(x.bfloat16()))
    torch.testing.assert_close(swiglu(x.transpose(0, 1)), functions.swiglu(x.transpose(0, 1)))
    torch.testing.assert_close(
        rms_norm(x.double(), x[0, 0].double(), 0.1), functions.rms_norm(x.double(), x[0, 0].double(), 0.1)
    )
    qkv = random(3, BATCH, 2, 4, 8)
    torch.testing.assert_close(split_heads(qkv, None), functions.split_heads(qkv, None))
    assert not calls
