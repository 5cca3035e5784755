from dataclasses import replace
from typing import Any

import pytest

from steerscale.engines.config import EngineConfig
from steerscale.errors import LayoutError
from steerscale.models.config import ModelConfig, Recompute
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.hardware import Precision
from steerscale.planning.memory import (
    GIB,
    MemoryEstimate,
    chunks_in_flight,
    estimate_memory,
    layer_activation_bytes,
    rank_parameters,
    shard_parameters,
    unique_parameters,
)
from steerscale.planning.sae_memory import SAEShape, sae_bytes
from tests.planning.shapes import GELU, LEAST_RECOMPUTATION, SWIGLU, TEUKEN_LIKE, gpt3

SIX_BILLION = gpt3(32, 4096, dropout=0.1)


def layout_on_16(tensor: int, pipeline: int) -> ParallelLayout:
    """16 GPUs, MBS 2, GAS 128."""
    data = 16 // (tensor * pipeline)
    return ParallelLayout(
        tensor=tensor, pipeline=pipeline, data=data, micro_batch_size=2, gradient_accumulation_steps=128
    )


def on_40_gb(tensor: int, pipeline: int, recompute: Recompute) -> MemoryEstimate:
    """6.7B with bf16 weights, ZeRO-1 and stored attention scores."""
    return estimate_memory(
        SIX_BILLION,
        layout_on_16(tensor, pipeline),
        engine=EngineConfig(precision="bf16", recompute=recompute),
        fused_attention=False,
    )


def test_shard_parameters_by_hand() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2)
    # a layer: split QKV 192 + 24, output 64, MLP 256 + 32 + 256 = 824; whole norms 32, biases 8 + 8 = 48
    # stage 0: embedding 128 x 8 = 1024 split, positions 16 x 8 = 128 whole
    assert [shard_parameters(GELU, layout, rank) for rank in (0, 1)] == [(824 + 1024) // 2 + 48 + 128] * 2
    # stage 1: final norm 16 whole, its own copy of the tied embedding
    assert [shard_parameters(GELU, layout, rank) for rank in (2, 3)] == [(824 + 1024) // 2 + 48 + 16] * 2
    assert rank_parameters(GELU, layout, 2).tied_copy == 512


def test_an_untied_head_is_no_copy_and_one_stage_needs_none() -> None:
    assert rank_parameters(SWIGLU, ParallelLayout(pipeline=2), 1).tied_copy == 0
    assert rank_parameters(GELU, ParallelLayout(), 0).tied_copy == 0
    assert shard_parameters(GELU, ParallelLayout(), 0) == GELU.num_parameters()


@pytest.mark.parametrize(
    "model",
    [
        GELU,
        SWIGLU,
        replace(SWIGLU, qkv_bias=True, tie_embeddings=True),
        replace(GELU, tie_embeddings=False),
        TEUKEN_LIKE,
    ],
    ids=["gelu", "swiglu", "qkv-bias", "untied", "teuken-like"],
)
@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(tensor=2),
        ParallelLayout(pipeline=2, data=3),
        ParallelLayout(tensor=2, pipeline=2, data=2, sequence=True),
    ],
    ids=str,
)
def test_unique_parameters_are_those_of_the_model(model: ModelConfig, layout: ParallelLayout) -> None:
    assert unique_parameters(model, layout) == model.num_parameters()


def test_interleaving_moves_layers_but_no_parameters() -> None:
    plain = ParallelLayout(tensor=2, pipeline=4, gradient_accumulation_steps=8)
    interleaved = replace(plain, virtual_pipeline=4)
    held = [shard_parameters(TEUKEN_LIKE, layout, rank) for layout in (plain, interleaved) for rank in range(8)]
    assert held[:8] == held[8:]


def test_shard_parameters_refuses_what_does_not_exist() -> None:
    with pytest.raises(LayoutError, match="rank 4 does not exist"):
        shard_parameters(GELU, ParallelLayout(tensor=2, pipeline=2), 4)
    with pytest.raises(LayoutError, match="4 does not divide 2"):
        shard_parameters(GELU, ParallelLayout(tensor=4), 0)


@pytest.mark.parametrize(
    ("precision", "distributed", "weights", "gradients", "optimizer"),
    [("bf16", False, 2, 4, 12), ("fp32", False, 4, 4, 8), ("bf16", True, 2, 4, 3), ("fp32", True, 4, 4, 2)],
)
def test_states_take_known_bytes_a_parameter(
    precision: Precision, distributed: bool, weights: int, gradients: int, optimizer: int
) -> None:
    estimate = estimate_memory(
        GELU,
        ParallelLayout(data=4),
        engine=EngineConfig(precision=precision, distributed_optimizer=distributed),  # type: ignore[arg-type]
    )
    parameters = GELU.num_parameters()
    assert estimate.weights == weights * parameters
    assert estimate.gradients == gradients * parameters
    assert estimate.optimizer == optimizer * parameters


@pytest.mark.parametrize("tensor", [1, 8])
def test_layer_activations_are_the_papers(tensor: int) -> None:
    # arXiv 2205.05198, table 2, in units of s b h; 5 a s/h = 5 x 32 x 2048 / 4096 = 80
    def units(recompute: Recompute, *, sequence: bool, fused: bool = False) -> float:
        layout = ParallelLayout(tensor=tensor, sequence=sequence, micro_batch_size=2)
        held = layer_activation_bytes(SIX_BILLION, layout, precision="bf16", recompute=recompute, fused_attention=fused)
        return held / (2048 * 2 * 4096)

    assert units("none", sequence=False) == 10 + 24 / tensor + 80 / tensor
    assert units("none", sequence=False, fused=True) == 10 + 24 / tensor
    assert units("selective", sequence=False) == 10 + 24 / tensor
    assert units("pointwise", sequence=False, fused=True) == 6 + 16 / tensor
    assert units("full", sequence=False) == 2
    if tensor > 1:
        assert units("none", sequence=True) == (34 + 80) / tensor
        assert units("selective", sequence=True) == 34 / tensor
        assert units("full", sequence=True) == 2 / tensor


def test_layer_activations_of_other_shapes() -> None:
    def units(**changes: Any) -> float:
        model = replace(SIX_BILLION, **changes)
        held = layer_activation_bytes(model, ParallelLayout(), precision="bf16", recompute="none")
        return held / (2048 * 4096)

    assert units(d_ff=8192) == 18 + 4 * 2
    assert units(d_ff=8192, activation="swiglu") == 18 + 6 * 2
    assert units(dropout=0.0) == 32
    # queries and the attention's result are 2 each, keys and values 2/4 each
    assert units(num_kv_groups=8) == 34 - 4 + 1
    assert units(d_head=256, num_kv_groups=8) == 34 - 8 + 2 * 2 * 2 + 2


def test_scores_without_dropout_are_the_softmax_alone() -> None:
    def scores(model: ModelConfig) -> int:
        stored, fused = (
            layer_activation_bytes(model, ParallelLayout(), precision="bf16", recompute="none", fused_attention=fused)
            for fused in (False, True)
        )
        return stored - fused

    assert scores(SIX_BILLION) == 5 * 32 * 2048**2
    assert scores(replace(SIX_BILLION, attention_dropout=0.0)) == 2 * 32 * 2048**2


def test_fp32_doubles_activations_but_not_masks() -> None:
    def held(precision: Precision) -> int:
        return layer_activation_bytes(
            SIX_BILLION,
            ParallelLayout(),
            precision=precision,
            recompute="none",
        )

    assert held("bf16") == 34 * 2048 * 4096
    assert held("fp32") == (2 * 32 + 2) * 2048 * 4096


@pytest.mark.parametrize(
    ("virtual", "micro_batches", "in_flight"),
    [
        (1, 8, [4, 3, 2, 1]),
        (1, 2, [2, 2, 2, 1]),
        (2, 8, [11, 9, 7, 5]),
        (2, 4, [8, 8, 7, 5]),
    ],
)
def test_chunks_in_flight(virtual: int, micro_batches: int, in_flight: list[int]) -> None:
    layout = ParallelLayout(pipeline=4, virtual_pipeline=virtual, gradient_accumulation_steps=micro_batches)
    assert [chunks_in_flight(layout, stage) for stage in range(4)] == in_flight


def test_interleaving_holds_the_papers_factor_more() -> None:
    # arXiv 2205.05198, section 4.2.3: stage 0 holds L (1 + (p-1)/(p v)) layers instead of L
    layout = ParallelLayout(pipeline=4, virtual_pipeline=8, gradient_accumulation_steps=64)
    layers = chunks_in_flight(layout, 0) * 32 / (4 * 8)
    assert layers == 32 * (1 + 3 / 32)


def test_stages_hold_what_is_theirs() -> None:
    model, layout = SIX_BILLION, ParallelLayout(pipeline=4, micro_batch_size=2, gradient_accumulation_steps=128)
    stages = [
        estimate_memory(model, layout, engine=EngineConfig(precision="bf16", distributed_optimizer=False), stage=stage)
        for stage in range(4)
    ]
    width = 2048 * 2 * 4096
    # 8 layers of 34 s b h for each micro-batch in flight; 4 dropout masks of the embedding; inputs of norm and head
    assert [stage.activations / width for stage in stages] == [4 * 272 + 4, 3 * 272, 2 * 272, 272 + 4]
    assert [stage.logits for stage in stages] == [0, 0, 0, 2 * 2048 * 2 * 51200]
    assert stages[0].weights == 2 * (model.num_parameters(embeddings=False) - 8192 + 4 * (51200 + 2048) * 4096) // 4


def test_each_part_is_divided_by_its_own_degrees() -> None:
    model = gpt3(32, 4096)
    layout = ParallelLayout(tensor=2, pipeline=2, virtual_pipeline=2, data=4, gradient_accumulation_steps=4)
    first, last = (
        estimate_memory(model, layout, engine=EngineConfig(precision="bf16"), stage=stage) for stage in range(2)
    )
    # ranks 0 to 7 are stage 0; without dropout a layer keeps (8 + 24/2) s b h; chunks of 8 layers, 5 and 3 in flight
    assert first.weights == 2 * shard_parameters(model, layout, 7)
    assert last.weights == 2 * shard_parameters(model, layout, 8) < first.weights
    assert last.optimizer == 12 * shard_parameters(model, layout, 8) // 4
    assert first.activations == 5 * 8 * 20 * 2048 * 4096
    assert last.activations == (3 * 8 * 20 + 4) * 2048 * 4096
    assert (first.logits, last.logits) == (0, 2 * 2048 * 51200 // 2)


def test_recomputation_holds_one_layers_working_set() -> None:
    estimate = estimate_memory(
        SIX_BILLION,
        ParallelLayout(),
        engine=EngineConfig(precision="bf16", distributed_optimizer=False, recompute="full"),
        fused_attention=False,
    )
    # 32 inputs, one layer rebuilt beside its input, one embedding mask, inputs of norm and head
    assert estimate.activations == (32 * 2 + (114 - 2) + 1 + 4) * 2048 * 4096


def test_fullest_stage_is_the_default() -> None:
    layout = ParallelLayout(pipeline=4, gradient_accumulation_steps=128)
    options: dict[str, Any] = {"engine": EngineConfig(precision="bf16", distributed_optimizer=False)}
    stages = [estimate_memory(SIX_BILLION, layout, stage=stage, **options).total for stage in range(4)]
    assert estimate_memory(SIX_BILLION, layout, **options).total == max(stages) == stages[0]
    # one micro-batch in all: nothing piles up on stage 0, and the last one has the logits
    alone = replace(layout, gradient_accumulation_steps=1)
    assert estimate_memory(SIX_BILLION, alone, **options).logits > 0


@pytest.mark.parametrize("stage", [-1, 4])
def test_estimate_memory_refuses_a_stage_that_is_not_there(stage: int) -> None:
    with pytest.raises(LayoutError, match="does not exist"):
        estimate_memory(
            SIX_BILLION,
            ParallelLayout(pipeline=4),
            engine=EngineConfig(precision="bf16"),
            stage=stage,
        )


def test_total_gib_is_the_sum_of_the_parts() -> None:
    estimate = MemoryEstimate(
        weights=GIB, gradients=GIB, optimizer=GIB, activations=GIB, logits=GIB // 2, buffers=GIB // 4
    )
    assert estimate.total_gib == 4.75


def test_saes_share_out_what_zero_shares_out() -> None:
    def states(**engine: Any) -> list[int]:
        held = sae_bytes(
            [SAEShape(d_in=8, d_out=8, width=64)],
            ParallelLayout(data=2),
            engine=EngineConfig(**engine),
            averaged=False,
            buffer_bytes=0,
        )
        return [held[part] // parameters for part in ("SAEs", "gradients", "optimizer")]

    parameters = 64 * 17 + 8
    assert states() == [4, 4, 4]
    assert states(distributed_optimizer=False) == [4, 4, 8]
    # fp32 parameters a second time, and a bucket; ZeRO-2 reduces through a copy of it
    assert states(name="deepspeed", zero_stage=1) == [4, 4 + 4, 6]
    assert states(name="deepspeed", zero_stage=2) == [4, 2 + 4 + 4, 6]


def test_6_7b_on_one_40_gb_gpu_has_too_much_state() -> None:
    estimate = on_40_gb(1, 1, "full")
    state = estimate.weights + estimate.gradients + estimate.optimizer
    assert state / GIB == pytest.approx(41.9, abs=0.05)


@pytest.mark.parametrize(("tensor", "pipeline", "least"), LEAST_RECOMPUTATION)
def test_6_7b_layouts_on_40_gb_need_this_much_recomputation(tensor: int, pipeline: int, least: str | None) -> None:
    usable_gib = 36
    modes: tuple[Recompute, ...] = ("none", "selective", "full")
    fitting = [mode for mode in modes if on_40_gb(tensor, pipeline, mode).total_gib <= usable_gib]
    assert (fitting[0] if fitting else None) == least
