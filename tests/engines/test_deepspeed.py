"""One optimizer step under DeepSpeed: what is skipped, how the batch grows, and what is left behind in the process."""

import logging
import math
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steerscale.data.loader import MicroBatch
from steerscale.engines.config import EngineConfig
from steerscale.engines.deepspeed import scaled
from steerscale.parallel.context import initialize
from steerscale.testing.parity import Curve, assert_parity, train_curve
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RampUpConfig, RunConfig
from steerscale.train.gpt import GPTTask, build_gpt_task
from tests.parity.runs import MODELS, SEQUENCES, layout, run_config

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

LR = 1e-3


def config_of(
    data: Path, stage: int, degrees: dict[str, int], *, run_dir: Path = Path("unused"), **settings: Any
) -> RunConfig:
    """A short run of the smaller model."""
    engine = EngineConfig(name="deepspeed", zero_stage=stage, **settings)
    return run_config(data, run_dir, MODELS["gpt2"], layout(**degrees), engine=engine, steps=4)


def snapshot(task: GPTTask) -> list[np.ndarray]:
    """Main weights and moments of this rank."""
    return [fragment.data.detach().float().numpy().copy() for fragment in task.engine.fragments()]


def same(before: list[np.ndarray], after: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


def skip_a_step(config: RunConfig, value: float) -> dict[str, Any]:
    """Three steps; the second one's losses are times `value` on rank 1."""
    with initialize(config.layout()) as context, closing(build_gpt_task(config, context)) as task:

        def poisoned(micro_batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            output, reduce = task.forward(micro_batch, chunk)
            return output, lambda losses: reduce(losses * value) if context.rank == 1 else reduce(losses)

        def step(number: int, forward: Callable) -> Any:
            batches = task.micro_batches(number * SEQUENCES, context.layout.gradient_accumulation_steps)
            return task.engine.train_step(batches, forward, lr=LR)

        first = step(0, task.forward)
        before = snapshot(task)
        second = step(1, poisoned)
        between = snapshot(task)
        third = step(1, task.forward)
        return {
            "applied": [first.applied, second.applied, third.applied],
            "norms": [first.grad_norm, second.grad_norm, third.grad_norm],
            "unchanged": same(before, between),
            "moved": not same(between, snapshot(task)),
        }


@pytest.mark.parametrize(
    ("stage", "degrees", "value"),
    [
        (0, {"data": 2}, math.nan),
        (1, {"pipeline": 2}, math.inf),
        (2, {"data": 2}, math.inf),
        (3, {"data": 2}, math.nan),
    ],
    ids=str,
)
def test_train_step_skips_what_is_not_finite(
    pool: RankPool, german_data: Path, stage: int, degrees: dict[str, int], value: float
) -> None:
    for found in pool.run(skip_a_step, config_of(german_data, stage, degrees), value, ranks=2):
        assert found["applied"] == [True, False, True]
        assert [math.isfinite(norm) for norm in found["norms"]] == [True, False, True]
        assert found["unchanged"]
        assert found["moved"]


def test_infinite_loss_has_no_finite_gradient() -> None:
    logits = torch.tensor([0.0, -math.inf], requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits.unsqueeze(0), torch.tensor([1]), reduction="sum")
    assert torch.isinf(loss)
    scaled(loss, torch.tensor(0.5)).backward()
    assert logits.grad is not None
    assert not logits.grad.isfinite().any()
    finite = torch.tensor(3.0, requires_grad=True)
    scaled(finite, torch.tensor(0.5)).backward()
    assert finite.grad == 0.5


@pytest.fixture
def run(pool: RankPool, german_data: Path, tmp_path: Path) -> Callable[..., Curve]:
    """run(config) trains it in a directory of its own."""
    count = 0

    def make(config: RunConfig) -> Curve:
        nonlocal count
        count += 1
        config = replace(config, run_dir=str(tmp_path / f"run-{count}"))
        return pool.run(train_curve, config, ranks=config.layout().world_size)[0]

    return make


@pytest.mark.parametrize("degrees", [{"pipeline": 2}, {"data": 2}], ids=str)
def test_batch_grows(run: Callable[..., Curve], german_data: Path, degrees: dict[str, int]) -> None:
    # After one smaller step, so that the number of micro-batches so far is no multiple of the new GAS.
    ramp = RampUpConfig(start=4, increment=4, samples=4)
    configs = [config_of(german_data, 1, degrees)]
    configs.append(replace(configs[0], engine=EngineConfig(), parallel=layout()))
    got, expected = (run(replace(config, train=replace(config.train, ramp_up=ramp))) for config in configs)
    assert_parity(replace(got, parameters=expected.parameters), expected)


def test_recompute_changes_nothing(run: Callable[..., Curve], german_data: Path) -> None:
    curves = [run(config_of(german_data, 1, {"pipeline": 2}, recompute=kind)) for kind in ("none", "full")]
    assert curves[0].losses == curves[1].losses
    assert same(list(curves[0].parameters.values()), list(curves[1].parameters.values()))


def moments(config: RunConfig) -> dict[tuple[str, int], np.ndarray]:
    """This rank's part of AdamW's first moments after one step, which are the gradients times a constant."""
    with initialize(config.layout()) as context, closing(build_gpt_task(config, context)) as task:
        batches = task.micro_batches(0, context.layout.gradient_accumulation_steps)
        task.engine.train_step(batches, task.forward, lr=LR)
        found = [fragment for fragment in task.engine.fragments() if fragment.kind == "exp_avg"]
        return {(f.name, f.start): f.data.detach().numpy().copy() for f in found}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_are_reduced_in_float32(pool: RankPool, german_data: Path, stage: int) -> None:
    # The same eight micro-batches in bf16, added up on one rank or on two: only the order of the sums differs.
    configs = [
        replace(config_of(german_data, stage, {}, precision="bf16"), parallel=layout(micro_batch_size=1, data=data))
        for data in (1, 2)
    ]
    (whole,), parts = (pool.run(moments, config, ranks=config.parallel.data) for config in configs)
    alone = {name: data for (name, _), data in whole.items()}
    for (name, start), got in (item for part in parts for item in part.items()):
        expected = alone[name][start : start + got.size]
        # Rounded to bf16 on the way, they would be 2e-3 of their size off.
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(alone[name]).max(), name


def look_around(config: RunConfig) -> dict[str, Any]:
    """What an engine leaves behind."""
    environment, handlers = dict(os.environ), list(logging.getLogger().handlers)
    with initialize(config.layout()) as context, closing(build_gpt_task(config, context)):
        pass
    import deepspeed.comm.comm as comm
    from deepspeed.utils import groups

    return {
        # Megatron-Core says in NVTE_... which attention it wants.
        "environment": {
            key
            for key in {*environment, *os.environ}
            if environment.get(key) != os.environ.get(key) and not key.startswith("NVTE_")
        },
        "handlers": logging.getLogger().handlers == handlers,
        "groups": [comm.cdb, groups.mpu, groups._WORLD_GROUP],
        "compile": torch.compile.__module__,
    }


@pytest.mark.parametrize("degrees", [{}, {"pipeline": 2}], ids=str)
def test_nothing_is_left_behind(pool: RankPool, german_data: Path, degrees: dict[str, int]) -> None:
    config = config_of(german_data, 1, degrees)
    for found in pool.run(look_around, config, ranks=config.layout().world_size):
        assert found == {"environment": set(), "handlers": True, "groups": [None] * 3, "compile": "torch"}
