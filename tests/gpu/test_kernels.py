"""Fused kernels of other libraries against torch's, on a GPU; Liger's also on the CPU with TRITON_INTERPRET=1.

Each test skips, with the reason, where its library or a device for it is missing.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from steerscale.accelerators import TORCH, find_accelerators, torch_has_varlen
from steerscale.engines.config import EngineConfig
from steerscale.engines.fp8 import LEAST_CAPABILITY
from steerscale.models.core_attention import document_begins, varlen
from steerscale.models.gpt import GPT, transformer_config
from steerscale.models.layer_spec import liger_swiglu, normalization
from steerscale.models.sharding import initialize_parameters
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.parity import BF16, Curve, Tolerance, assert_parity, train_curve
from steerscale.train.config import RunConfig
from steerscale.train.kernels import run_kernels
from tests.models.gpts import GPT2, LLAMA
from tests.parity.runs import MODELS, layout, run_config

GPTS = {"gpt2": replace(GPT2, num_layers=1), "llama": replace(LLAMA, num_layers=1)}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest error of a tensor against float64, divided by its norm; bfloat16 has 8 bits, float16 11."""
# Triton's interpreter multiplies bfloat16 numbers as the integers that hold them.
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
FP8 = Tolerance(loss=2e-2, grad_norm=0.3, parameters=1.0)
"""fp8 products against bf16: e4m3 has 4 bits. A guess until it has been measured; a wrong scale or layout is far outside."""

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device, or TRITON_INTERPRET=1"
)


def need(name: str) -> None:
    """Skip where the library is not there."""
    if INTERPRETED and name != "Liger":
        pytest.skip(f"{name} needs a CUDA device")
    (one,) = [accelerator for accelerator in find_accelerators() if accelerator.name == name]
    if not one.found:
        pytest.skip(f"{name}: {one.note}")


@pytest.fixture(autouse=True)
def _no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger; under Triton's interpreter with two things that the compiler does and the interpreter does not."""
    need("Liger")
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import layer_norm, rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        # Compiled, a float argument is a scalar with a `.to`; interpreted it stays Python's.
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    for module in (layer_norm, rms_norm):  # libdevice's rsqrt has no interpreted form
        monkeypatch.setattr(module, "rsqrt", lambda x: 1 / tl.sqrt(x))


def assert_near(actual: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    error = (actual.double() - exact).norm() / exact.norm()
    assert error < RELATIVE_ERROR[actual.dtype], f"{what}: relative error {error:.1e}"


def compare(function: Callable[..., torch.Tensor], exact: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> None:
    """Output and gradients of `function` against those of `exact` in float64."""
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    actual, expected = function(*leaves), exact(*doubles)
    assert actual.shape == expected.shape
    assert_near(actual, expected, "output")
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(actual.shape, generator=generator).to(actual.device, actual.dtype)
    pairs = zip(torch.autograd.grad(actual, leaves, given), torch.autograd.grad(expected, doubles, given.double()))
    for index, (got, want) in enumerate(pairs):
        assert_near(got, want, f"gradient {index}")


def leaf(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def check_norms(library: Any, width: int, dtype: torch.dtype) -> None:
    normalize = normalization(library)
    x, weight, bias = leaf(5, 3, width, dtype=dtype), leaf(width, dtype=dtype, seed=1), leaf(width, dtype=dtype, seed=2)
    compare(
        lambda x, weight: normalize(x, weight, None, 1e-5),
        lambda x, weight: F.rms_norm(x, (width,), weight, 1e-5),
        x,
        weight,
    )
    compare(
        lambda x, weight, bias: normalize(x, weight, bias, 1e-5),
        lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias, 1e-5),
        x,
        weight,
        bias,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 256])
def test_liger_norms(width: int, dtype: torch.dtype, liger: None) -> None:
    check_norms("liger", width, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 256])
def test_liger_swiglu(width: int, dtype: torch.dtype, liger: None) -> None:
    compare(liger_swiglu(), lambda x: F.silu(x[..., :width]) * x[..., width:], leaf(5, 3, 2 * width, dtype=dtype))


@pytest.mark.parametrize("name", GPTS)
def test_liger_in_a_model(name: str, liger: None) -> None:
    model, found = GPTS[name], []
    tokens = torch.randint(0, model.tokens, (2, model.seq_len + 1), generator=torch.Generator().manual_seed(0)).to(
        DEVICE
    )
    for kernels in (TORCH, replace(TORCH, norm="liger", activation="liger")):
        with initialize(ParallelLayout(micro_batch_size=2)) as context:
            chunk = GPT(model, transformer_config(model, context, kernels=kernels), context)
            initialize_parameters([chunk], context, seed=1)
            losses = chunk(tokens[:, :-1], None, None, tokens[:, 1:])
            losses.sum().backward()
            grads = [p.grad.cpu() for p in chunk.parameters() if p.grad is not None]
            found.append([losses.detach().cpu(), *grads])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apex_norms(dtype: torch.dtype) -> None:
    need("Apex")
    check_norms("apex", 256, dtype)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("library", ["flash", "torch"])
def test_varlen_attention_equals_a_mask(library: Any, groups: int) -> None:
    if library == "flash":
        need("flash-attention")
    elif INTERPRETED or not torch_has_varlen():
        pytest.skip("needs a CUDA device and torch.nn.attention.varlen")
    documents_BS = torch.tensor([[0] * 50 + [1] + [2] * 77, [0] * 128])
    begins = document_begins(documents_BS).cuda()
    dtype, tokens = torch.bfloat16, documents_BS.numel()
    numbers = (documents_BS + 10 * torch.arange(2).unsqueeze(1)).flatten().cuda()
    mask = (numbers.unsqueeze(1) == numbers).tril()

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=groups != 4)
        return out.squeeze(0).transpose(0, 1)

    leaves = [leaf(tokens, heads, 64, dtype=dtype, seed=heads) for heads in (4, groups, groups)]
    attend = varlen(library)
    compare(lambda q, k, v: attend(q, k, v, begins, 128), masked, *leaves)


# --- whole runs ------------------------------------------------------------------------------------------------------


def curve_of(config: RunConfig) -> Curve:
    if INTERPRETED:
        pytest.skip("needs a CUDA device")
    curve = train_curve(config)
    assert curve is not None
    return curve


def runs(data: Path, directory: Path, name: str, engine: EngineConfig, **settings: Any) -> tuple[RunConfig, RunConfig]:
    """The run and the same with torch's kernels."""
    ours = run_config(data, directory / "ours", MODELS[name], layout(), engine=engine, **settings)
    torchs = replace(engine, kernels="torch", fp8="none")
    return ours, replace(ours, run_dir=str(directory / "torch"), engine=torchs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("library", ["Apex", "Transformer Engine", "Liger"])
def test_parity_kernels(library: str, name: str, german_data: Path, tmp_path: Path) -> None:
    need(library)
    wish: Any = {"Apex": "apex", "Transformer Engine": "te", "Liger": "liger"}[library]
    ours, torchs = runs(german_data, tmp_path, name, EngineConfig(kernels=wish, precision="bf16"))
    assert_parity(curve_of(ours), curve_of(torchs), BF16)


@pytest.mark.parametrize("name", MODELS)
def test_parity_documents_by_varlen(name: str, german_data: Path, tmp_path: Path) -> None:
    """What a run takes by itself against masks, which float32 still means."""
    ours, _ = runs(german_data, tmp_path, name, EngineConfig(precision="bf16"), documents=True)
    masked = replace(ours, run_dir=str(tmp_path / "masked"), engine=EngineConfig())
    if not run_kernels(ours, on_cuda=True).varlen:
        pytest.skip("neither flash-attention nor torch.nn.attention.varlen is there")
    assert not run_kernels(masked, on_cuda=True).varlen
    assert_parity(curve_of(ours), curve_of(masked), BF16)


@pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
def test_parity_fp8(fp8: Any, german_data: Path, tmp_path: Path) -> None:
    need("Transformer Engine")
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        pytest.skip("the device has no FP8 units")
    ours, torchs = runs(german_data, tmp_path, "llama", EngineConfig(kernels="te", precision="bf16", fp8=fp8))
    assert_parity(curve_of(ours), curve_of(torchs), FP8)
