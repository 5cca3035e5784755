from dataclasses import replace
from typing import Any

import pytest

from benchmarks.planner_accuracy import fit_matmul, memory, predicted, published_times
from steerscale.engines.config import EngineConfig
from steerscale.models.config import ModelConfig
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.flops import hardware_flops
from steerscale.planning.iteration import IterationTime, predict_iteration
from steerscale.planning.machine import Efficiency, Machine, machine_of
from steerscale.planning.memory import shard_parameters
from tests.planning.shapes import TEUKEN_LIKE, gpt3

MODEL = gpt3(32, 4096)
NOTHING = 1e30
"""A bandwidth at which nothing takes time."""
COMPUTE_ONLY = Machine(
    name="ideal",
    peak_tflops=100.0,
    memory_gib=80.0,
    bandwidth_gb_per_second=NOTHING,
    intra_node_gb_per_second=NOTHING,
    inter_node_gb_per_second=NOTHING,
    efficiency=Efficiency(matmul=0.5, attention=0.5, memory=1.0, network=1.0, collective_seconds=0.0),
)


def predict(layout: ParallelLayout, machine: Machine, model: ModelConfig = MODEL, **changes) -> IterationTime:
    split = changes.pop("split_boundaries", False)
    engine = EngineConfig(**{"precision": "bf16", "overlap": False, **changes})
    return predict_iteration(model, layout, machine, engine=engine, split_boundaries=split)


@pytest.mark.parametrize("model", [MODEL, TEUKEN_LIKE], ids=["gpt", "gqa-swiglu"])
def test_products_alone_take_their_flops(model: ModelConfig) -> None:
    layout = ParallelLayout(data=2, micro_batch_size=2, gradient_accumulation_steps=4)
    time = predict(layout, COMPUTE_ONLY, model)
    # a fused attention's backward pass repeats the scores: 2.5 forward passes where FLOPs are counted as 2
    repeated = (
        hardware_flops(model, batch_size=16, recompute="selective")
        - hardware_flops(model, batch_size=16, recompute="none")
    ) / 2
    flops = hardware_flops(model, batch_size=16, recompute="none") + repeated
    assert time.total == pytest.approx(flops / 2 / 50e12)
    assert time.matmul == pytest.approx(time.total)


def test_full_recomputation_adds_a_forward_pass_of_the_blocks() -> None:
    layout = ParallelLayout(micro_batch_size=2, gradient_accumulation_steps=4)
    extra = predict(layout, COMPUTE_ONLY, recompute="full").total - predict(layout, COMPUTE_ONLY).total
    flops = hardware_flops(MODEL, batch_size=8, recompute="full") - hardware_flops(
        MODEL, batch_size=8, recompute="none"
    )
    assert extra == pytest.approx(flops / 50e12)


def test_bubble_is_the_schedules() -> None:
    # without a vocabulary to speak of all stages are alike: (p-1)/(v m) of the ideal time
    model = replace(MODEL, vocab_size=1, pad_vocab_to=8)
    for virtual in (1, 2):
        layout = ParallelLayout(pipeline=4, virtual_pipeline=virtual, gradient_accumulation_steps=8)
        time = predict(layout, COMPUTE_ONLY, model)
        assert time.bubble / (time.total - time.bubble) == pytest.approx(layout.bubble_fraction, rel=1e-3)


def test_tensor_communication_by_hand() -> None:
    # forward and backward two all-reduces a layer each, 2 (t-1)/t of s b h x 2 bytes; one more behind embedding and head
    machine = replace(COMPUTE_ONLY, intra_node_gb_per_second=100.0)
    layout = ParallelLayout(tensor=4, micro_batch_size=2, gradient_accumulation_steps=3)
    reduced = 2 * 3 / 4 * (2 * 2048 * 2 * 4096) / 100e9
    assert predict(layout, machine).tensor_communication == pytest.approx(3 * (32 * 4 + 1) * reduced, rel=0.01)
    # sequence parallelism moves the same in other pieces
    sequence = replace(layout, sequence=True)
    assert predict(sequence, machine).tensor_communication == predict(layout, machine).tensor_communication


def test_a_tensor_group_over_two_nodes_has_the_ports_of_its_members() -> None:
    machine = replace(COMPUTE_ONLY, intra_node_gb_per_second=300.0, inter_node_gb_per_second=25.0, gpus_per_node=8)

    def seconds(tensor: int) -> float:
        return predict(ParallelLayout(tensor=tensor), machine).tensor_communication

    # 8 ports of 25 together carry 200 where the node carries 300
    assert seconds(16) / seconds(8) == pytest.approx((15 / 16 / 200) / (7 / 8 / 300))


def test_pipeline_communication_by_hand() -> None:
    machine = replace(COMPUTE_ONLY, inter_node_gb_per_second=25.0, gpus_per_node=4)
    layout = ParallelLayout(tensor=4, pipeline=2, micro_batch_size=2, gradient_accumulation_steps=8)
    boundary = 2 * 2048 * 2 * 4096 / 25e9
    assert predict(layout, machine).pipeline_communication == pytest.approx(2 * 8 * boundary)
    assert predict(replace(layout, sequence=True), machine).pipeline_communication == pytest.approx(4 * boundary)
    assert predict(layout, machine, split_boundaries=True).pipeline_communication == pytest.approx(4 * boundary)
    # overlapped and interleaved it runs beside computation
    interleaved = replace(layout, virtual_pipeline=2)
    assert predict(interleaved, machine).pipeline_communication == pytest.approx(4 * 8 * boundary)
    assert predict(interleaved, machine, overlap=True).pipeline_communication == 0


def test_data_communication_by_hand_and_hidden() -> None:
    machine = replace(COMPUTE_ONLY, intra_node_gb_per_second=300.0, inter_node_gb_per_second=25.0, gpus_per_node=8)
    layout = ParallelLayout(tensor=4, data=4, gradient_accumulation_steps=2)
    parameters = shard_parameters(MODEL, layout, 0)
    # two of the four replicas share a node, and so 2 x 25 GB/s; fp32 gradients, bf16 parameters
    expected = 3 / 4 * (4 + 2) * parameters / 50e9
    assert predict(layout, machine).data_communication == pytest.approx(expected)
    whole = predict(layout, machine, distributed_optimizer=False).data_communication
    assert whole == pytest.approx(3 / 4 * 2 * 4 * parameters / 50e9)
    assert predict(layout, machine, overlap=True).data_communication < expected
    assert predict(replace(layout, data=1), machine).data_communication == 0


def test_deepspeeds_data_communication_by_hand() -> None:
    machine = replace(COMPUTE_ONLY, intra_node_gb_per_second=100.0)
    layout = ParallelLayout(data=4, gradient_accumulation_steps=3)
    share = 3 / 4 * MODEL.num_parameters() / 100e9

    def seconds(stage: int, **changes: Any) -> float:
        return predict(layout, machine, **{"name": "deepspeed", "zero_stage": stage, **changes}).data_communication

    # fp32 gradients all-reduced once or for each of three micro-batches, bf16 parameters gathered once
    assert seconds(1) == pytest.approx((2 * 4 + 2) * share)
    assert seconds(2) == pytest.approx((3 * 2 * 4 + 2) * share)
    # parameters gathered twice and gradients scattered for each micro-batch: 3 N
    assert seconds(3) == pytest.approx(3 * (2 + 2 + 4) * share)
    assert seconds(3, precision="fp16") == pytest.approx(3 * (2 + 2 + 2) * share)
    assert seconds(0, precision="fp32") == pytest.approx(2 * 4 * share)
    assert seconds(2, overlap=True) < seconds(2)
    assert seconds(3, overlap=True) < seconds(3)


def test_optimizer_on_the_host_is_not_timed() -> None:
    machine = replace(COMPUTE_ONLY, bandwidth_gb_per_second=1000.0)
    time = predict(ParallelLayout(data=4), machine, name="deepspeed", zero_stage=2, offload_optimizer=True)
    assert time.optimizer == pytest.approx(4 * MODEL.num_parameters() / 1e12)


def test_optimizer_is_shared_out_over_the_replicas() -> None:
    machine = replace(COMPUTE_ONLY, bandwidth_gb_per_second=1000.0)
    parameters = MODEL.num_parameters()
    layout = ParallelLayout(data=4)
    assert predict(layout, machine).optimizer == pytest.approx((42 / 4 + 4) * parameters / 1e12)
    assert predict(layout, machine, distributed_optimizer=False).optimizer == pytest.approx(46 * parameters / 1e12)


def test_small_micro_batches_and_narrow_models_are_less_efficient() -> None:
    machine = machine_of("a100-sxm-80gb")

    def rate(model: ModelConfig, micro_batch_size: int, tensor: int = 1) -> float:
        layout = ParallelLayout(
            tensor=tensor, micro_batch_size=micro_batch_size, gradient_accumulation_steps=32 // micro_batch_size
        )
        return hardware_flops(model, batch_size=32, recompute="none") / tensor / predict(layout, machine, model).total

    assert rate(MODEL, 8) > 1.05 * rate(MODEL, 1)
    assert rate(MODEL, 4) > 1.1 * rate(gpt3(24, 1024), 4)
    assert rate(MODEL, 4) > 1.1 * rate(MODEL, 4, tensor=8)


def test_published_iteration_times() -> None:
    points = published_times()
    machine = machine_of("a100-sxm-80gb")
    errors = [abs(predicted(point, machine) / point.seconds - 1) for point in points]
    assert len(errors) == 18
    assert sum(errors) / 18 < 0.05
    assert max(errors) < 0.10
    assert fit_matmul(points, machine) == pytest.approx(Efficiency().matmul, abs=0.01)


def test_published_memory(capsys: pytest.CaptureFixture[str]) -> None:
    summary = memory()
    assert summary["memory_max"] < 0.10
    assert summary["shares_max"] < 0.02
    assert "530B full" in capsys.readouterr().out
