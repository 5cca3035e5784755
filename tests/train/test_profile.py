"""Traces of real steps, and what is read from them."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from steerscale.cli import main
from steerscale.errors import ConfigError, DataError
from steerscale.metrics import read_records
from steerscale.planning.flops import model_flops_per_token
from steerscale.rundir import KERNELS
from steerscale.testing.ranks import RankPool
from steerscale.train.config import MetricsConfig, RampUpConfig, TrainConfig
from steerscale.train.profile import StepProfiler
from steerscale.train.profile_config import ProfileConfig
from steerscale.train.profile_trace import (
    CATEGORIES,
    DIRECTORY,
    SUFFIX,
    category_of,
    find_traces,
    read_trace,
    step_name,
)
from tests.train.runs import MODEL, prepare, run_config, train


def test_a_run_traces_the_steps_and_ranks_it_was_told_to(
    pool: RankPool, german_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(
        german_data,
        tmp_path / "run",
        parallel={"tensor": 2},
        train=TrainConfig(steps=4, eval_interval=0, eval_samples=2),
        metrics=MetricsConfig(interval=4, warmup_steps=1, tensorboard=False),
        profile=ProfileConfig(steps=[2, 4], ranks=[1]),
    )
    run_dir = prepare(config)
    pool.run(train, run_dir, ranks=2)
    assert [path.name for path in find_traces(run_dir)] == [f"rank1.2{SUFFIX}", f"rank1.4{SUFFIX}"]
    assert "fused AdamW" in (run_dir / KERNELS).read_text(encoding="utf-8")
    (report,) = read_records(run_dir, "train")
    assert report["timed_steps"] == 1  # neither the warm-up nor the traced ones
    first, last = map(read_trace, find_traces(run_dir))
    assert (first.rank, first.step, last.step) == (1, 2, 4)
    for step in (first, last):
        assert sum(step.parts.values()) == pytest.approx(step.seconds)
        assert all(step.parts[category] > 0 for category in CATEGORIES)
    # All products of a step on this rank: half of the model's, but for the attention's, which one kernel computes.
    whole = model_flops_per_token(MODEL) * 8 * MODEL.seq_len
    attention = 12 * MODEL.num_layers * MODEL.d_model * MODEL.seq_len * 8 * MODEL.seq_len
    assert last.gemm_flops is not None
    assert whole - attention < 2 * last.gemm_flops < 1.3 * (whole + attention)

    assert main(["profile", str(run_dir), "--peak-tflops", "0.1"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].startswith("test: ")
    for part in (
        "Python, waiting",
        "median",
        "GEMM       ",
        " of the peak",
        "roofline   ",
        "longest of step 4, rank 1",
    ):
        assert part in text
    assert main(["profile", str(run_dir), "--json", "--top", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [step["model_flops"] for step in answer["steps"]] == pytest.approx([whole / 2] * 2)
    assert [len(step["longest"]) for step in answer["steps"]] == [2, 2]


def test_a_trace_that_cannot_be_written_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / DIRECTORY).touch()
    profiler = StepProfiler(ProfileConfig(steps=[1]), run_dir=tmp_path, rank=0, device=torch.device("cpu"))
    with caplog.at_level(logging.WARNING), profiler.step(1):
        torch.ones(2).sum()
    assert "the trace of step 1 could not be written" in caplog.text


def test_optimizer_and_python_have_times_of_their_own(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(steps=[1]), run_dir=tmp_path, rank=0, device=torch.device("cpu"))
    weight = torch.nn.Parameter(torch.randn(256, 256))
    adamw = torch.optim.AdamW([weight])
    with profiler.step(1):
        (torch.randn(64, 256) @ weight).square().mean().backward()
        adamw.step()
    (path,) = find_traces(tmp_path)
    step = read_trace(path)
    assert step.gemm_flops == 2 * 2 * 64 * 256 * 256  # forward, and the gradient of the weight
    assert step.parts["optimizer"] > 0
    assert step.parts["idle"] > 0
    assert step.parts["communication"] == 0


def test_products_that_add_to_a_buffer_have_flops(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(steps=[1]), run_dir=tmp_path, rank=0, device=torch.device("cpu"))
    into, a, b = torch.zeros(8, 16), torch.ones(8, 4), torch.ones(4, 16)
    with profiler.step(1):
        into.addmm_(a, b)
        into[None].baddbmm_(a[None], b[None])
    (path,) = find_traces(tmp_path)
    assert read_trace(path).gemm_flops == 2 * 2 * 8 * 4 * 16


def event(name: str, begin: float, end: float, *, cat: str = "kernel", tid: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": begin, "dur": end - begin, "args": {}}


def write(run_dir: Path, events: list[Any], *, name: str = f"rank0.3{SUFFIX}") -> Path:
    path = run_dir / DIRECTORY / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_kernels_that_run_at_once_count_once(tmp_path: Path) -> None:
    events = [
        event(step_name(3), 100, 200, cat="user_annotation", tid=1),
        event("ampere_bf16_s16816gemm_128x64", 110, 150),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 140, 170, tid=20),
        event("flash_fwd_kernel", 170, 180),
        event("void multi_tensor_apply_kernel<AdamFunctor>", 180, 190),
        event("void at::native::vectorized_elementwise_kernel", 190, 230),
        event("Memcpy DtoH", 225, 240, cat="gpu_memcpy"),
        event("cudaStreamSynchronize", 195, 199, cat="cuda_runtime", tid=1),
    ]
    step = read_trace(write(tmp_path, events))
    assert step.on_cuda
    assert step.seconds == pytest.approx(140e-6)  # until the last kernel
    assert {name: round(seconds * 1e6) for name, seconds in step.parts.items()} == {
        "GEMM": 40,
        "attention": 10,
        "optimizer": 10,
        "other compute": 50,
        "communication": 20,
        "idle": 10,
    }
    assert step.hidden_communication == pytest.approx(10e-6)
    assert step.synchronisations == {"cudaStreamSynchronize": 1}
    assert step.gemm_flops is None


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("aten::addmm", "GEMM"),
        ("aten::_mm", "GEMM"),
        ("nvjet_hsh_128x256", "GEMM"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("c10d::_allgather_base_", "communication"),
        ("gloo:all_reduce", "communication"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::add_", "other compute"),
        ("aten::mm_like_nothing", "GEMM"),
        ("aten::summary", "other compute"),
    ],
)
def test_names_have_categories(name: str, category: str) -> None:
    assert category_of(name) == category


def test_a_step_of_the_ramp_up_has_the_flops_of_its_own_batch(
    german_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp_up = RampUpConfig(start=2, increment=2, samples=8)
    config = run_config(
        german_data, tmp_path / "run", train=TrainConfig(steps=12, eval_interval=0, eval_samples=2, ramp_up=ramp_up)
    )
    run_dir = prepare(config)
    for step in (1, 12):
        events = [event(step_name(step), 0, 1e6, cat="user_annotation", tid=1)]
        write(run_dir, events, name=f"rank0.{step}{SUFFIX}")
    assert main(["profile", str(run_dir), "--json"]) == 0
    first, last = (step["model_flops"] for step in json.loads(capsys.readouterr().out)["steps"])
    batch = config.layout().global_batch_size
    assert last == model_flops_per_token(MODEL) * batch * MODEL.seq_len
    assert first == last * 2 / batch


def test_what_is_no_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"has no traces: run with profile\.steps"):
        find_traces(tmp_path)
    whole = event(step_name(3), 0, 9, cat="user_annotation")
    scalar = {**event("aten::mm", 1, 2, cat="cpu_op"), "args": {"Input Dims": [[], []]}}
    for events in ([], [event(step_name(4), 0, 1, cat="user_annotation")], [whole, scalar], ["text"]):
        with pytest.raises(DataError, match=r"rank0\.3.* cannot be read as a trace"):
            read_trace(write(tmp_path, events))
    path = write(tmp_path, [])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="cannot be read as a trace"):
        read_trace(path)
    assert main(["profile", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": [0]}, "count from 1"),
        ({"ranks": [-1]}, "must not be negative"),
        ({"steps": [1], "ranks": []}, "must not be empty"),
        ({"steps": [13]}, r"profile\.steps=\[13\] will never come: the run ends at train\.steps=12"),
        ({"steps": [1], "ranks": [1]}, r"profile\.ranks=\[1\]: there are ranks 0 to 0"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(tmp_path, tmp_path / "run", profile=ProfileConfig(**values)).layout()
