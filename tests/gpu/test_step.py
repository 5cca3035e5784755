"""A training step on CUDA: compiled or not, how much memory it takes, and that it does not wait for the device in between."""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from steerscale.data.loader import MicroBatch, make_micro_batch
from steerscale.engines.config import EngineConfig
from steerscale.engines.megatron import MegatronEngine
from steerscale.models.config import ModelConfig
from steerscale.optim import OptimConfig
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelConfig
from steerscale.planning.memory import GIB, estimate_memory
from steerscale.testing.parity import BF16, Tolerance, assert_parity
from steerscale.train.config import RunConfig, TrainConfig
from steerscale.train.gpt import build_engine, build_gpt_task, sum_losses
from tests.gpu.test_cuda import CUDA_FP32, curve_of
from tests.parity.runs import MODELS, layout, run_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BF16_ENGINE = EngineConfig(precision="bf16")
WITHIN_PLAN = 0.10
"""What the allocator's peak may differ from the planner's estimate by."""
SYNCHRONISES = re.compile(r"cu(da)?(Stream|Device|Event|Ctx)Synchronize|cudaMemcpy$")
"""Not aten::item: scalars that stay on the host are read by it too."""
# Large enough that the rounding of allocations and Megatron-Core's small buffers are nothing.
LARGE = ModelConfig(num_layers=12, d_model=1024, num_heads=16, seq_len=1024, vocab_size=32768)
LARGE_LLAMA = replace(LARGE, d_ff=2816, position="rotary", norm="rmsnorm", activation="swiglu", bias=False)

Forward = Callable[[MicroBatch, torch.nn.Module], tuple[torch.Tensor, Callable]]


@contextmanager
def stepping(config: RunConfig) -> Iterator[tuple[MegatronEngine, list[MicroBatch]]]:
    """An engine on the device, and micro-batches of random tokens."""
    with initialize(config.layout()) as context:
        generator = np.random.default_rng(0)
        shape = (config.parallel.micro_batch_size, config.model.seq_len + 1)
        batches = [
            make_micro_batch(generator.integers(2, config.model.tokens, shape), eos_id=2).pin_memory()
            for _ in range(config.layout().gradient_accumulation_steps)
        ]
        engine = build_engine(config, context)
        assert isinstance(engine, MegatronEngine)
        with closing(engine):
            yield engine, batches


@contextmanager
def training(config: RunConfig) -> Iterator[tuple[MegatronEngine, list[MicroBatch], Forward]]:
    """What the loop steps with: the task's engine, its loader's micro-batches and its forward pass."""
    with initialize(config.layout()) as context, closing(build_gpt_task(config, context)) as task:
        assert isinstance(task.engine, MegatronEngine)
        yield task.engine, task.micro_batches(0, config.layout().gradient_accumulation_steps), task.forward


def step_config(
    model: ModelConfig, engine: EngineConfig, *, micro_batch_size: int = 2, micro_batches: int = 4
) -> RunConfig:
    return RunConfig(
        name="step",
        run_dir="unused",
        model=model,
        train=TrainConfig(steps=10),
        parallel=ParallelConfig(micro_batch_size=micro_batch_size, gradient_accumulation_steps=micro_batches),
        engine=engine,
        optim=OptimConfig(lr=1e-4),
    )


def forward(micro_batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    batch = micro_batch.to("cuda", non_blocking=True)
    output = chunk(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.labels_BS)
    return output, lambda losses_BS: sum_losses(losses_BS, batch.loss_mask_BS)


def reading(run: Forward) -> Forward:
    """The same, which reads a number of every micro-batch."""

    def read(micro_batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        output, sum_up = run(micro_batch, chunk)
        output.sum().item()
        return output, sum_up

    return read


def between(engine: MegatronEngine, batches: list[MicroBatch], run: Forward, context: Callable[[], Any]) -> None:
    """A step, from whose first forward to whose last backward pass `context()` is entered."""
    entered = ExitStack()
    finalize: Any = engine.config.finalize_model_grads_func
    begun = False

    def first_begins(batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        nonlocal begun
        if not begun:
            begun = True
            entered.enter_context(context())
        return run(batch, chunk)

    def last_is_over(*args: Any, **kwargs: Any) -> None:
        entered.close()
        finalize(*args, **kwargs)

    engine.config.finalize_model_grads_func = last_is_over
    try:
        with entered:
            engine.train_step(batches, first_begins, lr=1e-4)
    finally:
        engine.config.finalize_model_grads_func = finalize


@contextmanager
def no_waiting() -> Iterator[None]:
    """Here CUDA operations that wait for the device raise RuntimeError, in whatever thread."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("engine", "tolerance"), [(EngineConfig(), CUDA_FP32), (BF16_ENGINE, BF16)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("name", MODELS)
def test_parity_cuda_compiled_blocks(
    name: str, engine: EngineConfig, tolerance: Tolerance, german_data: Path, tmp_path: Path
) -> None:
    plain = run_config(german_data, tmp_path / "plain", MODELS[name], layout(), engine=engine)
    compiled = run_config(
        german_data, tmp_path / "compiled", MODELS[name], layout(), engine=replace(engine, compile="blocks")
    )
    assert_parity(curve_of(compiled), curve_of(plain), tolerance)


def test_parity_cuda_compiled_blocks_with_documents(german_data: Path, tmp_path: Path) -> None:
    plain = run_config(german_data, tmp_path / "plain", MODELS["llama"], layout(), documents=True)
    compiled = replace(plain, run_dir=str(tmp_path / "compiled"), engine=replace(plain.engine, compile="blocks"))
    assert_parity(curve_of(compiled), curve_of(plain), CUDA_FP32)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [LARGE, LARGE_LLAMA], ids=["gpt", "llama"])
def test_memory_peak_is_what_the_planner_says(model: ModelConfig, precision: str, recompute: str) -> None:
    config = step_config(
        model, EngineConfig(precision=precision, recompute=recompute), micro_batch_size=8, micro_batches=2
    )  # type: ignore[arg-type]
    planned = estimate_memory(model, config.layout(), engine=config.engine).total_gib
    gc.collect()  # what earlier tests left
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with stepping(config) as (engine, batches):
        engine.train_step(batches, forward, lr=1e-4)
        torch.cuda.reset_peak_memory_stats()
        engine.train_step(batches, forward, lr=1e-4)
        peak = (torch.cuda.max_memory_allocated() - before) / GIB
    assert peak == pytest.approx(planned, rel=WITHIN_PLAN), f"{peak:.3f} GiB allocated, {planned:.3f} GiB planned"


@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize("compiled", ["none", "blocks"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_does_not_wait_between_its_micro_batches(
    name: str, compiled: str, documents: bool, german_data: Path, tmp_path: Path
) -> None:
    engine = replace(BF16_ENGINE, compile=compiled)  # type: ignore[arg-type]
    config = run_config(german_data, tmp_path, MODELS[name], layout(), engine=engine, documents=documents)
    with training(config) as (built, batches, run):
        for _ in range(2):  # compiles, and lets the allocator find its blocks
            built.train_step(batches, run, lr=1e-4)
        between(built, batches, run, no_waiting)


def test_a_step_that_waits_is_found(german_data: Path, tmp_path: Path) -> None:
    config = run_config(german_data, tmp_path, MODELS["llama"], layout(), engine=BF16_ENGINE)
    with training(config) as (built, batches, run):
        built.train_step(batches, run, lr=1e-4)
        with pytest.raises(RuntimeError, match="synchroniz"):
            between(built, batches, reading(run), no_waiting)


def synchronisations(engine: MegatronEngine, batches: list[MicroBatch], run: Forward) -> list[str]:
    """Calls by which the host waits, by the profile of a step, from its first forward to its last backward pass."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        between(engine, batches, run, lambda: record_function("micro-batches"))
        torch.cuda.synchronize()
    events = list(trace.events())
    (window,) = [
        event.time_range for event in events if event.name == "micro-batches" and event.device_type.name == "CPU"
    ]
    inside = [event for event in events if window.start <= event.time_range.start <= window.end]
    assert any(event.name.startswith("cudaLaunchKernel") for event in inside), "the profile shows no CUDA calls"
    return [event.name for event in inside if SYNCHRONISES.match(event.name)]


def test_the_profile_of_a_step_shows_no_waiting_between_its_micro_batches(german_data: Path, tmp_path: Path) -> None:
    config = run_config(german_data, tmp_path, MODELS["llama"], layout(), engine=BF16_ENGINE)
    with training(config) as (built, batches, run):
        for _ in range(2):
            built.train_step(batches, run, lr=1e-4)
        assert not synchronisations(built, batches, run)
        assert len(synchronisations(built, batches, reading(run))) >= len(batches)
