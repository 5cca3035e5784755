"""The planner's parameter counts against model chunks that Megatron-Core built, rank by rank."""

from dataclasses import replace

import pytest

from steerscale.models.config import ModelConfig
from steerscale.models.gpt import GPT, transformer_config
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.memory import shard_parameters
from steerscale.testing.ranks import RankPool
from tests.planning.shapes import GELU, SWIGLU

DEEP_GELU = replace(GELU, num_layers=4)
DEEP_SWIGLU = replace(SWIGLU, num_layers=4, qkv_bias=True)


def held_parameters(model: ModelConfig, layout: ParallelLayout) -> int:
    """Parameters in this rank's chunks; the values do not matter."""
    with initialize(layout) as context:
        config = transformer_config(model, context)
        chunks = [GPT(model, config, context, chunk=chunk) for chunk in range(layout.virtual_pipeline)]
        return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(tensor=2, data=2),
        ParallelLayout(pipeline=2, virtual_pipeline=2, gradient_accumulation_steps=2),
        ParallelLayout(tensor=2, pipeline=2, sequence=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", [DEEP_GELU, DEEP_SWIGLU], ids=["gelu", "swiglu"])
def test_shard_parameters_are_those_of_real_ranks(pool: RankPool, model: ModelConfig, layout: ParallelLayout) -> None:
    held = pool.run(held_parameters, model, layout, ranks=layout.world_size)
    assert held == [shard_parameters(model, layout, rank) for rank in range(layout.world_size)]
