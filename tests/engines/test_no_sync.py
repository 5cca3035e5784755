"""From the first to the last micro-batch of a step the host asks the device for nothing, so that a GPU never waits for Python.

Shown on the CPU, where the same lines run: every operation and every call is looked at, and those count that would wait on
CUDA: reading a value, results whose size depends on values, tensors made of the host's data. tests/gpu asks CUDA itself.
SAEs are not in it: which latents are active decides about sizes.
"""

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from steerscale.data.loader import MicroBatch, make_micro_batch
from steerscale.engines.config import EngineConfig
from steerscale.engines.megatron import MegatronEngine
from steerscale.optim import OptimConfig
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelConfig
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig, TrainConfig
from steerscale.train.gpt import build_engine, sum_losses
from tests.parity.runs import MODELS

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"}
"""Calls that some of the operations below are made by, and some that are none: on a CPU there is nothing to copy."""
FROM_HOST = {"tensor", "as_tensor", "asarray"}
ON_HOST = "megatron/core/tensor_parallel/random.py"
"""Its fork of a generator compares states of the host's own generator, on the host."""


class Operations(TorchDispatchMode):
    """Notes operations whose result is a value for the host, or has a size that depends on values."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tags = set(func.tags)
        if torch.Tag.data_dependent_output in tags or (
            torch.Tag.dynamic_output_shape in tags
            # Indices of numbers have a size; masks are counted first.
            and (func is not torch.ops.aten.index.Tensor or any(_is_mask(index) for index in args[1]))
        ):
            _note(self.found, str(func))
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Notes calls that would copy from or to the device and wait for it."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # Without a device a tensor stays on the host, as Megatron-Core's counters do.
        if name in READS or (name in FROM_HOST and (kwargs or {}).get("device") is not None):
            _note(self.found, name)
        return func(*args, **(kwargs or {}))


def _note(found: list[str], name: str) -> None:
    """Add the name, and where the innermost call outside of torch and of this recording stands."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    outside = [frame for frame in frames if frame.name not in ("_note", "__torch_dispatch__", "__torch_function__")]
    if not outside[-1].filename.endswith(ON_HOST):
        found.append(f"{name} {outside[-1].filename}:{outside[-1].lineno}")


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def waits(engine: MegatronEngine, batches: list[Any], forward: Callable) -> tuple[list[str], int]:
    """What of a step after its first would wait, from the first forward pass to the last backward pass; forward passes."""
    found: list[str] = []
    passes = 0
    recording = ExitStack()
    finalize: Any = engine.config.finalize_model_grads_func

    def first_begins(batch: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        nonlocal passes
        if not passes:
            recording.enter_context(Calls(found))
            recording.enter_context(Operations(found))
        passes += 1
        return forward(batch, chunk)

    def last_is_over(*args: Any, **kwargs: Any) -> None:
        recording.close()
        finalize(*args, **kwargs)

    engine.train_step(batches, forward, lr=1e-4)
    engine.config.finalize_model_grads_func = last_is_over
    with recording:
        engine.train_step(batches, first_begins, lr=1e-4)
    engine.close()
    return found, passes


def gpt_forward(batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    output = chunk(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.labels_BS)
    return output, lambda losses_BS: sum_losses(losses_BS, batch.loss_mask_BS)


def reading_forward(batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    output, sum_up = gpt_forward(batch, chunk)

    def read(losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert losses_BS.sum().item() > 0
        return sum_up(losses_BS)

    return output, read


def masking_forward(batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    output, sum_up = gpt_forward(batch, chunk)
    return output, lambda losses_BS: (losses_BS[losses_BS > 0].sum(), *sum_up(losses_BS)[1:])


def making_forward(batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    output, sum_up = gpt_forward(batch, chunk)
    return output, lambda losses_BS: sum_up(losses_BS * torch.tensor(1.0, device=losses_BS.device))


class ReadsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        assert gradient.sum().item() > 0
        return gradient


def backward_forward(batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    output, sum_up = gpt_forward(batch, chunk)
    return output, lambda losses_BS: sum_up(ReadsBackward.apply(losses_BS))


def gpt_step(name: str, parallel: ParallelConfig, documents: bool, engine: EngineConfig, forward: Callable) -> Any:
    """On a rank: what waits in a step of a GPT."""
    config = RunConfig(
        name="no_sync",
        run_dir="unused",
        model=MODELS[name],
        train=TrainConfig(steps=10),
        parallel=parallel,
        engine=engine,
        optim=OptimConfig(lr=1e-4),
    )
    layout = config.layout()
    with initialize(layout) as context:
        generator = np.random.default_rng(context.at.data)
        shape = (layout.micro_batch_size, config.model.seq_len + 1)
        batches = [
            make_micro_batch(
                generator.integers(2, 40, shape), eos_id=2, reset_at_document_end=documents, mask_document_end=documents
            )
            for _ in range(layout.gradient_accumulation_steps)
        ]
        built = build_engine(config, context)
        assert isinstance(built, MegatronEngine)
        return waits(built, batches, forward)


def parallel(**degrees: int | bool) -> ParallelConfig:
    return ParallelConfig(micro_batch_size=2, gradient_accumulation_steps=4, **degrees)  # type: ignore[arg-type]


@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize(
    "engine", [EngineConfig(), EngineConfig(precision="bf16", recompute="full")], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_asks_the_device_for_nothing(pool: RankPool, name: str, engine: EngineConfig, documents: bool) -> None:
    (found,) = pool.run(gpt_step, name, parallel(), documents, engine, gpt_forward, ranks=1)
    assert found == ([], 4)


@pytest.mark.parametrize(
    "degrees",
    [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"data": 2}],
    ids=["TP2+SP", "PP2", "PP2x2", "DP2"],
)
def test_ranks_of_a_layout_ask_for_nothing(pool: RankPool, degrees: dict[str, int | bool]) -> None:
    for found, passes in pool.run(gpt_step, "llama", parallel(**degrees), False, EngineConfig(), gpt_forward, ranks=2):
        assert not found
        assert passes == 4 * int(degrees.get("virtual_pipeline", 1))


@pytest.mark.parametrize(
    ("forward", "call", "operation"),
    [
        (reading_forward, "item", "aten._local_scalar_dense.default"),
        (backward_forward, "item", "aten._local_scalar_dense.default"),
        (masking_forward, None, "aten.index.Tensor"),
        (making_forward, "tensor", None),
    ],
    ids=["item", "item in the backward pass", "mask", "from the host"],
)
def test_what_waits_is_found(pool: RankPool, forward: Callable, call: str | None, operation: str | None) -> None:
    ((found, _),) = pool.run(gpt_step, "gpt2", parallel(), False, EngineConfig(), forward, ranks=1)
    for name in (call, operation):
        assert name is None or sum(entry.startswith(f"{name} ") for entry in found) == 4
