from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerscale import native
from steerscale.accelerators import TORCH, KernelChoice, Kernels
from steerscale.engines.config import EngineConfig
from steerscale.errors import ConfigError
from steerscale.train import kernels
from steerscale.train.config import RunConfig
from steerscale.train.kernels import check_fp8_device, kernel_report, run_kernels
from tests.parity.runs import GPT2, LLAMA, layout, run_config


def config(engine: EngineConfig, *, model: Any = LLAMA, documents: bool = False) -> RunConfig:
    return run_config(Path("data"), Path("run"), model, layout(), engine=engine, documents=documents)


def test_a_run_asks_for_the_kernels_of_its_model_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def choose(wish: Kernels, **settings: Any) -> KernelChoice:
        asked.append((wish, settings))
        return replace(TORCH, linear="te")

    monkeypatch.setattr(kernels, "choose_kernels", choose)
    run_kernels(config(EngineConfig(kernels="te", precision="bf16", fp8="hybrid"), documents=True), on_cuda=True)
    run_kernels(config(EngineConfig(compile="blocks")), on_cuda=False)
    common = {"model": LLAMA}
    assert asked == [
        ("te", {"on_cuda": True, "precision": "bf16", "documents": True, "fp8": True, "compiled": False, **common}),
        ("auto", {"on_cuda": False, "precision": "fp32", "documents": False, "fp8": False, "compiled": True, **common}),
    ]


def test_deepspeed_has_torchs_kernels() -> None:
    deepspeed = EngineConfig(name="deepspeed")
    assert run_kernels(config(deepspeed), on_cuda=True) == TORCH
    assert run_kernels(config(deepspeed, model=GPT2), on_cuda=True) == replace(TORCH, activation=None)


@pytest.mark.parametrize("name", ["megatron", "deepspeed"])
def test_kernels_on_the_cpu_are_ours_for_both_engines(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("attention_library", "pointwise_library"):
        monkeypatch.setattr(native, library, lambda: "compiled")
    wide = replace(LLAMA, d_head=16)
    ours = replace(TORCH, norm="native", attention="native", activation="native")
    assert run_kernels(config(EngineConfig(name=name), model=wide), on_cuda=False) == ours
    compiled = EngineConfig(name=name, compile="blocks")
    assert run_kernels(config(compiled, model=wide), on_cuda=False) == replace(TORCH, attention="native")
    assert run_kernels(config(EngineConfig(name=name, kernels="torch"), model=wide), on_cuda=False) == TORCH
    table = kernel_report(config(EngineConfig(name=name), model=wide), on_cuda=False).splitlines()
    assert table[2].split() == ["steerscale", "compiled", "norms,", "attention,", "gated", "activation"]


def test_the_report_of_a_run_on_the_cpu() -> None:
    lines = kernel_report(config(EngineConfig(kernels="torch")), on_cuda=False).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "torch",
        "Apex",
        "Transformer Engine",
        "Liger",
        "flash-attention",
    ]
    assert "norms, linear layers, attention (scaled_dot_product_attention), gated activation" in lines[1]
    assert all(line.endswith(" -") for line in lines[2:])


def test_fp8_without_the_library_or_the_device_is_refused() -> None:
    eight = config(EngineConfig(fp8="hybrid", precision="bf16"))
    with pytest.raises(ConfigError, match=r"engine\.fp8=hybrid needs Transformer Engine's linear layers on CUDA"):
        run_kernels(eight, on_cuda=False)
    check_fp8_device("none", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"needs a CUDA device of compute capability 8\.9 or later .* cpu is no CUDA"):
        check_fp8_device("hybrid", torch.device("cpu"))


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_asks_for_the_compute_capability(
    capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if fits:
        check_fp8_device("e4m3", torch.device("cuda", 0))
        return
    with pytest.raises(ConfigError, match=r"engine.fp8=e4m3 .* and NVIDIA A100 has 8\.[06]: use engine.fp8=none"):
        check_fp8_device("e4m3", torch.device("cuda", 0))
