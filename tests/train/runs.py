"""Small runs of the real loop: on the pool's ranks, or as processes that can be killed."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from steerscale.checkpoint.config import CheckpointConfig
from steerscale.checkpoint.fragments import FragmentReader
from steerscale.checkpoint.store import checkpoints
from steerscale.data.config import DataConfig
from steerscale.metrics import read_records
from steerscale.models.config import ModelConfig
from steerscale.optim import OptimConfig
from steerscale.parallel.layout import ParallelConfig
from steerscale.rundir import create_run_dir
from steerscale.testing.ranks import PRELOAD, START_METHOD
from steerscale.train.config import MetricsConfig, RunConfig, TrainConfig
from steerscale.train.gpt import GPTTask
from steerscale.train.loop import Loop
from steerscale.train.run import run
from steerscale.train.sae import SAETask
from steerscale.train.signals import StopRequest
from steerscale.train.worker import main

# Dropout, so that its generator has to be resumed as well.
MODEL = ModelConfig(num_layers=4, d_model=32, num_heads=4, seq_len=32, vocab_size=1000, dropout=0.1)


def run_config(data: Path, run_dir: Path, *, parallel: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """A run that ends after 12 steps of 8 sequences; `sections` replace those of the configuration."""
    defaults: dict[str, Any] = {
        "model": MODEL,
        "train": TrainConfig(steps=12, eval_interval=5, eval_samples=6),
        "optim": OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=2),
        "checkpoint": CheckpointConfig(interval=3, keep=0),
        "metrics": MetricsConfig(interval=1, warmup_steps=0, tensorboard=False),
    }
    batch = {"global_batch_size": 8, "micro_batch_size": 2}
    return RunConfig(
        name="test",
        run_dir=str(run_dir),
        data=DataConfig(path=str(data)),
        parallel=ParallelConfig(**{**batch, **(parallel or {})}),
        **{**defaults, **sections},
    )


def moved(config: RunConfig, run_dir: Path, **changes: Any) -> RunConfig:
    """The same run in another directory, or with other sections."""
    return replace(config, run_dir=str(run_dir), **changes)


def prepare(config: RunConfig) -> Path:
    """Write or take up the run directory; returns it."""
    run_dir = Path(config.run_dir)
    create_run_dir(run_dir, config, command=["test"])
    return run_dir


def train(run_dir: Path) -> None:
    """Train to the end on the ranks of the current process group. For `RankPool.run`."""
    run(run_dir, rank=dist.get_rank(), stop=StopRequest(), threads=1)


class Workers:
    """The ranks of a prepared run as processes of their own that run the worker's `main`.

    They are forked from the pool's server, which has torch loaded: a start costs a moment instead of seconds.
    """

    def __init__(self, config: RunConfig, setup: Callable[[int], object] | None = None) -> None:
        """`setup(rank)` is called in each process before the worker begins: to have something happen at some moment."""
        context = multiprocessing.get_context(START_METHOD)
        context.set_forkserver_preload(PRELOAD)
        size = config.num_ranks()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        self.processes = [
            context.Process(
                target=_work,
                args=(config.run_dir, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, setup),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def send(self, number: int, *, rank: int | None = None) -> None:
        """Send a signal to one rank or all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        """Kill all ranks at once, without warning."""
        self.send(signal.SIGKILL)
        self.join()

    def join(self, timeout_s: float = 120.0) -> list[int | None]:
        """Exit statuses in rank order, once all have ended."""
        for process in self.processes:
            process.join(timeout_s)
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if alive:
            self.send(signal.SIGKILL)
        assert not alive, f"ranks {alive} still ran after {timeout_s} s"
        return [process.exitcode for process in self.processes]


def _work(run_dir: str, environment: dict[str, str], setup: Callable[[int], object] | None) -> None:
    os.environ.update(environment)
    if setup is not None:
        setup(int(environment["RANK"]))
    main([run_dir])


@dataclass(frozen=True)
class AtStep:
    """A `setup`: some ranks do something in the middle of a step."""

    step: int
    ranks: tuple[int, ...]
    action: Callable[[Loop], object]

    def __call__(self, rank: int) -> None:
        """Called in the process of `rank`."""
        loops: list[Loop] = []
        step = Loop._step

        def remember(loop: Loop) -> None:
            loops[:] = [loop]
            step(loop)

        Loop._step = remember
        for kind in (GPTTask, SAETask):
            before = kind.consumed

            def act(task: Any, before: Callable[[Any], int] = before) -> int:
                if loops and loops[0].progress.step + 1 == self.step and rank in self.ranks:
                    self.action(loops[0])
                return before(task)

            kind.consumed = act


@dataclass(frozen=True)
class Send:
    """Something that can happen: this process gets a signal."""

    number: int

    def __call__(self, *about: object) -> None:
        """Send it."""
        os.kill(os.getpid(), self.number)


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """All records of steps and evaluations in order, without times and what depends on the layout."""
    keys = (
        "kind",
        "step",
        "loss",
        "grad_norm",
        "lr",
        "consumed_samples",
        "consumed_hash",
        "global_batch_size",
        "tokens",
        "metrics",
    )
    records = [record for record in read_records(run_dir) if record["kind"] != "start"]
    # Measurements of SAEs are called HOOK/NAME.
    return [{key: value for key, value in record.items() if key in keys or "/" in key} for record in records]


def newest(run_dir: Path) -> Path:
    """The newest checkpoint directory."""
    return checkpoints(run_dir / "checkpoints")[-1]


def whole_tensors(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every whole tensor of a checkpoint by kind and name, put together from all ranks' fragments."""
    reader = FragmentReader(checkpoint)
    return {
        (kind, name): reader.read(kind, name, offset=[0] * len(shape), shape=shape).reshape(shape)
        for kind, name in reader.names
        for shape in [reader.shapes[name]]
    }


def assert_same_tensors(got: Path, expected: Path) -> None:
    """Both checkpoints hold the same tensors, bit by bit."""
    first, second = whole_tensors(got), whole_tensors(expected)
    assert first.keys() == second.keys()
    differing = [key for key, tensor in first.items() if not torch.equal(tensor, second[key])]
    assert not differing, f"{got} and {expected} differ in {differing}"
