"""Groups, coordinates and shards of ranks that stand in layouts of a thousand."""

import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import steerscale
from steerscale.config import from_mapping, load_yaml
from steerscale.errors import LaunchError
from steerscale.models.config import ModelConfig
from steerscale.models.gpt import GPT, transformer_config
from steerscale.models.sharding import initialize_parameters, named_shards
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.memory import shard_parameters

LAYOUT = ParallelLayout(tensor=8, pipeline=8, data=16, sequence=True, gradient_accumulation_steps=8)
RANKS = [0, 517, 1023]


def preset(name: str) -> ModelConfig:
    path = Path(steerscale.__file__).parents[1] / "configs" / "model" / f"{name}.yaml"
    return replace(from_mapping(ModelConfig, load_yaml(path)), vocab_size=50304)


@pytest.mark.parametrize("rank", RANKS)
def test_groups_are_the_layouts(rank: int) -> None:
    with initialize(LAYOUT, backend="fake", rank=rank, device="meta") as context:
        pipeline, data, tensor = at = context.at
        assert at == LAYOUT.coordinates(rank)
        places = {other: LAYOUT.coordinates(other) for other in range(LAYOUT.world_size)}
        expected = {
            "tp": [r for r, p in places.items() if (p.pipeline, p.data) == (pipeline, data)],
            "dp": [r for r, p in places.items() if (p.pipeline, p.tensor) == (pipeline, tensor)],
            "pp": [r for r, p in places.items() if (p.data, p.tensor) == (data, tensor)],
            "mp": [r for r, p in places.items() if p.data == data],
        }
        assert [len(ranks) for ranks in expected.values()] == [8, 16, 8, 64]
        for name, ranks in expected.items():
            assert dist.get_process_group_ranks(getattr(context.groups, name)) == ranks, name
        assert context.is_first_stage == (pipeline == 0)
        assert context.is_last_stage == (pipeline == 7)
        assert context.counts_once == (pipeline == 7 and tensor == 0)
    assert not dist.is_initialized()


def test_loss_is_counted_once_a_replica() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    counting = []
    for rank in range(layout.world_size):
        with initialize(layout, backend="fake", rank=rank, device="meta") as context:
            counting += [rank] if context.counts_once else []
    assert counting == [4, 6]


@pytest.mark.parametrize("rank", RANKS)
def test_meta_shards_take_no_memory(rank: int) -> None:
    model, before = preset("6.7b"), resident_mib()
    with initialize(LAYOUT, backend="fake", rank=rank, device="meta") as context:
        config = transformer_config(model, context)
        chunk = GPT(model, config, context)
        initialize_parameters([chunk], context, seed=1)
        assert all(parameter.is_meta for parameter in chunk.parameters())
        assert len(list(named_shards([chunk]))) == len(list(chunk.parameters()))
        held = sum(parameter.numel() for parameter in chunk.parameters())
    assert held == shard_parameters(model, LAYOUT, rank)
    assert held > 100e6  # 400 MB in float32
    assert resident_mib() - before < 100


def test_initialize_refuses_another_number_of_ranks() -> None:
    with (
        pytest.raises(LaunchError, match=r"1 ranks were started.* needs 4"),
        initialize(ParallelLayout(tensor=2, data=2), rank=0),
    ):
        pytest.fail("four ranks in one")
    assert not dist.is_initialized()


def test_initialize_tears_down_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(KeyError), initialize(ParallelLayout()):
        raise KeyError("inside")
    assert not dist.is_initialized()
    assert torch.ones(1).type() == "torch.FloatTensor"
    with initialize(ParallelLayout()) as context:
        assert context.rank == 0
        assert context.device == torch.device("cpu")


def resident_mib() -> float:
    pages = int(Path(f"/proc/{os.getpid()}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
