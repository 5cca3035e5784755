"""The planned peak of a rank against what a real step allocates at most, as torch's profiler counts it."""

import gc
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig
from steerscale.models.functions import CHUNK_ELEMENTS
from steerscale.parallel.context import initialize
from steerscale.planning import memory
from steerscale.planning.memory import estimate_memory
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig
from steerscale.train.gpt import build_engine
from tests.planning.steps import step, step_config

GPT2 = ModelConfig(num_layers=4, d_model=256, num_heads=4, seq_len=128, vocab_size=4096, tie_embeddings=False)
LLAMA = replace(GPT2, position="rotary", norm="rmsnorm", activation="swiglu", bias=False, d_ff=640, num_kv_groups=2)


def allocated_peak(config: RunConfig) -> int:
    """The most bytes of tensors at any moment of a step of two micro-batches, the engine's own included."""
    gc.collect()  # what an earlier engine leaves must not be freed in between
    activity = torch.profiler.ProfilerActivity.CPU
    with (
        torch.profiler.profile(activities=[activity], profile_memory=True) as profile,
        initialize(config.layout()) as context,
        closing(build_engine(config, context)) as engine,
    ):
        step(engine, config)
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    held = most = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += size
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("model", "engine"),
    [
        (GPT2, EngineConfig(precision="bf16", recompute="full")),
        (LLAMA, EngineConfig()),
        (LLAMA, EngineConfig(name="deepspeed", zero_stage=1, overlap=False)),
        (GPT2, EngineConfig(name="deepspeed", zero_stage=2, precision="bf16", overlap=False)),
        (GPT2, EngineConfig(name="deepspeed", zero_stage=3, precision="bf16", overlap=False)),
    ],
    ids=["bf16-full", "fp32", "ZeRO-1", "ZeRO-2", "ZeRO-3"],
)
def test_planned_peak_is_within_a_tenth(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch, model: ModelConfig, engine: EngineConfig
) -> None:
    config = step_config(model, engine, micro_batch_size=4)
    monkeypatch.setattr(memory, "LOGIT_CHUNK", CHUNK_ELEMENTS["cpu"])
    planned = estimate_memory(model, config.layout(), engine=engine).total
    (measured,) = pool.run(allocated_peak, config, ranks=1)
    assert planned == pytest.approx(measured, rel=0.1)


def test_planner_knows_the_chunk_of_the_loss() -> None:
    assert CHUNK_ELEMENTS["cuda"] == memory.LOGIT_CHUNK
