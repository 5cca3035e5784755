"""What the planner says that an engine holds against the tensors that a real one has on its ranks, at the fullest moment."""

from collections import deque
from contextlib import closing
from typing import Any

import pytest
import torch

from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig
from steerscale.parallel.context import initialize
from steerscale.planning.memory import shard_parameters
from steerscale.planning.states import model_states
from steerscale.testing.ranks import RankPool
from steerscale.train.config import RunConfig
from steerscale.train.gpt import build_engine
from tests.planning.steps import step, step_config

MODEL = ModelConfig(num_layers=8, d_model=64, num_heads=4, seq_len=32, vocab_size=128, tie_embeddings=False)
LARGEST = 4 * 64 * 64
"""Elements of the largest parameter, a matrix of the MLP."""
LIBRARIES = ("deepspeed", "megatron", "steerscale")


def held_bytes(root: Any) -> int:
    """Bytes of all tensors that hang on an object, each memory once."""
    memory: dict[int, int] = {}
    seen: set[int] = set()
    found = deque([root])
    while found:
        item = found.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
            found += [item.grad if item.is_leaf else None, vars(item)]
        elif isinstance(item, dict):
            found += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | deque):
            found += item
        elif isinstance(item, torch.nn.Module | torch.optim.Optimizer) or type(item).__module__.startswith(LIBRARIES):
            found.append(getattr(item, "__dict__", None))
    return sum(memory.values())


def most_held(config: RunConfig) -> int:
    """The most that the engine held in a step of two micro-batches."""
    with initialize(config.layout()) as context, closing(build_engine(config, context)) as engine:
        held: list[int] = []

        def watch(owner: Any, name: str) -> None:
            if (method := getattr(owner, name, None)) is not None:

                def watched(*arguments: Any, **settings: Any) -> Any:
                    held.append(held_bytes(engine))
                    return method(*arguments, **settings)

                setattr(owner, name, watched)

        if config.engine.name == "deepspeed":
            watch(engine.engine, "allreduce_gradients")  # a backward pass has ended
            watch(engine.engine.optimizer, "_release_ipg_buffers")  # gradients are reduced
            watch(engine, "_step")
        else:
            watch(engine.optimizer, "prepare_grads")

        step(engine, config)
        return max(held)


def zero(stage: int, precision: str = "fp32", **settings: Any) -> EngineConfig:
    return EngineConfig(name="deepspeed", zero_stage=stage, precision=precision, overlap=False, **settings)  # type: ignore[arg-type]


ENGINES = [
    EngineConfig(),
    EngineConfig(precision="bf16"),
    EngineConfig(distributed_optimizer=False),
    zero(0),
    *(zero(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16", "fp16")),
    *(zero(stage, "bf16", offload_optimizer=True) for stage in (1, 2, 3)),
    zero(2, offload_optimizer=True),
]


def assert_planned(pool: RankPool, engine: EngineConfig, **degrees: int) -> None:
    config = step_config(MODEL, engine, data=2, micro_batch_size=1, **degrees)
    layout = config.layout()
    for rank, held in enumerate(pool.run(most_held, config, ranks=layout.world_size)):
        planned = model_states(
            shard_parameters(MODEL, layout, rank), replicas=2, engine=engine, pipeline=layout.pipeline > 1
        )
        expected = planned.weights + planned.gradients + planned.optimizer + planned.buckets + planned.host
        # Gradients of a parameter that both replicas own a part of are kept whole, this micro-batch's and the sum of the
        # earlier ones; and two buffers for the largest gradient, of an optimizer on the host.
        beside = (4 if engine.offload_optimizer else 3) * 4 * LARGEST
        assert 0 <= held - expected <= beside, f"rank {rank} holds {held}, planned {expected}: {planned}"


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: f"{engine.title} {engine.precision}")
def test_states_are_those_of_real_ranks(pool: RankPool, engine: EngineConfig) -> None:
    assert_planned(pool, engine)


@pytest.mark.parametrize("engine", [zero(0), zero(1), zero(1, "bf16")], ids=lambda e: f"{e.title} {e.precision}")
def test_states_of_stages_are_those_of_real_ranks(pool: RankPool, engine: EngineConfig) -> None:
    assert_planned(pool, engine, pipeline=2)
