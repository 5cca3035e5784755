"""What a language model on ranks of its own brings: producers beside trainers, against both on one rank.

    python benchmarks/stream_apart.py [--blocks 2] [--threads 1] [--quick]

The work is that of benchmarks/stream.py. First, in one process of `--threads` threads, its three figures: the model alone (a
vectors a second), the SAE alone (b), and both one after the other, at most 1 / (1/a + 1/b). Then two processes of as many
threads each, one trainer and one producer over gloo: at most min(a, b), if the machine has the cores for both. Timed once both
halves of the buffer have been consumed, which were filled before; over whole blocks, so that no vector comes for nothing.
The last line is one JSON object: `ratio` is apart / min(a, b), `gain` is apart / both.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import multiprocessing
import tempfile
import time
from contextlib import closing, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist

from benchmarks._common import print_environment
from benchmarks.stream import (
    BATCH,
    BLOCK_SEQUENCES,
    HOOK,
    LANES,
    SMOLLM2,
    TINY,
    build_source,
    build_task,
    measure,
    run_config,
)
from steerscale.activations.config import ProducersConfig
from steerscale.activations.facts import buffer_dtype
from steerscale.activations.order import HALVES
from steerscale.activations.placement import PRODUCERS, TRAINERS
from steerscale.activations.producer import Producer
from steerscale.activations.remote import RemoteSource
from steerscale.activations.stream import ActivationStream
from steerscale.data.dataset import SampleStream
from steerscale.parallel.context import ParallelContext, initialize
from steerscale.parallel.link import Link
from steerscale.parallel.worlds import World, join_world
from steerscale.train.config import RunConfig
from steerscale.train.sae import SAETask


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny model and a block: does it run?")
    args = parser.parse_args()
    environment = print_environment("megatron-core")
    model, hook, blocks = SMOLLM2, HOOK, args.blocks
    if args.quick:
        model, hook, blocks = replace(SMOLLM2, **TINY), "blocks.1.hook_resid_post", 1
    with tempfile.TemporaryDirectory() as directory:
        config = run_config(Path(directory), model, hook)
        torch.set_num_threads(args.threads)
        with initialize(config.layout()) as context, closing(build_task(config, context)) as task:
            alone = measure(task, 2 if args.quick else 4)
        assert config.stream is not None
        config = replace(config, stream=replace(config.stream, producers=ProducersConfig()))
        apart = measure_apart(config, Path(directory), threads=args.threads, blocks=blocks)
    bound = min(alone["lm_vectors_per_second"], alone["sae_vectors_per_second"])
    figures = {
        "ratio": apart / bound,
        "gain": apart / alone["both_vectors_per_second"],
        "apart_vectors_per_second": apart,
        "both_vectors_per_second": alone["both_vectors_per_second"],
    }
    print(f"apart   {apart:>10,.0f} vectors/s, {figures['ratio']:.3f} of min(lm, sae), {figures['gain']:.2f} x both")
    print(json.dumps({**figures, "blocks": blocks, "threads": args.threads, "environment": environment}))


def measure_apart(config: RunConfig, directory: Path, *, threads: int, blocks: int) -> float:
    """Vectors a second of a trainer and a producer in processes of their own."""
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.SimpleQueue()
    arguments = (str(directory / "store"), config, threads, blocks, answers)
    processes = [spawn.Process(target=work, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a rank ended with status {process.exitcode}")
    return answers.get()


def work(
    rank: int, store: str, config: RunConfig, threads: int, blocks: int, answers: multiprocessing.SimpleQueue
) -> None:
    """The trainer, which measures, or the producer."""
    torch.set_num_threads(threads)
    placement = config.placement()
    assert placement is not None
    with (
        join_world({TRAINERS: 1, PRODUCERS: 1}, started=(dist.FileStore(store, 2), rank, 2)) as world,
        initialize(placement.producers if rank else config.layout(), world=world) as context,
    ):
        link = Link(world, device=context.device)
        if world.name == PRODUCERS:
            produce(config, link, context, world)
        else:
            answers.put(train(config, link, context, world, blocks))


def produce(config: RunConfig, link: Link, context: ParallelContext, world: World) -> None:
    """Serve until the trainer is done."""
    placement, stream = config.placement(), config.stream
    assert placement is not None
    assert stream is not None
    source = build_source(config, context)
    dtype = buffer_dtype(stream, source)
    Producer(source, link, placement, context, store=world.everyone, dtype=dtype).serve(lambda: None)


def train(config: RunConfig, link: Link, context: ParallelContext, world: World, blocks: int) -> float:
    """Vectors a second over some blocks, after what was filled in advance."""
    placement, stream, data = config.placement(), config.stream, config.data
    assert placement is not None
    assert stream is not None
    assert data is not None
    source = RemoteSource(link, placement, context, world.everyone)
    dataset = SampleStream(data, seq_len=source.seq_len, seed=config.seed)
    steps = LANES * BLOCK_SEQUENCES * source.seq_len // BATCH
    with closing(SAETask(config, context, ActivationStream(stream, source, dataset, context, config.seed))) as task:

        def step() -> None:
            batch = task.micro_batches(0, 1)
            task.train_step(batch, step=0, lr=1e-4, extra=(), timer=lambda name: nullcontext())

        for _ in range(HALVES * steps):
            step()
        begin = time.perf_counter()
        for _ in range(blocks * steps):
            step()
        return blocks * steps * BATCH / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
