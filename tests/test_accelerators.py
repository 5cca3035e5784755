import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from steerscale.accelerators import (
    TORCH,
    KernelChoice,
    adam_class,
    choose_kernels,
    find_accelerators,
    format_table,
    kernel_table,
)
from steerscale.data.loader import make_micro_batch
from steerscale.engines.config import EngineConfig
from steerscale.errors import ConfigError
from steerscale.models.config import ModelConfig
from steerscale.models.gpt import GPT, transformer_config
from steerscale.models.sharding import initialize_parameters, named_shards
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.ranks import RankPool
from steerscale.train.gpt import sum_losses

APEX = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": (
        "import torch\n"
        "class FusedAdam(torch.optim.AdamW):\n"
        "    def __init__(self, params, *, adam_w_mode, **settings):\n"
        "        assert adam_w_mode\n"
        "        super().__init__(params, **settings)\n"
    ),
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "fused_rms_norm_affine = None",
}
APEX_EXTENSIONS = {"amp_C.py": "", "fused_layer_norm_cuda.py": ""}
TE = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": ""}
LIGER = {
    "liger_kernel/__init__.py": "",
    "liger_kernel/ops/__init__.py": "",
    "liger_kernel/ops/rms_norm.py": "LigerRMSNormFunction = None",
    "liger_kernel/ops/layer_norm.py": "LigerLayerNormFunction = None",
    "liger_kernel/ops/swiglu.py": "LigerFusedGateUpSiLUMulFunction = None",
}
FLASH = {"flash_attn/__init__.py": "flash_attn_varlen_func = None"}
PACKAGES = ("apex", "amp_C", "fused_layer_norm_cuda", "transformer_engine", "liger_kernel", "flash_attn")
LLAMA = ModelConfig(
    num_layers=2, d_model=64, num_heads=4, seq_len=16, vocab_size=128, norm="rmsnorm", activation="swiglu"
)


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def nothing_made_up_outlives_a_test() -> Iterator[None]:
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES}
    _forget()
    yield
    _forget()
    sys.modules.update(before)


def install(monkeypatch: pytest.MonkeyPatch, directory: Path, *libraries: dict[str, str]) -> None:
    """Packages with the names that are looked for."""
    for library in libraries:
        for name, text in library.items():
            (directory / name).parent.mkdir(exist_ok=True, parents=True)
            (directory / name).write_text(text)
    monkeypatch.syspath_prepend(directory)


def note_of(name: str) -> tuple[bool, str]:
    (one,) = [accelerator for accelerator in find_accelerators() if accelerator.name == name]
    return one.found, one.note


def test_missing_accelerators_are_said_to_be_missing() -> None:
    found = {accelerator.name: accelerator for accelerator in find_accelerators()}
    assert set(found) == {"Apex", "Transformer Engine", "Liger", "flash-attention"}
    for accelerator in found.values():
        assert accelerator.found or accelerator.note


def test_the_wrong_apex_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # PyPI's `apex` installs a package of that name without any of NVIDIA's modules.
    install(monkeypatch, tmp_path, {"apex/__init__.py": ""})
    found, note = note_of("Apex")
    assert not found
    assert "not NVIDIA's" in note


def test_an_apex_without_its_cuda_extensions_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, APEX)
    found, note = note_of("Apex")
    assert not found
    assert "without its CUDA extensions" in note
    assert "amp_C" in note


def test_the_right_libraries_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, APEX, APEX_EXTENSIONS, TE, LIGER, FLASH)
    assert all(accelerator.found for accelerator in find_accelerators())


def test_a_library_that_lacks_what_is_used_of_it_is_not_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, {**LIGER, "liger_kernel/ops/swiglu.py": ""})
    found, note = note_of("Liger")
    assert not found
    assert "LigerFusedGateUpSiLUMulFunction" in note


LAYERS = {"adam": "torch", "norm": "torch", "linear": "torch", "attention": "torch", "activation": "torch"}


@pytest.mark.parametrize(
    ("wish", "settings", "expected"),
    [
        ("torch", {}, {}),
        ("auto", {"on_cuda": False}, {}),
        ("auto", {}, {"adam": "te", "norm": "te", "attention": "te"}),
        ("auto", {"fp8": True}, {"adam": "te", "norm": "te", "attention": "te", "linear": "te"}),
        ("auto", {"precision": "fp32"}, {"adam": "te", "norm": "te"}),
        ("auto", {"compiled": True}, {"adam": "te"}),
        ("auto", {"documents": True}, {"adam": "te", "norm": "te", "attention": "flash", "varlen": True}),
        ("auto", {"documents": True, "precision": "fp32"}, {"adam": "te", "norm": "te"}),
        ("te", {}, {"adam": "te", "norm": "te", "attention": "te", "linear": "te"}),
        ("te", {"precision": "fp32"}, {"adam": "te", "norm": "te"}),
        ("te", {"compiled": True}, {"adam": "te", "norm": "te", "attention": "te", "linear": "te"}),
        ("apex", {}, {"adam": "apex", "norm": "apex"}),
        ("apex", {"documents": True}, {"adam": "apex", "norm": "apex", "attention": "flash", "varlen": True}),
        ("liger", {}, {"norm": "liger", "activation": "liger"}),
    ],
)
def test_kernels_are_chosen_by_component(
    wish: Any, settings: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, APEX, APEX_EXTENSIONS, TE, LIGER, FLASH)
    asked = {"on_cuda": True, "model": LLAMA, "precision": "bf16", **settings}
    assert choose_kernels(wish, **asked) == KernelChoice(**{**LAYERS, **expected})


def test_attention_that_no_fused_kernel_takes_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, TE, FLASH)
    for change in ({"attention_dropout": 0.1}, {"d_head": 12}, {"d_head": 264}):
        model = ModelConfig(num_layers=2, d_model=64, num_heads=4, seq_len=16, vocab_size=128, **change)
        for documents in (False, True):
            choice = choose_kernels("te", on_cuda=True, model=model, precision="bf16", documents=documents)
            assert choice.attention == "torch", change
            assert not choice.varlen
            assert choice.activation is None, "no gate"


def test_documents_are_kept_apart_by_torchs_own_varlen_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"on_cuda": True, "model": LLAMA, "precision": "bf16", "documents": True}
    monkeypatch.setattr("steerscale.accelerators._PROBES", {})  # as if none was installed
    monkeypatch.setattr("steerscale.accelerators.torch_has_varlen", lambda: True)
    assert choose_kernels("auto", **asked) == KernelChoice(varlen=True)
    assert choose_kernels("torch", **asked) == TORCH
    assert not choose_kernels("auto", **{**asked, "on_cuda": False}).varlen
    assert "attention within documents (varlen)" in kernel_table(choose_kernels("auto", **asked))[0].use
    monkeypatch.setattr("steerscale.accelerators.torch_has_varlen", lambda: False)
    assert choose_kernels("auto", **asked) == TORCH


def test_an_sae_has_an_adam_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, TE, LIGER)
    choice = choose_kernels("auto", on_cuda=True)
    assert choice == KernelChoice(adam="te", norm=None, linear=None, attention=None, activation=None)
    rows = {row.name: row.use for row in kernel_table(choice)}
    assert rows["Transformer Engine"] == "fused AdamW"
    assert not rows["torch"]


def test_a_wish_that_cannot_be_met_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, APEX)
    with pytest.raises(ConfigError, match=r"engine\.kernels=apex needs Apex: .*without its CUDA extensions"):
        choose_kernels("apex", on_cuda=True)
    install(monkeypatch, tmp_path / "rest", APEX_EXTENSIONS, LIGER)
    with pytest.raises(ConfigError, match="Apex's kernels run on CUDA only"):
        choose_kernels("apex", on_cuda=False)
    with pytest.raises(ConfigError, match="Liger's kernels run on CUDA only"):
        choose_kernels("liger", on_cuda=False)
    with pytest.raises(ConfigError, match="DeepSpeed steps with torch's AdamW"):
        EngineConfig(name="deepspeed", kernels="apex")


def test_the_adam_of_a_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, APEX, APEX_EXTENSIONS)
    assert adam_class("torch") is torch.optim.AdamW
    assert adam_class("apex").__module__ == "apex.optimizers"


def test_the_table_says_what_each_library_is_used_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, APEX, APEX_EXTENSIONS)
    choice = choose_kernels("apex", on_cuda=True, model=LLAMA)
    rows = {row.name: row for row in kernel_table(choice)}
    assert rows["Apex"].use == "fused AdamW, norms"
    assert rows["torch"].use == "linear layers, attention (scaled_dot_product_attention), gated activation"
    text = format_table(kernel_table(TORCH))
    assert text.splitlines()[0].split() == ["library", "used", "for"]
    assert "fused AdamW, norms, linear layers" in text


def _losses(adam: str) -> list[float]:
    """Three steps of the engine on one rank, its AdamW taken from there."""
    from steerscale.engines import megatron
    from steerscale.optim import OptimConfig

    model = ModelConfig(num_layers=2, d_model=32, num_heads=2, seq_len=16, vocab_size=128)
    before, taken = megatron.adam_class, []

    def of_another(choice: Any) -> Any:
        taken.append(before(choice) if adam == "torch" else StandIn)
        return taken[-1]

    megatron.adam_class = of_another
    try:
        with initialize(ParallelLayout(micro_batch_size=2)) as context:
            config = transformer_config(model, context)
            chunks = [GPT(model, config, context)]
            initialize_parameters(chunks, context, seed=0)
            engine = megatron.MegatronEngine(
                chunks,
                shards=list(named_shards(chunks)),
                config=config,
                engine=EngineConfig(),
                optim=OptimConfig(lr=1e-2),
                context=context,
            )
            (part,) = cast("Any", engine.optimizer).chained_optimizers
            assert type(part.optimizer) is taken[0]
            batch = make_micro_batch(np.arange(34).reshape(2, 17), eos_id=127)

            def forward(batch: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
                losses = chunk(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.labels_BS)
                return losses, lambda losses_BS: sum_losses(losses_BS, batch.loss_mask_BS)

            return [engine.train_step([batch], forward, lr=1e-2).totals.loss for _ in range(3)]
    finally:
        megatron.adam_class = before


class StandIn(torch.optim.AdamW):
    """A FusedAdam by its arguments."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **settings: Any) -> None:
        assert adam_w_mode
        super().__init__(params, **settings)


def test_the_engine_steps_with_the_chosen_adam(pool: RankPool) -> None:
    (torchs,) = pool.run(_losses, "torch", ranks=1)
    (others,) = pool.run(_losses, "stand-in", ranks=1)
    assert torchs[2] < torchs[0]
    assert others == pytest.approx(torchs, rel=1e-6)
