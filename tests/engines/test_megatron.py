"""One optimizer step: what is applied, what is skipped, what is left alone."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steerscale.data.loader import MicroBatch
from steerscale.engines.config import EngineConfig
from steerscale.engines.megatron import MegatronEngine
from steerscale.engines.state import owned_ranges
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelConfig
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig
from steerscale.train.gpt import GPTTask, build_gpt_task
from tests.parity.runs import MODELS, SEQUENCES, layout, run_config

LR = 1e-3
REPLICATED = EngineConfig(distributed_optimizer=False)


@contextmanager
def task_of(config: RunConfig) -> Iterator[GPTTask]:
    with initialize(config.layout()) as context, closing(build_gpt_task(config, context)) as task:
        yield task


def batches(task: GPTTask, step: int) -> list[MicroBatch]:
    return task.micro_batches(step * SEQUENCES, task.context.layout.gradient_accumulation_steps)


def snapshot(engine: MegatronEngine) -> list[np.ndarray]:
    """Parameters, main weights and moments of this rank."""
    tensors = [parameter for _, parameter in engine.shards]
    for owned in owned_ranges(engine.optimizer).values():
        tensors.extend(owned.tensors.values())
    return [tensor.detach().float().numpy().copy() for tensor in tensors]


def same(before: list[np.ndarray], after: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


def poison_loss(task: GPTTask, rank: int) -> Callable:
    """A forward function whose loss is nan on `rank`."""

    def forward(micro_batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        output, sum_losses = task.forward(micro_batch, chunk)
        return output, lambda losses: sum_losses(losses * math.nan if task.context.rank == rank else losses)

    return forward


def skip_a_step(config: RunConfig, poison: str, rank: int) -> dict[str, Any]:
    """A good step, a poisoned one, a good one; and where the good ones alone lead."""
    with task_of(config) as task:
        engine = task.engine
        first = engine.train_step(batches(task, 0), task.forward, lr=LR)
        before = snapshot(engine)
        if poison == "loss":
            skipped = engine.train_step(batches(task, 1), poison_loss(task, rank), lr=LR)
        else:
            # Gradients of matrices do not pass through autograd: a norm's or a bias's does.
            parameter = next(parameter for _, parameter in reversed(engine.shards) if parameter.ndim == 1)
            mine = task.context.rank == rank
            hook = parameter.register_hook(lambda gradient: gradient * float(poison) if mine else gradient)
            skipped = engine.train_step(batches(task, 1), task.forward, lr=LR)
            hook.remove()
        unchanged = same(before, snapshot(engine))
        third = engine.train_step(batches(task, 2), task.forward, lr=LR)
        after = snapshot(engine)
    with task_of(config) as task:
        for step in (0, 2):
            task.engine.train_step(batches(task, step), task.forward, lr=LR)
        return {
            "applied": [first.applied, skipped.applied, third.applied],
            "loss": skipped.totals.loss,
            "grad_norm": skipped.grad_norm,
            "unchanged": unchanged,
            "moved": not same(before, after),
            "forgotten": same(after, snapshot(task.engine)),
        }


@pytest.mark.parametrize("poison", ["loss", "nan", "inf"])
@pytest.mark.parametrize(
    ("parallel", "engine", "rank"),
    [
        (layout(data=2), EngineConfig(), 1),
        (layout(data=2), REPLICATED, 0),
        (layout(tensor=2, pipeline=2), EngineConfig(), 2),
    ],
    ids=["DP2", "DP2 replicated", "TP2xPP2"],
)
def test_train_step_skips_what_is_not_finite(
    pool: RankPool, german_data: Path, parallel: ParallelConfig, engine: EngineConfig, rank: int, poison: str
) -> None:
    config = run_config(german_data, Path("unused"), MODELS["gpt2"], parallel, engine=engine)
    for found in pool.run(skip_a_step, config, poison, rank, ranks=config.layout().world_size):
        assert found["applied"] == [True, False, True]
        assert math.isfinite(found["loss"]) == (poison != "loss")
        assert not math.isfinite(found["grad_norm"])
        assert found["unchanged"]
        assert found["moved"]
        assert found["forgotten"]


def clip(config: RunConfig) -> tuple[float, float]:
    """Gradient norm as reported, and that of the gradients the optimizer was given."""
    with task_of(config) as task:
        result = task.engine.train_step(batches(task, 0), task.forward, lr=LR)
        return result.grad_norm, task.engine.optimizer.get_grad_norm()


@pytest.mark.parametrize(
    "parallel", [layout(data=2), layout(tensor=2, sequence=True, pipeline=2)], ids=["DP2", "TP2+SPxPP2"]
)
@pytest.mark.parametrize("limit", [0.25, 100.0, 0.0])
def test_train_step_clips_the_global_norm(
    pool: RankPool, german_data: Path, parallel: ParallelConfig, limit: float
) -> None:
    config = run_config(german_data, Path("unused"), MODELS["llama"], parallel)
    config = replace(config, optim=replace(config.optim, clip=limit))
    for reported, used in pool.run(clip, config, ranks=config.layout().world_size):
        assert 0.5 < reported < 10
        assert used == pytest.approx(limit if limit == 0.25 else reported, rel=1e-5)


def decay(config: RunConfig) -> list[tuple[str, int, bool, float]]:
    """(name, dimensions, was it zero, how much it shrank) of every parameter in a step whose gradients are all zero."""
    with task_of(config) as task:
        with torch.no_grad():
            for _, parameter in task.engine.shards:
                if parameter.ndim == 1:
                    parameter.fill_(0.5)
        # Distributed optimizers have their own copy of the weights.
        task.engine.optimizer.reload_model_params()
        before = [parameter.detach().clone() for _, parameter in task.engine.shards]

        def forward(micro_batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            output, sum_losses = task.forward(micro_batch, chunk)
            return output, lambda losses: sum_losses(losses * 0.0)

        assert task.engine.train_step(batches(task, 0), forward, lr=LR).applied
        return [
            (shard.name, parameter.ndim, (1 - parameter.detach() / old)[old.abs() > 1e-3].mean().item())
            for old, (shard, parameter) in zip(before, task.engine.shards)
        ]


@pytest.mark.parametrize(
    ("parallel", "engine"), [(layout(tensor=2), EngineConfig()), (layout(data=2), REPLICATED)], ids=["TP2", "DP2"]
)
@pytest.mark.parametrize("model", MODELS)
def test_train_step_decays_matrices_only(
    pool: RankPool, german_data: Path, model: str, parallel: ParallelConfig, engine: EngineConfig
) -> None:
    config = run_config(german_data, Path("unused"), MODELS[model], parallel, engine=engine)
    for shrunk in pool.run(decay, config, ranks=config.layout().world_size):
        assert {dimensions for _, dimensions, _ in shrunk} == {1, 2}
        for name, dimensions, share in shrunk:
            vector = name.endswith((".bias", "norm.weight"))
            assert vector == (dimensions == 1)
            expected = 0.0 if vector else LR * config.optim.weight_decay
            assert share == pytest.approx(expected, rel=0.01, abs=1e-9), name


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Evaluation between two steps, and the two steps alone."""
    with task_of(config) as task:
        task.engine.seed_dropout(0)
        task.engine.train_step(batches(task, 0), task.forward, lr=LR)
        before, random = snapshot(task.engine), torch.get_rng_state()
        first, second = (task.engine.evaluate(batches(task, 5), task.forward).loss for _ in range(2))
        unchanged = same(before, snapshot(task.engine)) and torch.equal(random, torch.get_rng_state())
        task.engine.train_step(batches(task, 1), task.forward, lr=LR)
        after = snapshot(task.engine)
    with task_of(config) as task:
        task.engine.seed_dropout(0)
        for step in (0, 1):
            task.engine.train_step(batches(task, step), task.forward, lr=LR)
        other = snapshot(task.engine)
    return {"losses": (first, second), "unchanged": unchanged, "no_trace": same(after, other)}


@pytest.mark.parametrize("parallel", [layout(data=2), layout(tensor=2, pipeline=2)], ids=["DP2", "TP2xPP2"])
def test_evaluate_changes_nothing(pool: RankPool, german_data: Path, parallel: ParallelConfig) -> None:
    config = run_config(german_data, Path("unused"), replace(MODELS["gpt2"], dropout=0.2), parallel)
    for found in pool.run(evaluate, config, ranks=config.layout().world_size):
        first, second = found["losses"]
        assert first == second  # without dropout
        assert 5 < first < 9
        assert found["unchanged"]
        assert found["no_trace"]


def infer(config: RunConfig) -> tuple[np.ndarray | None, float, np.ndarray]:
    """Logits of a micro-batch, its loss by `evaluate`, its labels."""
    with task_of(config) as task:
        (batch,) = task.micro_batches(0, 1)
        logits = task.engine.infer(batch, lambda batch, chunk: chunk(batch.tokens_BS))
        loss = task.engine.evaluate([batch], task.forward).loss
        return None if logits is None else logits.numpy(), loss, batch.labels_BS.numpy()


@pytest.mark.parametrize("parallel", [layout(), layout(pipeline=2), layout(tensor=2, pipeline=2)], ids=str)
def test_infer_gives_logits_to_the_last_stage(pool: RankPool, german_data: Path, parallel: ParallelConfig) -> None:
    config = run_config(german_data, Path("unused"), MODELS["llama"], parallel)
    model, first_of_last = config.model, config.layout().tensor * (parallel.pipeline - 1)
    answers = pool.run(infer, config, ranks=config.layout().world_size)
    assert all(logits is None for logits, _, _ in answers[:first_of_last])
    parts = [logits for logits, _, _ in answers[first_of_last:]]
    shape = (model.seq_len, parallel.micro_batch_size, model.padded_vocab // parallel.tensor)
    assert [part.shape for part in parts] == [shape] * parallel.tensor
    logits = torch.from_numpy(np.concatenate(parts, axis=-1))[..., : model.tokens]
    _, loss, labels = answers[0]
    assert F.cross_entropy(logits.permute(1, 2, 0), torch.from_numpy(labels)).item() == pytest.approx(loss, rel=1e-6)


def added_in_products(config: RunConfig) -> set[str]:
    """Parameters whose gradients the products added to the buffer themselves."""
    with task_of(config) as task:
        task.engine.train_step(batches(task, 0), task.forward, lr=LR)
        found = {shard.name: parameter for shard, parameter in task.engine.shards}
        assert all(parameter.main_grad.any() for parameter in found.values())
        # Set anew for each step; the last one still says who did it.
        return {name for name, parameter in found.items() if parameter.grad_added_to_main_grad}


@pytest.mark.parametrize(
    ("model", "parallel"),
    [("gpt2", layout()), ("llama", layout(tensor=2, sequence=True)), ("gpt2", layout(pipeline=2))],
    ids=["one", "TP2+SP", "PP2"],
)
def test_products_add_the_gradients_of_matrices(
    pool: RankPool, german_data: Path, model: str, parallel: ParallelConfig
) -> None:
    config = run_config(german_data, Path("unused"), MODELS[model], parallel)
    ranks = pool.run(added_in_products, config, ranks=config.layout().world_size)
    matrices = {f"{layer}.weight" for layer in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")}
    for rank, found in enumerate(ranks):
        assert {".".join(name.split(".")[-2:]) for name in found} - {"output_layer.weight"} == matrices
        # An embedding that is the head as well gets gradients from two places.
        tied = MODELS[model].tie_embeddings and parallel.pipeline == 1
        is_head = config.layout().coordinates(rank).pipeline == parallel.pipeline - 1
        assert any("output_layer" in name for name in found) == (is_head and not tied)


def step_with_a_shape_too_many(config: RunConfig, compiled: bool) -> float:
    """Gradient norm of a step whose first micro-batch torch.compile leaves to eager layers."""
    with task_of(config) as task:
        first = True

        def forward(micro_batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            nonlocal first
            with torch.compiler.set_stance("force_eager" if first else "default"):
                first = False
                return task.forward(micro_batch, chunk)

        return task.engine.train_step(batches(task, 0), forward if compiled else task.forward, lr=LR).grad_norm


def test_compiled_layers_and_eager_ones_share_a_step(german_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = run_config(german_data, Path("unused"), MODELS["llama"], layout(), engine=EngineConfig())
    expected = step_with_a_shape_too_many(eager, False)
    # Traced as ever, but not translated, which would take half a minute.
    compiling = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    compiled = replace(eager, engine=EngineConfig(compile="blocks"))
    assert step_with_a_shape_too_many(compiled, True) == pytest.approx(expected, rel=1e-5)
