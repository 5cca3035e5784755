from pathlib import Path

import pytest

from launch.check import check_config
from launch.compose import compose_config
from launch.dry_run import plan_lines, replica_parameters, show_plan
from launch.train import main
from steerscale.train.config import RunConfig

GPT = ["launcher=dry_run", "model.vocab_size=51200", "train.steps=10"]
LAYER_67 = 12 * 4096**2 + 13 * 4096
"""Of 6.7b: QKV 3 h^2, output h^2, MLP 8 h^2; biases 3 h + h + 4 h + h, two norms 4 h."""
REPEATED_67 = 6 * 4096
"""Of these, what every tensor rank holds whole: two norms, the biases after the two row-parallel products."""
WORDS_67, POSITIONS_67, FINAL_NORM_67 = 51200 * 4096, 2048 * 4096, 2 * 4096


def config_of(*overrides: str) -> RunConfig:
    return check_config(compose_config([*GPT, *overrides]))


def layout(tensor: int, pipeline: int, data: int) -> list[str]:
    return [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.data={data}"]


def row(plan: str, rank: int) -> list[str]:
    """Cells of a rank's row."""
    (cells,) = (line.split() for line in plan.splitlines() if line.split()[:1] == [str(rank)])
    return cells


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data"), [(4, 2, 2), (8, 4, 4), (8, 4, 32), (1, 1, 16)], ids=["16", "128", "1024", "dp16"]
)
def test_totals_of_67b_are_those_computed_by_hand(tensor: int, pipeline: int, data: int) -> None:
    config = config_of("model=6.7b", *layout(tensor, pipeline, data), "parallel.gradient_accumulation_steps=8")
    total = 32 * LAYER_67 + WORDS_67 + POSITIONS_67 + FINAL_NORM_67
    assert total == 6_662_266_880
    copies = (tensor - 1) * (32 * REPEATED_67 + POSITIONS_67 + FINAL_NORM_67)
    copies += WORDS_67 if pipeline > 1 else 0  # the last stage keeps the tied embedding as well
    assert replica_parameters(config) == total + copies
    lines = dict(plan_lines(config))
    assert lines["model"].startswith("6,662,266,880 parameters")
    assert f"{(total + copies) * data:,} over all ranks" in lines["copies"]
    assert lines["ranks"].startswith(f"{tensor * pipeline * data:,} =")
    assert f"{8 * data:,} sequences" in lines["batch"]
    assert f"{8 * data * 2048 * 10:,} tokens" in lines["run"]


def test_ranks_of_1024_hold_what_their_stage_and_shard_say() -> None:
    config = config_of(
        "model=6.7b", *layout(8, 4, 32), "launcher.ranks=[0,517,1023]", "parallel.gradient_accumulation_steps=8"
    )
    plan = show_plan(config)
    layers = 8 * (LAYER_67 - REPEATED_67) // 8 + 8 * REPEATED_67
    # rank = tensor + 8 (data + 32 pipeline): 517 = 5 + 8 (0 + 32 x 2)
    assert row(plan, 517)[:6] == ["517", "2", "0", "5", "16-23", f"{layers:,}"]
    assert row(plan, 0)[:6] == ["0", "0", "0", "0", "0-7", f"{layers + WORDS_67 // 8 + POSITIONS_67:,}"]
    assert row(plan, 1023)[:6] == ["1023", "3", "31", "7", "24-31", f"{layers + WORDS_67 // 8 + FINAL_NORM_67:,}"]


def test_interleaved_and_sequence_parallel() -> None:
    config = config_of(
        "model=6.7b",
        *layout(8, 4, 32),
        "parallel.virtual_pipeline=2",
        "parallel.gradient_accumulation_steps=8",
        "parallel.sequence=true",
        "engine.precision=bf16",
        "launcher.ranks=[517]",
    )
    plan = show_plan(config)
    assert row(plan, 517)[4:6] == ["8-11,24-27", f"{8 * (LAYER_67 - REPEATED_67) // 8 + 8 * REPEATED_67:,}"]
    assert "4 stages of 2 chunks each" in plan
    assert "bubble 18.8%" in plan  # (4 - 1) / (2 x 8)
    assert "TP8+SP PP4x2 DP32" in plan


def test_gqa_with_swiglu_and_an_untied_head() -> None:
    config = config_of("model=7b_gqa_swiglu", *layout(8, 2, 2), "launcher.ranks=[0,31]")
    layer = 4096 * (32 + 2 * 8) * 128 + 4096 * 4096 + 3 * 4096 * 13440
    stage = 16 * (layer // 8 + 2 * 4096)
    plan = show_plan(config)
    assert row(plan, 0)[5] == f"{stage + 51200 * 4096 // 8:,}"
    assert row(plan, 31)[5] == f"{stage + 51200 * 4096 // 8 + 4096:,}"
    total = 32 * (layer + 2 * 4096) + 2 * 51200 * 4096 + 4096
    assert plan_lines(config)[0][1].startswith(f"{total:,} parameters")
    assert "32 heads on 8 key/value" in plan
    copies = 7 * (32 * 2 * 4096 + 4096)
    assert f"{copies:,} of them copies" in plan


def test_175b_on_1024_ranks() -> None:
    config = config_of("model=175b", *layout(8, 16, 8), "launcher.ranks=[517]")
    h = 12288
    total = 96 * (12 * h**2 + 13 * h) + 51200 * h + 2048 * h + 2 * h
    assert total == 174_615_846_912
    plan = show_plan(config)
    assert plan_lines(config)[0][1].startswith(f"{total:,} parameters")
    assert row(plan, 517)[:6] == ["517", "8", "0", "5", "48-53", f"{6 * (12 * h**2 + 7 * h) // 8 + 6 * 6 * h:,}"]
    assert "bubble 1500.0%" in plan
    assert "accumulate more micro-batches" in plan
    assert "fits devices of" in plan
    few = config_of("model=175b", *layout(8, 1, 1), "engine.precision=bf16")
    assert "too much for any device up to 141 GiB" in dict(plan_lines(few))["memory"]


def test_a_dataset_gives_vocabulary_and_epochs(
    german_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from steerscale.data.manifest import inspect_dataset

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # put back what launch() sets
    tokens = inspect_dataset(german_data).splits["train"].tokens
    steps = 3 * (tokens // 128 - 1) // 4
    assert main(["launcher=dry_run", f"data.path={german_data}", f"train.steps={steps}"]) == 0
    plan = capsys.readouterr().out
    assert "vocabulary of 1,000 tokens (padded to 1,024)" in plan
    assert f"{german_data}: {tokens:,} tokens" in plan
    assert f"read {steps / (tokens // 128 - 1):.3g} times over" in plan
    assert "each held once" in plan
    assert row(plan, 0)[5] == f"{1024 * 128 + 4 * (128 * 3 * 128 + 128**2 + 3 * 128 * 384 + 2 * 128) + 128:,}"
    assert list(tmp_path.iterdir()) == []


def test_a_blend_is_read_by_its_shares(german_data: Path, datasets: dict[str, Path]) -> None:
    blend = f"data.blend={{{german_data}:1,{datasets['no_valid']}:3}}"
    config = check_config(compose_config(["launcher=dry_run", blend, "train.steps=8"]))
    first, second = (text for title, text in plan_lines(config) if title == "data")
    assert "25.0% of the samples" in first
    assert "held out" in first
    assert "75.0% of the samples" in second
    assert "none held out" in second


def test_datasets_may_be_elsewhere_when_the_vocabulary_is_given() -> None:
    config = config_of("data.path=/on/the/cluster")
    assert dict(plan_lines(config))["data"] == "not on this machine, so not checked: /on/the/cluster"


def test_ramp_up_counts_in_the_tokens_of_the_run() -> None:
    ramp_up = "train.ramp_up={start: 2, increment: 2, samples: 8}"
    config = config_of("parallel.global_batch_size=8", ramp_up)
    # 3 stages over 8 samples: consumed 0 -> 2, 2 -> 2, 4 -> 4, then 8 for the other 7 steps
    assert f"{(2 + 2 + 4 + 7 * 8) * 128:,} tokens" in dict(plan_lines(config))["run"]
    assert "from 2 sequences in steps of 2 over the first 8" in dict(plan_lines(config))["batch"]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["optim.schedule=constant"], "0.0003, constant"),
        (["optim.schedule=wsd", "optim.min_lr=0"], "0.0003, linear over the last 1 steps to 0"),
        (["optim.schedule=wsd", "optim.decay_steps=4", "optim.warmup_steps=2"], "2 steps of warm-up to 0.0003, linear"),
        (["optim.warmup_steps=5"], "5 steps of warm-up to 0.0003, cosine to"),
    ],
)
def test_the_schedule_is_told_in_words(overrides: list[str], text: str) -> None:
    assert dict(plan_lines(config_of(*overrides)))["learning"].startswith(text)


def test_the_engine_and_its_memory_on_the_host_are_told() -> None:
    told = dict(plan_lines(config_of("engine=deepspeed", "engine.zero_stage=2", "engine.offload_optimizer=true")))
    assert told["engine"] == "DeepSpeed ZeRO-2 with offload in fp32, recompute none"
    assert told["memory"].endswith("of the host's memory a rank")
    assert "host" not in dict(plan_lines(config_of()))["memory"]


def test_dry_runs_of_a_sweep_need_no_directories(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["-m", *GPT, "parallel.tensor=1,2"]) == 0
    printed = capsys.readouterr().out
    assert "[1/2] parallel.tensor=1" in printed
    assert "[2/2] parallel.tensor=2" in printed
    assert printed.count("plan of 'gpt_tp") == 2
    assert "not started" not in printed
