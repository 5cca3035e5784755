import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from steerscale.accelerators import adam_class, choose_kernels, find_accelerators, format_table, kernel_table
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


def _forget_apex() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def no_apex() -> Iterator[None]:
    """Nothing of the packages made up here outlives a test."""
    _forget_apex()
    yield
    _forget_apex()


def test_missing_accelerators_are_said_to_be_missing() -> None:
    found = {accelerator.name: accelerator for accelerator in find_accelerators()}
    assert set(found) == {"Apex", "Transformer Engine", "Liger", "flash-attention"}
    for accelerator in found.values():
        assert accelerator.found or accelerator.note


def test_the_wrong_apex_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    # PyPI's `apex` installs a package of that name without any of NVIDIA's modules.
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    (apex,) = [accelerator for accelerator in find_accelerators() if accelerator.name == "Apex"]
    assert not apex.found
    assert "not NVIDIA's" in apex.note


def test_the_right_apex_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for module in ("", "optimizers", "normalization"):
        (tmp_path / "apex" / module).mkdir(exist_ok=True, parents=True)
        (tmp_path / "apex" / module / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    (apex,) = [accelerator for accelerator in find_accelerators() if accelerator.name == "Apex"]
    assert apex.found
    assert isinstance(sys.modules["apex.optimizers"], types.ModuleType)


def stand_in_apex(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NVIDIA's package by its modules, with torch's AdamW under the name and the arguments of theirs."""
    for module in ("", "optimizers", "normalization"):
        (tmp_path / "apex" / module).mkdir(exist_ok=True, parents=True)
        (tmp_path / "apex" / module / "__init__.py").write_text("")
    (tmp_path / "apex" / "optimizers" / "__init__.py").write_text(
        "import torch\n"
        "class FusedAdam(torch.optim.AdamW):\n"
        "    def __init__(self, params, *, adam_w_mode, **settings):\n"
        "        assert adam_w_mode\n"
        "        super().__init__(params, **settings)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_kernels_are_chosen_by_wish_device_and_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = not next(one for one in find_accelerators() if one.name == "Apex").found
    if missing:
        with pytest.raises(ConfigError, match=r"engine\.kernels=apex needs Apex: "):
            choose_kernels("apex", on_cuda=True)
    stand_in_apex(monkeypatch, tmp_path)
    assert choose_kernels("auto", on_cuda=False) == choose_kernels("torch", on_cuda=True) == "torch"
    assert choose_kernels("auto", on_cuda=True) in ("apex", "te")
    assert choose_kernels("apex", on_cuda=True) == "apex"
    with pytest.raises(ConfigError, match="Apex's kernels run on CUDA only"):
        choose_kernels("apex", on_cuda=False)
    assert adam_class("torch") is torch.optim.AdamW
    assert adam_class("apex").__module__ == "apex.optimizers"
    rows = {row.name: row for row in kernel_table("apex")}
    assert rows["Apex"].use == "fused AdamW"
    assert "AdamW" not in rows["torch"].use
    assert not any("AdamW" in row.use for row in kernel_table(None))
    with pytest.raises(ConfigError, match="DeepSpeed brings its own AdamW"):
        EngineConfig(name="deepspeed", kernels="apex")
    text = format_table(kernel_table("torch"))
    assert text.splitlines()[0].split() == ["library", "used", "for"]
    assert "fused AdamW, scaled_dot_product_attention" in text


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
