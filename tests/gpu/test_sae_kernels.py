"""The Triton kernels against dense products: on a GPU, or on the CPU with TRITON_INTERPRET=1 (as tests/sae runs them)."""

import os

import pytest
import torch

from steerscale.parallel.select import Selection, batch_topk_across, select_where, topk_across
from steerscale.sae import kernels
from steerscale.sae.sparse import decode, pre_activations, selected_pre_activations

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device, or TRITON_INTERPRET=1"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _triton_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        from steerscale.sae import kernels_triton

        monkeypatch.setattr(kernels, "_triton", lambda *tensors: kernels_triton)
    torch.backends.cuda.matmul.allow_tf32 = False


def choose(kind: str, pre: torch.Tensor) -> Selection:
    if kind == "topk":
        return topk_across(pre, 6)
    if kind == "batch topk":
        return batch_topk_across(pre, 6 * len(pre))[0]
    if kind == "none":
        return select_where(torch.zeros_like(pre, dtype=torch.bool))
    if kind == "one latent on every token":  # longer than a tile, every other latent empty
        mask = torch.zeros_like(pre, dtype=torch.bool)
        mask[:, 3] = True
        return select_where(mask)
    if kind == "all":
        return topk_across(pre, pre.shape[1])
    pattern = torch.tensor([0, 0, 3, 5, 5, 5, pre.shape[1] - 1], device=pre.device)
    offsets = torch.arange(len(pre) + 1, device=pre.device) * len(pattern)
    return Selection(offsets=offsets, latents=pattern.repeat(len(pre)), num_latents=pre.shape[1])


def assert_near(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    error = (actual.float() - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error < RELATIVE_ERROR[actual.dtype], f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("shape", [(20, 24, 40), (1, 300, 33)], ids=str)
@pytest.mark.parametrize("kind", ["topk", "batch topk", "none", "one latent on every token", "all", "repeated"])
def test_triton_agrees_with_dense_autograd(kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, width, latents = shape
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*size, generator=generator) for size in ((rows, width), (latents, width), (latents, width))]
    leaves[2] /= leaves[2].norm(dim=1, keepdim=True)
    x, W_enc, W_dec = (leaf.to(DEVICE, dtype).requires_grad_() for leaf in leaves)
    exact = [leaf.detach().float().requires_grad_() for leaf in (x, W_enc, W_dec)]
    pre = pre_activations(x, W_enc)
    selection = choose(kind, pre)
    target = torch.randn(rows, width, generator=generator).to(DEVICE)

    values = selected_pre_activations(pre, selection, x_BD=x, W_enc_ND=W_enc)
    sparse = decode(values, selection, W_dec, project=True)
    count = selection.dense(torch.ones(selection.nnz, device=DEVICE))
    dense = (count * (exact[0] @ exact[1].t())) @ exact[2]
    assert_near(sparse, dense, "x_hat")
    # A given gradient, not that of a loss: the roundings of x_hat are not to be counted again.
    grads = torch.autograd.grad(sparse, (x, W_enc, W_dec), target.to(dtype))
    expected = list(torch.autograd.grad(dense, exact, target.to(dtype).float()))
    expected[2] = expected[2] - (expected[2] * exact[2]).sum(1, keepdim=True) * exact[2]
    for name, actual, correct in zip(("d_x", "d_W_enc", "d_W_dec"), grads, expected):
        assert_near(actual, correct, name)


def test_triton_adds_into_main_grad() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 20, generator=generator).to(DEVICE)
    weight = torch.nn.Parameter(torch.randn(30, 20, generator=generator).to(DEVICE, torch.bfloat16))
    weight.main_grad = torch.full((30, 20), 2.0, device=DEVICE)
    selection = topk_across(torch.randn(9, 30, generator=generator).to(DEVICE), 3)
    values = torch.randn(selection.nnz, generator=generator).to(DEVICE)
    out = decode(values, selection, weight, into_main_grad=True)
    out.backward(x.bfloat16())
    expected = 2 + selection.dense(values).t() @ x.bfloat16().float()
    assert_near(weight.main_grad, expected, "main_grad")
    assert weight.grad_added_to_main_grad


def test_triton_takes_tensors_that_are_not_contiguous() -> None:
    generator = torch.Generator().manual_seed(0)
    y, W = (
        torch.randn(20, 9, generator=generator).to(DEVICE).t(),
        torch.randn(30, 40, generator=generator).to(DEVICE)[:, ::2],
    )
    selection = topk_across(torch.randn(9, 30, generator=generator).to(DEVICE), 3)
    values = torch.randn(2 * selection.nnz, generator=generator).to(DEVICE)[::2]
    dense = selection.dense(values)
    assert_near(kernels.sum_rows(values, selection, W), dense @ W, "sum_rows")
    assert_near(kernels.sum_tokens(values, selection, y), dense.t() @ y, "sum_tokens")
    assert_near(kernels.pair_products(y, selection, W), selection.gather(y @ W.t()), "pair_products")
    assert_near(kernels.sum_entries(values, selection), dense.sum(0), "sum_entries")
