from dataclasses import replace

import pytest

from steerscale.engines.config import EngineConfig
from steerscale.errors import ConfigError
from steerscale.models.config import Recompute
from steerscale.parallel.layout import ParallelLayout
from steerscale.planning.layouts import Planned, plan_layouts, plan_one
from steerscale.planning.machine import machine_of
from steerscale.planning.memory import GIB
from steerscale.planning.search import Search, Task
from tests.planning.shapes import LEAST_RECOMPUTATION, gpt3

SMALL = Task(model=gpt3(24, 2048), global_batch_size=64, gpus=8, machine=machine_of("a100-sxm-40gb"))


def reasons(task: Task, search: Search | None = None) -> dict[str, str]:
    """What is rejected -> with which numbers."""
    return {entry.what: entry.text for entry in plan_layouts(task, search).rejections}


def layouts(planned: Planned) -> set[tuple[int, int, int, int]]:
    return {
        (plan.layout.tensor, plan.layout.pipeline, plan.layout.virtual_pipeline, plan.layout.data)
        for plan in planned.plans
    }


def test_plan_layouts_tries_every_split_of_the_gpus() -> None:
    planned = plan_layouts(SMALL)
    assert {(t, p, d) for t, p, _, d in layouts(planned)} == {
        (t, p, 8 // t // p) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) if t * p <= 8
    }
    # 24 layers: on 2 stages 12 each, in 1, 2, 3, 4, 6 or 12 chunks
    assert {v for _, p, v, _ in layouts(planned) if p == 2} == {1, 2, 3, 4, 6, 12}
    for plan in planned.plans:
        layout = plan.layout
        assert layout.world_size == 8
        assert layout.global_batch_size == 64
        layout.check_model(SMALL.model)
        assert plan.fit.memory.total_gib <= 36
    assert {plan.layout.sequence for plan in planned.plans if plan.layout.tensor > 1} == {False, True}
    assert {plan.engine.recompute for plan in planned.plans} == {"none", "pointwise", "full"}
    assert {plan.engine.zero for plan in planned.plans if plan.layout.data > 1} == {0, 1}


def test_plans_come_in_the_order_of_their_times() -> None:
    seconds = [plan.time.total for plan in plan_layouts(SMALL).plans]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]


def test_every_rejection_names_its_numbers() -> None:
    task = replace(SMALL, model=replace(SMALL.model, num_heads=12, d_head=128, num_layers=6), gpus=8)
    found = reasons(task)
    assert "8 does not divide 12" in found["TP8"]
    assert "model.num_heads" in found["TP8"]
    assert "4 x 1 = 4 does not divide 6" in found["TP1 PP4"]


def test_batch_and_schedule_rejections() -> None:
    found = reasons(replace(SMALL, global_batch_size=12))
    assert "12 is not divisible by DP = 8" in found["TP1 PP1 DP8"]
    assert "GAS=3 is not divisible by 2" in found["TP1 PP2x2 DP4 MBS1"]
    found = reasons(SMALL, Search(micro_batch_size=[3]))
    assert "micro_batch_size x data = 3 x 8 = 24" in found["TP1 PP1 DP8 MBS3"]
    assert "TP16 x PP1 = 16 does not divide 8" in reasons(SMALL, Search(tensor=[16], pipeline=[1]))["TP16 PP1"]


def test_sequence_that_tensor_ranks_cannot_share() -> None:
    task = replace(SMALL, model=replace(SMALL.model, seq_len=2047))
    assert "does not divide 2047" in reasons(task)["TP2+SP"]
    assert [entry.what for entry in plan_layouts(task).rejections].count("TP2+SP") == 1


def test_memory_rejection_names_gib_by_part() -> None:
    task = replace(SMALL, model=gpt3(32, 4096), gpus=1, global_batch_size=1)
    planned = plan_layouts(task)
    assert planned.plans == []
    text = next(entry.text for entry in planned.rejections if "recompute full" in entry.what)
    state = 18 * gpt3(32, 4096).num_parameters() / GIB
    # 111.6 of state, 36 usable; optimizer 12/18 of it, gradients 4/18
    assert float(text.split(" GiB over")[0]) > state - 36
    assert f"optimizer {state * 12 / 18:.1f}" in text
    assert f"gradients {state * 4 / 18:.1f}" in text


def test_reasons_are_counted() -> None:
    planned = plan_layouts(replace(SMALL, model=gpt3(32, 4096), gpus=2, global_batch_size=4))
    counts = planned.reasons()
    assert sum(counts.values()) == len(planned.rejections)
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert counts["more than the 36.0 GiB usable of 40"] > 10


def test_search_limits_what_is_tried() -> None:
    search = Search(
        tensor=[2],
        pipeline=[2],
        virtual_pipeline=[1],
        micro_batch_size=[1, 2],
        gradient_accumulation_steps=[16],
        sequence=[True],
        recompute=["full"],
        zero=[1],
    )
    (plan,) = plan_layouts(SMALL, search).plans
    assert str(plan) == "TP2+SP PP2 DP2 MBS2 GAS16 ZeRO-1 recompute full"
    assert "GAS would be 32, asked for 16" in reasons(SMALL, search)["TP2 PP2 DP2 MBS1"]


DEEPSPEED = replace(SMALL, engine=EngineConfig(name="deepspeed", precision="bf16"))


def test_deepspeed_is_searched_where_it_can_run() -> None:
    planned = plan_layouts(DEEPSPEED)
    assert {plan.engine.zero for plan in planned.plans if plan.layout.pipeline == 1 < plan.layout.data} == {1, 2, 3}
    assert {plan.engine.zero for plan in planned.plans if plan.layout.pipeline > 1} == {1}
    assert not any(plan.layout.sequence or plan.layout.virtual_pipeline > 1 for plan in planned.plans)
    found = {entry.what: entry.text for entry in planned.rejections}
    assert "engine.precision=bf16 with ZeRO-0" in found["ZeRO-0 in bf16"]
    assert "engine.zero_stage=3 with parallel.pipeline=2" in found["TP1 PP2 DP4 MBS1 GAS16 ZeRO-3"]


def test_zero_that_the_engine_does_not_have_is_rejected() -> None:
    found = plan_layouts(SMALL, Search(zero=[3]))
    assert not found.plans
    texts = [entry.text for entry in found.rejections if entry.what == "ZeRO-3 in bf16"]
    assert texts == ["--zero 3: Megatron-Core shards the optimizer state only, ZeRO-1"]


def test_each_zero_stage_and_offload_take_less_of_the_device() -> None:
    layout = ParallelLayout(data=8, gradient_accumulation_steps=8)
    memory = []
    for settings in (
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 3, "offload_optimizer": True},
    ):
        engine = replace(DEEPSPEED.engine, **settings)
        task = replace(DEEPSPEED, model=gpt3(32, 4096), engine=engine)
        memory.append(plan_one(task, layout, engine).fit.memory)
    totals = [entry.total for entry in memory]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 4
    assert [entry.host > 0 for entry in memory] == [False, False, False, True]


def test_deepspeeds_overrides_name_its_stage() -> None:
    engine = EngineConfig(name="deepspeed", zero_stage=2, precision="bf16", offload_optimizer=True)
    plan = plan_one(replace(SMALL, engine=engine), ParallelLayout(data=8, gradient_accumulation_steps=8), engine)
    wanted = {"engine=deepspeed", "engine.zero_stage=2", "engine.offload_optimizer=true", "engine.precision=bf16"}
    assert wanted <= set(plan.overrides())
    assert not any("distributed_optimizer" in text for text in plan.overrides())
    assert plan.notes == ["without the time of the optimizer on the host"]
    assert str(plan) == "TP1 PP1 DP8 MBS1 GAS8 DS ZeRO-2 offload recompute none"


def test_selective_recomputation_is_tried_where_scores_are_stored() -> None:
    planned = plan_layouts(replace(SMALL, fused_attention=False))
    assert {plan.engine.recompute for plan in planned.plans} == {"none", "pointwise", "selective", "full"}


def test_overrides_compose_to_the_layout() -> None:
    plan = plan_layouts(SMALL).plans[0]
    values = dict(override.split("=") for override in plan.overrides())
    assert int(values["parallel.tensor"]) == plan.layout.tensor
    assert values["parallel.global_batch_size"] == "64"
    assert values["engine.recompute"] == plan.engine.recompute


def test_tensor_group_beyond_the_node_is_noted_and_slower() -> None:
    task = replace(SMALL, machine=machine_of("a100-sxm-40gb", gpus_per_node=4, inter_node_gb_per_second=6.25))

    def plan(tensor: int, gpus_per_node: int):
        on = replace(task, machine=replace(task.machine, gpus_per_node=gpus_per_node))
        layout = ParallelLayout(tensor=tensor, data=8 // tensor, gradient_accumulation_steps=8 * tensor)
        return plan_one(on, layout, on.engine)

    assert plan(8, 4).notes == ["TP8 leaves the node of 4"]
    assert plan(4, 4).notes == plan(8, 8).notes == []
    assert plan(8, 4).time.tensor_communication > 5 * plan(8, 8).time.tensor_communication
    assert plan(8, 4).time.total > plan(4, 4).time.total


def test_overlap_needs_a_run_and_a_machine_that_can() -> None:
    layout = ParallelLayout(data=8, gradient_accumulation_steps=8)

    def exposed(task: Task) -> float:
        return plan_one(task, layout, task.engine).time.data_communication

    without = exposed(replace(SMALL, engine=replace(SMALL.engine, overlap=False)))
    assert exposed(SMALL) < without
    assert exposed(replace(SMALL, machine=replace(SMALL.machine, overlaps=False))) == without


@pytest.mark.parametrize("key", ["gpus", "global_batch_size"])
def test_task_refuses_nothing_to_do(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be at least 1, got 0"):
        replace(SMALL, **{key: 0})


@pytest.mark.parametrize(("tensor", "pipeline", "least"), LEAST_RECOMPUTATION)
def test_6_7b_on_16_gpus_of_40_gb_needs_this_much_recomputation(tensor: int, pipeline: int, least: str | None) -> None:
    # facts of the talk's case: ZeRO-1, MBS 2, GAS 128, scores stored, buffers and the device's own share counted as well
    data = 16 // (tensor * pipeline)
    task = Task(
        model=gpt3(32, 4096, dropout=0.1),
        global_batch_size=256 * data,
        gpus=16,
        machine=machine_of("a100-40gb"),
        fused_attention=False,
    )
    modes: tuple[Recompute, ...] = ("none", "selective", "full")
    fitting = []
    for mode in modes:
        search = Search(
            tensor=[tensor],
            pipeline=[pipeline],
            virtual_pipeline=[1],
            micro_batch_size=[2],
            sequence=[False],
            recompute=[mode],
            zero=[1],
        )
        fitting += [plan.engine.recompute for plan in plan_layouts(task, search).plans]
    assert (fitting[0] if fitting else None) == least
