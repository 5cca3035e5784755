import warnings
from itertools import product
from typing import Any

import pytest

from steerscale.errors import ConfigError, LayoutError
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import Coordinates, ParallelConfig, ParallelLayout

MODEL = ModelConfig(num_layers=8, d_model=48, num_heads=12, num_kv_groups=6, d_ff=96, seq_len=32, vocab_size=100)


def resolve(*, world_size: int | None = None, **values: Any) -> ParallelLayout:
    return ParallelLayout.resolve(ParallelConfig(**values), world_size=world_size)


def refusal(**values: Any) -> str:
    with pytest.raises(LayoutError) as caught:
        resolve(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "accumulation", "global_batch"),
    [
        ({}, 1, 6),
        ({"gradient_accumulation_steps": 4}, 4, 24),
        ({"global_batch_size": 24}, 4, 24),
        ({"global_batch_size": 24, "gradient_accumulation_steps": 4}, 4, 24),
    ],
    ids=["neither", "GAS", "GBS", "both"],
)
def test_resolve_derives_the_missing_batch_size(given: dict[str, int], accumulation: int, global_batch: int) -> None:
    layout = resolve(micro_batch_size=2, data=3, **given)
    assert layout.gradient_accumulation_steps == accumulation
    assert layout.global_batch_size == global_batch


def test_resolve_keeps_every_degree() -> None:
    layout = resolve(tensor=2, pipeline=4, virtual_pipeline=2, data=3, sequence=True, gradient_accumulation_steps=8)
    assert layout == ParallelLayout(
        tensor=2, pipeline=4, virtual_pipeline=2, data=3, sequence=True, gradient_accumulation_steps=8
    )
    assert layout.world_size == 24


@pytest.mark.parametrize(("size", "nearest"), [(25, 24), (29, 30), (1, 6), (39, 36)])
def test_resolve_suggests_the_nearest_global_batch(size: int, nearest: int) -> None:
    text = refusal(micro_batch_size=2, data=3, global_batch_size=size)
    assert text.startswith(
        f"parallel.global_batch_size={size} is not divisible by micro_batch_size x data = 2 x 3 = 6;"
    )
    assert text.endswith(f"nearest that is: {nearest}")


def test_resolve_refuses_batch_sizes_that_disagree() -> None:
    text = refusal(micro_batch_size=2, data=3, global_batch_size=24, gradient_accumulation_steps=5)
    assert "gradient_accumulation_steps=5 and parallel.global_batch_size=24 disagree" in text
    assert "GAS x MBS x DP = 5 x 2 x 3 = 30" in text


def test_resolve_refuses_degrees_that_contradict_each_other() -> None:
    assert "parallel.sequence=true needs parallel.tensor > 1" in refusal(sequence=True)
    assert "parallel.virtual_pipeline=2 needs parallel.pipeline > 1" in refusal(virtual_pipeline=2)
    text = refusal(pipeline=4, virtual_pipeline=2, gradient_accumulation_steps=6)
    assert "GAS=6 is not divisible by 4" in text


def test_resolve_checks_the_number_of_ranks() -> None:
    assert resolve(tensor=2, pipeline=2, data=2, world_size=8).world_size == 8
    text = refusal(tensor=2, pipeline=2, data=2, world_size=16)
    assert text.startswith("16 ranks are there, but tensor x pipeline x data = 2 x 2 x 2 = 8;")


@pytest.mark.parametrize("name", ["tensor", "pipeline", "virtual_pipeline", "data", "micro_batch_size"])
def test_degrees_start_at_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"parallel.{name} must be at least 1, got 0"):
        ParallelConfig(**{name: 0})


@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "global_batch_size"])
def test_batch_sizes_start_at_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"parallel.{name} must be at least 1 or null, got 0"):
        ParallelConfig(**{name: 0})


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (ParallelLayout(tensor=5), {}, "model.num_heads: 5 does not divide 12"),
        (ParallelLayout(tensor=4), {}, "model.num_kv_groups: 4 does not divide 6"),
        (ParallelLayout(tensor=3), {"d_ff": 100}, "model.d_ff: 3 does not divide 100"),
        (ParallelLayout(tensor=3), {}, "padded vocabulary: 3 does not divide 128"),
        (ParallelLayout(tensor=6, sequence=True), {"pad_vocab_to": 6}, "under parallel.sequence: 6 does not divide 32"),
        (ParallelLayout(pipeline=3), {}, "3 x 1 = 3 does not divide 8"),
        (ParallelLayout(pipeline=4, virtual_pipeline=4), {}, "4 x 4 = 16 does not divide 8"),
    ],
)
def test_check_model_names_the_numbers_that_do_not_fit(
    layout: ParallelLayout, changes: dict[str, int], message: str
) -> None:
    model = ModelConfig(**{**vars(MODEL), **changes})
    with pytest.raises(LayoutError, match=message):
        layout.check_model(model)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(tensor=2, sequence=True, pipeline=4, data=7),
        ParallelLayout(pipeline=4, virtual_pipeline=2, gradient_accumulation_steps=4),
    ],
    ids=str,
)
def test_check_model_accepts_what_fits(layout: ParallelLayout) -> None:
    layout.check_model(MODEL)


def test_check_model_leaves_an_unknown_vocabulary_for_later() -> None:
    ParallelLayout(tensor=3).check_model(ModelConfig(**{**vars(MODEL), "vocab_size": None}))


def test_coordinates_are_a_bijection_with_tensor_fastest_then_data_then_pipeline() -> None:
    layout = ParallelLayout(tensor=2, pipeline=3, data=4)
    places = [layout.coordinates(rank) for rank in range(24)]
    expected = product(range(3), range(4), range(2))
    assert places == [Coordinates(pipeline=p, data=d, tensor=t) for p, d, t in expected]


def test_coordinates_are_those_of_megatron() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns of every accelerator that is not installed
        from megatron.core.parallel_state import RankGenerator
    layout = ParallelLayout(tensor=2, pipeline=3, data=4)
    megatron = RankGenerator(tp=2, ep=1, dp=4, pp=3, cp=1, order="tp-cp-ep-dp-pp")
    for axis, name in (("tp", "tensor"), ("dp", "data"), ("pp", "pipeline")):
        for group in megatron.get_ranks(axis):
            places = [layout.coordinates(rank) for rank in group]
            assert [getattr(place, name) for place in places] == list(range(len(group)))
            assert len({place._replace(**{name: 0}) for place in places}) == 1


@pytest.mark.parametrize("rank", [-1, 8])
def test_coordinates_refuse_ranks_that_do_not_exist(rank: int) -> None:
    with pytest.raises(LayoutError, match=f"rank {rank} does not exist: the layout has ranks 0 to 7"):
        ParallelLayout(tensor=2, pipeline=2, data=2).coordinates(rank)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches", "bubble"),
    [(1, 1, 8, 0.0), (2, 1, 128, 0.0078), (4, 1, 128, 0.0234), (8, 1, 128, 0.0547), (4, 3, 8, 0.125)],
)
def test_bubble_fraction(pipeline: int, virtual: int, micro_batches: int, bubble: float) -> None:
    layout = ParallelLayout(pipeline=pipeline, virtual_pipeline=virtual, gradient_accumulation_steps=micro_batches)
    assert layout.bubble_fraction == pytest.approx(bubble, abs=5e-5)


def test_with_global_batch_changes_the_accumulation_alone() -> None:
    layout = ParallelLayout(tensor=2, data=3, micro_batch_size=2, gradient_accumulation_steps=4)
    ramped = layout.with_global_batch(12)
    assert ramped == ParallelLayout(tensor=2, data=3, micro_batch_size=2, gradient_accumulation_steps=2)
    assert layout.global_batch_size == 24


@pytest.mark.parametrize("size", [7, 3, 0, -6])
def test_with_global_batch_refuses_other_sizes(size: int) -> None:
    with pytest.raises(LayoutError, match=f"a global batch of {size} is not a positive multiple of MBS x DP = 6"):
        ParallelLayout(data=3, micro_batch_size=2).with_global_batch(size)


def test_with_global_batch_checks_the_interleaved_schedule() -> None:
    layout = ParallelLayout(pipeline=4, virtual_pipeline=2, gradient_accumulation_steps=8)
    with pytest.raises(LayoutError, match="GAS=6 is not divisible by 4"):
        layout.with_global_batch(6)


def test_layout_reads_as_one_line() -> None:
    plain = ParallelLayout(tensor=2, pipeline=4, data=3, micro_batch_size=2, gradient_accumulation_steps=8)
    assert str(plain) == "TP2 PP4 DP3 MBS2 GAS8"
    every = ParallelLayout(tensor=2, pipeline=4, virtual_pipeline=2, sequence=True, gradient_accumulation_steps=8)
    assert str(every) == "TP2+SP PP4x2 DP1 MBS1 GAS8"
