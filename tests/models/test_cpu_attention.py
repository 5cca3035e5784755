"""Attention on the CPU by our own kernels, against torch's in float64."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from steerscale import native
from steerscale.accelerators import TORCH, KernelChoice, choose_kernels, kernel_table
from steerscale.models import cpu_attention
from steerscale.models.core_attention import CoreAttention, NativeAttention
from steerscale.models.cpu_attention import causal_attention
from steerscale.models.gpt import GPT, transformer_config
from steerscale.models.kv_cache import cached
from steerscale.models.sharding import initialize_parameters
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from tests.models.gpts import LLAMA as NARROW

LLAMA = replace(NARROW, d_head=16)

pytestmark = pytest.mark.skipif(native.attention_library() is None, reason="no C++ compiler")

SHAPES = [
    # S, B, H, G, D
    (1, 1, 1, 1, 16),
    (7, 2, 2, 1, 16),
    (64, 1, 3, 3, 48),
    (65, 2, 4, 2, 64),
    (200, 1, 2, 2, 128),
    (513, 1, 2, 1, 32),  # more than one block of keys, the last with one query
    (1100, 1, 1, 1, 80),
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(S: int, B: int, H: int, G: int, D: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(S, B, heads, D, generator=generator).requires_grad_() for heads in (H, G, G)]


def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["plain", "one key takes all"])
def test_attention_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], scale: float) -> None:
    tensors = inputs(*shape)
    with torch.no_grad():
        tensors[0].mul_(scale)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    gradient = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    out, expected = causal_attention(*tensors), by_torch(*exact)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=5e-6 * scale)
    grads = torch.autograd.grad(out, tensors, gradient)
    for name, ours, theirs in zip("qkv", grads, torch.autograd.grad(expected, exact, gradient.double())):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=3e-5 * scale, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_strides_do_not_matter() -> None:
    S, B, H, G, D = 70, 2, 4, 2, 32
    qkv = torch.randn(B, S, H + 2 * G, D, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    views = [x.requires_grad_() for x in qkv.split([H, G, G], dim=2)]
    apart = [x.detach().contiguous().requires_grad_() for x in views]
    odd = [x.detach().mT.contiguous().mT.requires_grad_() for x in views]
    assert odd[0].stride(-1) != 1
    results = []
    for tensors in (apart, views, odd):
        out = causal_attention(*tensors)
        gradient = torch.linspace(-1, 1, out.numel()).view(D, H, B, S).permute(3, 2, 1, 0)
        results.append((out, *torch.autograd.grad(out, tensors, gradient)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result))


def test_results_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    tensors, results = inputs(130, 3, 2, 1, 32), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        out = causal_attention(*tensors)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_what_is_not_finite_stays_so() -> None:
    q, k, v = (x.detach() for x in inputs(96, 1, 2, 2, 16))
    q[40, 0, 1, 3] = torch.nan
    k[80, 0, 0, 0] = torch.nan
    out = causal_attention(q, k, v)
    assert out[40, 0, 1].isnan().all()
    assert out[80:, 0, 0].isnan().all()
    out[40, 0, 1], out[80:, 0, 0] = 0, 0
    assert out.isfinite().all(), "nothing else is touched"


def test_torch_knows_the_operation() -> None:
    torch.library.opcheck(cpu_attention._forward, tuple(inputs(20, 2, 2, 1, 16)))


def test_a_model_computes_the_same_and_keeps_masks_and_caches_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []

    def counted(q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        calls.append(q.shape)
        return causal_attention(q, *others)

    monkeypatch.setattr(cpu_attention, "causal_attention", counted)
    tokens = torch.randint(LLAMA.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    documents, positions = torch.tensor([[0] * 9 + [1] * 7, [0] * 16]), torch.arange(16).expand(2, 16)
    results: list[Any] = []
    with initialize(ParallelLayout(micro_batch_size=2)) as context:
        for kernels in (TORCH, KernelChoice(attention="native")):
            chunk = GPT(LLAMA, transformer_config(LLAMA, context, kernels=kernels), context)
            initialize_parameters([chunk], context, seed=3)
            attention = chunk.decoder.layers[0].self_attention.core_attention
            assert type(attention) is (NativeAttention if kernels is not TORCH else CoreAttention)
            losses = chunk(tokens[:, :-1], None, None, tokens[:, 1:])
            losses.sum().backward()
            grads = {name: p.grad for name, p in chunk.named_parameters()}
            assert len(calls) == (0 if kernels is TORCH else LLAMA.num_layers)
            with torch.no_grad(), cached([chunk], 2, 16) as cache:
                cache.begin(positions)
                others = chunk(tokens[:, :-1], positions), chunk(tokens[:, :-1], None, documents)
            results.append((losses.detach(), grads, others))
    assert len(calls) == LLAMA.num_layers
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "native"),
        ({"compiled": True}, "native"),
        ({"wish": "torch"}, "torch"),
        ({"on_cuda": True}, "torch"),
        ({"precision": "bf16"}, "torch"),
        ({"documents": True}, "torch"),
    ],
    ids=str,
)
def test_it_is_chosen_where_it_can_run(
    settings: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerscale.accelerators._PROBES", {})
    asked: dict[str, Any] = {"wish": "auto", "on_cuda": False, "model": LLAMA, **settings}
    choice = choose_kernels(asked.pop("wish"), **asked)
    assert choice.attention == expected
    uses = [row.use for row in kernel_table(choice) if row.name == "steerscale"]
    assert any("attention" in use for use in uses) == (expected == "native")


def test_without_a_compiler_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("attention_library", "pointwise_library"):
        monkeypatch.setattr(native, library, lambda: None)
    assert choose_kernels("auto", on_cuda=False, model=LLAMA) == TORCH
    with pytest.raises(RuntimeError, match=r"engine\.kernels=torch"):
        causal_attention(*inputs(4, 1, 1, 1, 16))
