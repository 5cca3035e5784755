"""One real step of an engine, to set the planner's figures against."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.data.loader import MicroBatch
from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig
from steerscale.optim import OptimConfig
from steerscale.parallel.layout import ParallelConfig
from steerscale.train.config import MetricsConfig, RunConfig, TrainConfig
from steerscale.train.gpt import sum_losses


def step_config(model: ModelConfig, engine: EngineConfig, **parallel: int) -> RunConfig:
    """A run without data, of steps of two micro-batches. Skips where the engine's library is missing."""
    if engine.name == "deepspeed":
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    return RunConfig(
        name="step",
        run_dir="unused",
        model=model,
        data=None,
        train=TrainConfig(steps=1),
        parallel=ParallelConfig(gradient_accumulation_steps=2, **parallel),
        engine=engine,
        optim=OptimConfig(lr=1e-3),
        checkpoint=CheckpointConfig(),
        metrics=MetricsConfig(),
    )


def step(engine: Any, config: RunConfig) -> None:
    """Train one step on two micro-batches of some tokens."""

    def forward(batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        output = chunk(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.labels_BS)
        return output, lambda losses_BS: sum_losses(losses_BS, batch.loss_mask_BS)

    assert config.model is not None
    assert config.model.vocab_size is not None
    size = config.parallel.micro_batch_size, config.model.seq_len
    tokens_BS = (torch.arange(size[1]) % (config.model.vocab_size - 1)).repeat(size[0], 1)
    batch = MicroBatch(tokens_BS=tokens_BS, labels_BS=tokens_BS + 1, loss_mask_BS=torch.ones(size))
    engine.train_step([batch] * 2, forward, lr=1e-3)
