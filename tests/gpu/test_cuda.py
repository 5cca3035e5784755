"""What only a GPU can show: the CUDA path in one process. Skipped where there is none; `benchmarks/gpu_suite.py` runs it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerscale.engines.config import EngineConfig
from steerscale.parallel.context import initialize
from steerscale.parallel.cpu import redirect_cuda
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.parity import BF16, Curve, Tolerance, assert_parity, train_curve
from steerscale.train.config import RunConfig
from tests.parity.runs import MODELS, layout, run_config
from tests.parity.test_reference import reference_curve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA_FP32 = Tolerance(loss=1e-5, grad_norm=1e-4, parameters=5e-3)
"""float32 on CUDA against plain PyTorch on the CPU: other kernels on either side, TF32 off."""


def curve_of(config: RunConfig) -> Curve:
    curve = train_curve(config)
    assert curve is not None
    return curve


@pytest.fixture(autouse=True)
def _no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def test_cuda_is_not_redirected() -> None:
    with initialize(ParallelLayout()) as context:
        assert context.device.type == "cuda"
        assert torch.zeros(1, device="cuda").is_cuda
        assert torch.zeros(1).cuda().is_cuda
    with pytest.raises(RuntimeError, match="CUDA is available"), redirect_cuda():
        pass


@pytest.mark.parametrize("name", MODELS)
def test_parity_cuda_with_plain_pytorch(name: str, german_data: Path, tmp_path: Path) -> None:
    config = run_config(german_data, tmp_path / "run", MODELS[name], layout())
    assert_parity(curve_of(config), reference_curve(config), CUDA_FP32)


@pytest.mark.parametrize("recompute", ["pointwise", "selective", "full"])
def test_parity_cuda_recompute(recompute: str, german_data: Path, tmp_path: Path) -> None:
    plain = run_config(german_data, tmp_path / "plain", MODELS["llama"], layout())
    engine = EngineConfig(recompute=recompute)  # type: ignore[arg-type]
    again = run_config(german_data, tmp_path / recompute, MODELS["llama"], layout(), engine=engine)
    assert_parity(curve_of(again), curve_of(plain), CUDA_FP32)


def test_parity_cuda_bf16(german_data: Path, tmp_path: Path) -> None:
    plain = run_config(german_data, tmp_path / "fp32", MODELS["llama"], layout())
    bf16 = run_config(german_data, tmp_path / "bf16", MODELS["llama"], layout(), engine=EngineConfig(precision="bf16"))
    assert_parity(curve_of(bf16), curve_of(plain), BF16)


def test_cuda_documents_and_dropout_train(german_data: Path, tmp_path: Path) -> None:
    model = replace(MODELS["gpt2"], dropout=0.1, attention_dropout=0.1)
    config = run_config(german_data, tmp_path / "first", model, layout(), documents=True)
    again = replace(config, run_dir=str(tmp_path / "second"))
    first, second = curve_of(config), curve_of(again)
    assert first.losses == pytest.approx(second.losses, rel=1e-4)
    assert first.losses[-1] < first.losses[0]
