"""Run directories to look at: hundreds of them, written by the code that writes real ones, from the records of one real run.

What is real: configuration, layout checks, run directories, records, FLOPs and predicted memory come from the library; loss
curve and jitter of the step times from the seed run. What is made up: seconds a step, by a rough model of a 16-GPU
machine, memory, and that some runs are restarted, skip steps, wait for data or fail. Nothing of it is a measurement of a GPU.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from steerscale.engines.config import EngineConfig
from steerscale.errors import LayoutError
from steerscale.metrics import Recorder
from steerscale.models.config import ModelConfig, Recompute
from steerscale.optim import OptimConfig
from steerscale.parallel.layout import ParallelConfig, ParallelLayout
from steerscale.planning.flops import hardware_flops
from steerscale.planning.hardware import find_device
from steerscale.planning.memory import estimate_memory
from steerscale.planning.throughput import throughput
from steerscale.rundir import Status, create_run_dir, write_status
from steerscale.train.config import MetricsConfig, RunConfig, TrainConfig

GPUS = 16
DEVICES = ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM-64GB")
"""The last one has no peak in our table: its runs have no MFU."""
SHAPES = {"350m": (24, 1024, 16), "1.3b": (24, 2048, 16), "6.7b": (32, 4096, 32)}
INTERVAL = 10
BEGIN = 1_750_000_000.0


def write_example_runs(
    directory: Path, seed: Sequence[dict[str, Any]], *, count: int, reports: int = 200, tensorboard: bool = False
) -> list[Path]:
    """Write `count` run directories of `reports` reports each below `directory`; `seed` is a real run's records."""
    configs = _configs(directory)
    return [
        _write(next(configs), seed, number=number, reports=reports, tensorboard=tensorboard) for number in range(count)
    ]


def _configs(directory: Path) -> Iterator[RunConfig]:
    """Every layout that fits each other, over and over with another seed."""
    recomputes: tuple[Recompute, ...] = ("selective", "full", "none")
    degrees = [(t, p) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) if t * p <= GPUS]
    choices = list(product(SHAPES, degrees, (1, 2, 4), (4, 16, 64, 128), recomputes))
    random.Random(0).shuffle(choices)
    number = 0
    while True:
        for name, (t, p), mbs, gas, recompute in choices:
            layers, width, heads = SHAPES[name]
            model = ModelConfig(num_layers=layers, d_model=width, num_heads=heads, seq_len=2048, vocab_size=50304)
            parallel = ParallelConfig(
                tensor=t, pipeline=p, data=GPUS // (t * p), sequence=t > 1, micro_batch_size=mbs,
                gradient_accumulation_steps=gas,
            )  # fmt: skip
            try:
                ParallelLayout.resolve(parallel).check_model(model)
            except LayoutError:
                continue
            run = f"gpt_{name}_tp{t}_pp{p}_mbs{mbs}_gas{gas}_{recompute}" + (f"_{number}" if number else "")
            yield RunConfig(
                name=run,
                run_dir=str(directory / f"gpt_{name}" / run),
                model=model,
                train=TrainConfig(steps=100_000),
                seed=1234 + number,
                parallel=parallel,
                engine=EngineConfig(precision="bf16", recompute=recompute),
                optim=OptimConfig(lr=3e-4, min_lr=3e-5, warmup_steps=100),
                metrics=MetricsConfig(interval=INTERVAL, tensorboard=False),
            )
        number += 1


def _write(config: RunConfig, seed: Sequence[dict[str, Any]], *, number: int, reports: int, tensorboard: bool) -> Path:
    run_dir, chance = Path(config.run_dir), random.Random(config.run_dir.rsplit("/", 1)[-1])
    device = DEVICES[number % len(DEVICES)]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    create_run_dir(run_dir, config, command=["example"])
    trouble = chance.random()
    restart = reports // 2 if trouble < 0.3 else None
    moment = BEGIN + 3600.0 * number
    recorder = Recorder(run_dir, writes=True, tensorboard=tensorboard)
    for start, stop in ((0, restart or reports), *([(restart, reports)] if restart else [])):
        recorder.close()
        recorder = Recorder(run_dir, writes=True, tensorboard=tensorboard, step=start * INTERVAL)
        values = {"layout": str(config.layout()), "device": device, "ranks": GPUS}
        recorder.write("start", start * INTERVAL, {**values, "time": moment})
        for index in range(start, stop):
            step, record = (index + 1) * INTERVAL, _report(config, seed, index / reports, device, chance)
            moment += sum(record["step_seconds"])
            if trouble > 0.8 and chance.random() < 0.02:
                sample = (step - 3) * config.layout().global_batch_size
                end = sample + config.layout().global_batch_size
                skip = {"loss": None, "grad_norm": None, "first_sample": sample, "end_sample": end}
                recorder.write("skip", step - 3, {**skip, "time": moment})
            recorder.write(
                "train", step, {**record, "consumed_samples": step * config.layout().global_batch_size, "time": moment}
            )
            if index % 20 == 19:
                loss = record["loss"] + 0.05
                recorder.write(
                    "eval", step, {"loss": loss, "perplexity": 2.718**loss, "bits_per_byte": loss / 3, "time": moment}
                )
        moment += 600.0
    recorder.close()
    state, reason = ("failed", "CUDA out of memory on rank 3") if trouble > 0.95 else ("finished", "")
    write_status(run_dir, Status(state=state, step=reports * INTERVAL, steps=config.train.steps, reason=reason))  # type: ignore[arg-type]
    return run_dir


def _report(
    config: RunConfig, seed: Sequence[dict[str, Any]], share: float, device: str, chance: random.Random
) -> dict[str, Any]:
    """What a report of this run might be, `share` of the way through it."""
    layout, model, recompute = config.layout(), config.model, config.engine.recompute
    train = [record for record in seed if record["kind"] == "train"]
    jitter = [seconds for record in train for seconds in record["step_seconds"]]
    typical, known = median(jitter), find_device(device)
    peak = known.bf16_tflops if known else None
    reached = (0.62 if layout.micro_batch_size > 1 else 0.54) - 0.05 * (layout.tensor - 1) ** 0.5
    flops = hardware_flops(model, batch_size=layout.global_batch_size, recompute=recompute)
    seconds = flops / (layout.world_size * (peak or 248) * 1e12 * reached) * (1 + layout.bubble_fraction)
    steps = [round(seconds * (0.9 + 0.1 * min(chance.choice(jitter) / typical, 3)), 6) for _ in range(INTERVAL)]
    data_wait = 0.01
    if chance.random() < 0.004:
        steps[chance.randrange(INTERVAL)] *= 3
    if chance.random() < 0.002:
        data_wait = seconds
    mean = sum(steps) / len(steps)
    loss = train[min(int(share * len(train)), len(train) - 1)]["loss"] * (1.1 - 0.02 * model.num_layers / 8)
    memory = estimate_memory(model, layout, engine=config.engine).total_gib
    return {
        "loss": loss + 0.02 * chance.gauss(0, 1),
        "grad_norm": 1.0,
        "lr": config.optim.lr,
        "global_batch_size": layout.global_batch_size,
        "seconds_per_step": mean,
        "timed_steps": len(steps),
        "step_seconds": steps,
        "seconds": {"data": 0.01, "forward-backward": mean * 0.93, "optimizer": mean * 0.05},
        "seconds_between_steps": {},
        **asdict(throughput(mean, model=model, layout=layout, recompute=recompute, peak_tflops=peak)),
        "bubble_fraction": layout.bubble_fraction,
        "data_seconds_max": data_wait,
        "data_slowest_rank": 11,
        "memory_peak_gib_max": memory * 1.08 + 1.2,
        "memory_peak_gib_min": memory,
    }
