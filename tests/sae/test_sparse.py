"""Sparse encoder and decoder against dense autograd, on every way of computing them that this machine has."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from steerscale import native
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.parallel.megatron import DistributedDataParallel, DistributedDataParallelConfig, TransformerConfig
from steerscale.parallel.select import Selection, select_where, topk_across
from steerscale.parallel.topk import top_rows
from steerscale.sae import kernels
from steerscale.sae.sparse import decode, pre_activations, selected_pre_activations

NAMES = ["x", "W_enc", "b_enc", "W_dec"]
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
}


@pytest.fixture(params=["compiled", "torch"])
def means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compiled kernels, and a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    else:
        assert native.library() is not None, "these tests need a C++ compiler"
    return request.param


def make_leaves(rows: int, width: int, latents: int, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (rows, width), "W_enc": (latents, width), "b_enc": (latents,), "W_dec": (latents, width)}
    leaves = {name: torch.randn(*shape, dtype=dtype, generator=generator) for name, shape in shapes.items()}
    leaves["W_dec"] /= leaves["W_dec"].norm(dim=1, keepdim=True)
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def sparse_form(leaves: dict[str, torch.Tensor], selection: Selection, **options: bool) -> torch.Tensor:
    x, W_enc, b_enc, W_dec = (leaves[name] for name in NAMES)
    pre = pre_activations(x, W_enc, b_enc)
    values = selected_pre_activations(pre, selection, x_BD=x, W_enc_ND=W_enc, b_enc_N=b_enc)
    return decode(values.relu() + 0.1 * values, selection, W_dec, **options)


def dense_form(leaves: dict[str, torch.Tensor], selection: Selection) -> torch.Tensor:
    x, W_enc, b_enc, W_dec = (leaves[name] for name in NAMES)
    count = selection.dense(torch.ones(selection.nnz, dtype=x.dtype))
    pre = torch.nn.functional.linear(x, W_enc, b_enc)
    return (count * (pre.relu() + 0.1 * pre)) @ W_dec


def gradients(out: torch.Tensor, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    target = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    grads = torch.autograd.grad((out - target).square().sum(), list(leaves.values()))
    return dict(zip(leaves, grads))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE[expected.dtype], msg=lambda text: f"{name}: {text}")


def assert_same(leaves: dict[str, torch.Tensor], selection: Selection) -> None:
    dense = dense_form(leaves, selection)
    expected = gradients(dense, leaves)
    along = (expected["W_dec"] * leaves["W_dec"]).sum(1, keepdim=True) * leaves["W_dec"]
    for project in (False, True):
        sparse = sparse_form(leaves, selection, project=project)
        torch.testing.assert_close(sparse, dense, **TOLERANCE[dense.dtype])
        for name, gradient in gradients(sparse, leaves).items():
            correct = expected[name] - along if project and name == "W_dec" else expected[name]
            assert_close(gradient, correct, name)


def choose(kind: str, leaves: dict[str, torch.Tensor]) -> Selection:
    rows, latents = leaves["x"].shape[0], leaves["b_enc"].shape[0]
    pre = pre_activations(leaves["x"], leaves["W_enc"], leaves["b_enc"]).float()
    if kind == "topk":
        return topk_across(pre, 5)
    if kind == "all":
        return topk_across(pre, latents)
    if kind == "none":
        return select_where(torch.zeros_like(pre, dtype=torch.bool))
    if kind == "some rows empty, most latents never selected":
        mask = torch.zeros_like(pre, dtype=torch.bool)
        mask[::3, ::7] = True
        return select_where(mask)
    if kind == "repeated":  # the same latent twice and three times in one row
        pattern = torch.tensor([0, 0, 3, 5, 5, 5, latents - 1])
        return Selection(
            offsets=torch.arange(rows + 1) * len(pattern), latents=pattern.repeat(rows), num_latents=latents
        )
    return select_where(pre > 1.5)  # any number a row


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(9, 24, 40), (1, 16, 32), (6, 37, 150), (70, 5, 33)], ids=str)
@pytest.mark.parametrize(
    "kind", ["topk", "all", "none", "some rows empty, most latents never selected", "repeated", "threshold"]
)
def test_sparse_agrees_with_dense_autograd(
    means: str, kind: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    leaves = make_leaves(*shape, dtype)
    assert_same(leaves, choose(kind, leaves))


def test_sparse_takes_tensors_that_are_not_contiguous(means: str) -> None:
    leaves = make_leaves(8, 20, 30, torch.float32)
    views = {
        "x": torch.randn(20, 8).t(),
        "W_enc": torch.randn(30, 40)[:, ::2],
        "b_enc": torch.randn(60)[::2],
        "W_dec": leaves["W_dec"].detach().t().contiguous().t(),
    }
    assert not any(view.is_contiguous() for view in views.values())
    views = {name: view.requires_grad_() for name, view in views.items()}
    assert_same(views, choose("topk", views))


def test_sparse_without_encoder_bias(means: str) -> None:
    leaves = make_leaves(6, 10, 20, torch.float64)
    selection = choose("topk", leaves)
    pre = pre_activations(leaves["x"], leaves["W_enc"])
    values = selected_pre_activations(pre, selection, x_BD=leaves["x"], W_enc_ND=leaves["W_enc"])
    torch.testing.assert_close(values, selection.gather(leaves["x"] @ leaves["W_enc"].t()))
    values.sum().backward()
    expected = selection.dense(torch.ones(selection.nnz, dtype=torch.float64)).t() @ leaves["x"].detach()
    torch.testing.assert_close(leaves["W_enc"].grad, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_pre_activations_into_a_buffer(bias: bool) -> None:
    leaves = make_leaves(6, 10, 20, torch.float32)
    b_enc = leaves["b_enc"] if bias else None
    buffer = torch.full((6, 20), torch.nan)
    written = pre_activations(leaves["x"], leaves["W_enc"], b_enc, out=buffer)
    assert written.data_ptr() == buffer.data_ptr()
    assert not written.requires_grad
    torch.testing.assert_close(written, torch.nn.functional.linear(leaves["x"], leaves["W_enc"], b_enc).detach())


def test_sparse_frozen_weights_have_no_gradient(means: str) -> None:
    leaves = make_leaves(6, 10, 20, torch.float32)
    selection = choose("topk", leaves)
    for name in ("W_enc", "W_dec"):
        leaves[name].requires_grad_(False)
    dense_form(leaves, selection).square().sum().backward()
    expected = leaves["x"].grad
    leaves["x"].grad = None
    sparse_form(leaves, selection).square().sum().backward()
    torch.testing.assert_close(leaves["x"].grad, expected, **TOLERANCE[torch.float32])
    assert leaves["W_enc"].grad is None
    assert leaves["W_dec"].grad is None


def test_sparse_bf16_is_dense_rounded(means: str) -> None:
    leaves = make_leaves(12, 32, 64, torch.float32)
    selection = choose("topk", leaves)
    rounded = {name: leaf.detach().bfloat16().requires_grad_() for name, leaf in leaves.items()}
    exact = {name: leaf.detach().float().requires_grad_() for name, leaf in rounded.items()}
    dense, sparse = dense_form(exact, selection), sparse_form(rounded, selection)
    torch.testing.assert_close(sparse.float(), dense, rtol=0.02, atol=0.1)
    expected = gradients(dense, exact)
    for name, gradient in gradients(sparse, rounded).items():
        assert gradient.dtype == torch.bfloat16
        error = (gradient.float() - expected[name]).norm() / expected[name].norm()
        assert error < 0.02, name


def test_sparse_gradient_of_float32_weight_from_bf16_input_is_not_rounded(means: str) -> None:
    leaves = make_leaves(40, 16, 8, torch.float32)
    x, W_enc = leaves["x"].detach().bfloat16(), leaves["W_enc"]
    selection = topk_across(torch.randn(40, 8), 6)
    values = selected_pre_activations(pre_activations(x, W_enc.bfloat16()), selection, x_BD=x, W_enc_ND=W_enc)
    values.float().sum().backward()
    expected = selection.dense(torch.ones(selection.nnz)).t() @ x.float()
    torch.testing.assert_close(W_enc.grad, expected)


def test_sparse_bits_do_not_depend_on_threads() -> None:
    leaves = make_leaves(300, 48, 400, torch.float32)
    selection = choose("topk", leaves)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append((top_rows(leaves["x"].detach(), 7), gradients(sparse_form(leaves, selection), leaves)))
    finally:
        torch.set_num_threads(threads)
    for best, grads in found[1:]:
        assert torch.equal(best, found[0][0])
        for name in ("W_enc", "W_dec"):
            assert torch.equal(grads[name], found[0][1][name]), name


@pytest.mark.parametrize("k", [1, 3, 17, 100, 300])
def test_compiled_selection_agrees_with_torch(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = (torch.randn(40, 4096 + 77) * 8).round() / 8
    values[3, 50:60] = torch.nan
    values[4, 50:60] = -torch.nan
    values[5] = -torch.inf
    values[6, ::2] = -0.0
    compiled = top_rows(values, k)
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(compiled, top_rows(values, k))


class _Layer(torch.nn.Module):
    def __init__(self, leaves: dict[str, torch.Tensor], into_main_grad: bool) -> None:
        super().__init__()
        self.into_main_grad = into_main_grad
        for name in NAMES[1:]:
            self.register_parameter(name, torch.nn.Parameter(leaves[name].detach().clone()))

    def forward(self, x: torch.Tensor, selection: Selection) -> torch.Tensor:
        pre = pre_activations(x, self.W_enc, self.b_enc)
        options = {"into_main_grad": self.into_main_grad}
        values = selected_pre_activations(pre, selection, x_BD=x, W_enc_ND=self.W_enc, b_enc_N=self.b_enc, **options)
        return decode(values, selection, self.W_dec, project=True, **options)


def test_gradients_go_straight_into_main_grad(means: str) -> None:
    leaves = make_leaves(10, 12, 30, torch.float32)
    found = []
    for into_main_grad in (False, True):
        with initialize(ParallelLayout()):
            config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
            layer = _Layer(leaves, into_main_grad)
            chunk = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), layer)
            chunk.zero_grad_buffer()
            for seed in (1, 2):  # two micro-batches
                x = make_leaves(10, 12, 30, torch.float32, seed)["x"].detach()
                selection = topk_across(pre_activations(x, layer.W_enc, layer.b_enc), 4)
                chunk(x, selection).square().sum().backward()
            assert layer.W_dec.grad_added_to_main_grad == into_main_grad
            assert all(parameter.grad is None for parameter in layer.parameters())
            found.append({name: p.main_grad.clone() for name, p in layer.named_parameters()})
            chunk.grad_accs.clear()
    for name in NAMES[1:]:
        assert_close(found[0][name], found[1][name], name)
        assert found[0][name].abs().sum() > 0


def test_no_compiler_is_said_once_and_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "shutil", SimpleNamespace(which=lambda name: None))
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            leaves = make_leaves(6, 10, 20, torch.float32)
            assert_same(leaves, choose("topk", leaves))
        assert caplog.text.count("no C++ compiler") == 1
        assert kernels._library(leaves["x"], leaves["x"], None) is None
    finally:
        native.library.cache_clear()


def test_compiler_that_fails_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is not C++\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "SOURCE", broken)
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.library() is None
        assert "failed" in caplog.text
        assert not list(tmp_path.rglob("*.so"))
    finally:
        native.library.cache_clear()
