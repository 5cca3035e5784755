"""What the engine costs on one process: training steps against plain PyTorch with the same architecture.

    python benchmarks/gpt_overhead.py [--sizes 10m 50m] [--rounds 9] [--threads 2] [--no-profile] [--quick]

- ours: `MegatronEngine.train_step` on a GPT of Megatron-Core layers, as `python -m launch.train` runs it on one rank,
  distributed optimizer included.
- reference: `steerscale.testing.reference`, a plain PyTorch module with fused QKV, scaled_dot_product_attention and
  F.cross_entropy, that keeps its gradients in `.grad`.

Both: float32, the same initial weights, micro-batches, gradient clipping and AdamW (fused=True, two weight-decay groups).
Each runs in a process of its own; steps alternate, the first step is warm-up, figures are medians. Reading data is in neither.

Python's share is bounded from above by a thin model: as many layers and micro-batches, so the same calls of the engine, of the
layers and of torch, but next to nothing to compute in them. Its step over ours is `overhead`; the limit is 0.03 at 50m.
The last line is one JSON object: `ratio` is ours / reference in tokens per second at the size where it is lowest; `cpu_ratio`
in tokens per CPU second, which a busy machine disturbs less.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks._common import against, print_environment
from steerscale.data.loader import MicroBatch, make_micro_batch
from steerscale.engines.config import EngineConfig
from steerscale.engines.megatron import MegatronEngine
from steerscale.models.config import ModelConfig
from steerscale.models.gpt import GPT, transformer_config
from steerscale.models.sharding import gather_parameters, initialize_parameters, named_shards
from steerscale.optim import OptimConfig
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.testing.reference import ReferenceGPT, make_adamw, reference_step
from steerscale.train.gpt import sum_losses

OPTIM = OptimConfig(lr=1e-4)
SIDES = ("ours", "reference")
THIN_STEPS = 20
OVERHEAD_LIMIT = 0.03
RATIO_GOAL = 0.95


@dataclass(frozen=True)
class Size:
    """A model and the batch it is measured with."""

    model: ModelConfig
    micro_batches: int
    micro_batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.micro_batches * self.micro_batch_size * self.model.seq_len


LLAMA = ModelConfig(
    num_layers=7,
    d_model=320,
    num_heads=5,
    d_ff=864,
    seq_len=512,
    vocab_size=4096,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
)
GPT2 = ModelConfig(num_layers=7, d_model=320, num_heads=5, seq_len=512, vocab_size=4096, activation="gelu_tanh")
LARGER = {"num_layers": 13, "d_model": 512, "num_heads": 8, "vocab_size": 16384}
SIZES = {
    "10m": Size(GPT2, 2, 4),
    "10m-llama": Size(LLAMA, 2, 4),
    "50m": Size(replace(GPT2, **LARGER), 2, 4),
    "50m-llama": Size(replace(LLAMA, d_ff=1376, **LARGER), 2, 4),
    "125m-llama": Size(
        replace(LLAMA, num_layers=12, d_model=768, num_heads=12, d_ff=2048, seq_len=256, vocab_size=32768), 2, 8
    ),
    "quick": Size(replace(LLAMA, num_layers=2, d_model=64, num_heads=2, d_ff=128, seq_len=64, vocab_size=256), 2, 2),
}


def thin(size: Size) -> Size:
    """As many operations, next to nothing to compute."""
    model = size.model
    width = 4 * model.num_heads
    return replace(size, model=replace(model, d_model=width, d_ff=width, seq_len=8, vocab_size=64), micro_batch_size=1)


def main() -> None:
    """Measure and print."""
    args = _arguments()
    found = print_environment("megatron-core")
    names = ["quick"] if args.quick else args.sizes
    rounds = 2 if args.quick else args.rounds
    results = {}
    for name in names:
        results[name] = measure(name, rounds=rounds, threads=args.threads, profiled=not args.no_profile)
    ratio = min(result["ratio"] for result in results.values())
    cpu_ratio = min(result["cpu_ratio"] for result in results.values())
    overheads = {name: result["overhead"] for name, result in results.items()}
    settings = {"overhead": overheads, "rounds": rounds, "threads": args.threads, **found}
    print(json.dumps({"ratio": ratio, "cpu_ratio": cpu_ratio, **settings, "sizes": results}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["10m", "10m-llama", "50m", "50m-llama"])
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: does it run?")
    return parser.parse_args()


def measure(name: str, *, rounds: int, threads: int, profiled: bool) -> dict[str, Any]:
    """Alternate steps of both sides; print a table; return the figures."""
    size = SIZES[name]
    workers = {side: _start(side, size, threads) for side in SIDES}
    try:
        steps: dict[str, list[tuple[float, float, float]]] = {side: [] for side in SIDES}
        for number in range(rounds + 1):
            # Taking turns at going first: nobody is always the one after a cold cache.
            for side in SIDES if number % 2 else reversed(SIDES):
                answer = _ask(workers[side][1], "step")
                if number > 0:
                    steps[side].append(answer)
        profiles = {side: _ask(workers[side][1], "profile") for side in SIDES} if profiled else {}
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join()
    losses = [steps[side][-1][2] for side in SIDES]
    # A benchmark of something else would be worthless: both must have learned the same.
    assert abs(losses[0] / losses[1] - 1) < 1e-4, losses
    figures = _figures(size, steps)
    figures["overhead"] = round(_thin_seconds(size, threads) / figures["seconds_per_step"]["ours"], 4)
    _print(name, size, figures, profiles)
    return {**figures, "profile_seconds": profiles}


def _figures(size: Size, steps: dict[str, list[tuple[float, float, float]]]) -> dict[str, Any]:
    wall = {side: statistics.median(seconds for seconds, _, _ in steps[side]) for side in SIDES}
    cpu = {side: statistics.median(seconds for _, seconds, _ in steps[side]) for side in SIDES}
    return {
        "parameters": size.model.num_parameters(),
        "tokens_per_step": size.tokens,
        "seconds_per_step": {side: round(wall[side], 4) for side in SIDES},
        "tokens_per_second": {side: round(size.tokens / wall[side], 1) for side in SIDES},
        "ratio": round(wall["reference"] / wall["ours"], 4),
        "cpu_ratio": round(cpu["reference"] / cpu["ours"], 4),
        "pair_ratios": [round(b[0] / a[0], 3) for a, b in zip(steps["ours"], steps["reference"])],
    }


def _print(name: str, size: Size, figures: dict[str, Any], profiles: dict[str, dict[str, float]]) -> None:
    print(f"{name}: {figures['parameters']:,} parameters, {size.micro_batches} x {size.micro_batch_size} x "
          f"{size.model.seq_len} tokens a step")  # fmt: skip
    for side in SIDES:
        print(f"  {side:<10} {figures['tokens_per_second'][side]:8,.0f} tokens/s")
    print(f"  ratio {against(figures['ratio'], RATIO_GOAL)}, by CPU time {figures['cpu_ratio']:.3f}")
    print(f"  Python and calls of operations, at most: {against(figures['overhead'], OVERHEAD_LIMIT, at_most=True)}")
    if profiles:
        print(f"  {'seconds of one step':<22} {'ours':>8} {'reference':>10}")
        for kind in sorted(set().union(*profiles.values()), key=lambda kind: -profiles["ours"].get(kind, 0)):
            print(f"  {kind:<22} {profiles['ours'].get(kind, 0):8.3f} {profiles['reference'].get(kind, 0):10.3f}")
    sys.stdout.flush()


def _start(side: str, size: Size, threads: int) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, side, size, threads), daemon=True)
    process.start()
    theirs.close()
    _ask(ours, "step")  # both are built, and a first step is done, before anything is measured
    return process, ours


def _ask(connection: Connection, command: str) -> Any:
    connection.send(command)
    return connection.recv()


def _serve(connection: Connection, side: str, size: Size, threads: int) -> None:
    """The process of one side: steps, or the profile of a step, on command."""
    torch.set_num_threads(threads)
    step = (_ours if side == "ours" else _reference)(size)
    batches = _batches(size)
    with step as train:
        while True:
            try:
                command = connection.recv()
            except EOFError:
                return
            if command == "profile":
                connection.send(_profile(lambda: train(batches), size))
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            loss = train(batches)
            connection.send((time.perf_counter() - wall, time.process_time() - cpu, loss))


def _batches(size: Size) -> list[MicroBatch]:
    generator = np.random.default_rng(0)
    shape = (size.micro_batch_size, size.model.seq_len + 1)
    return [
        make_micro_batch(generator.integers(3, size.model.tokens, shape), eos_id=2) for _ in range(size.micro_batches)
    ]


@contextmanager
def _ours(size: Size) -> Iterator[Callable[[Sequence[MicroBatch]], float]]:
    """A function that takes an optimizer step of the engine and returns the loss."""
    layout = ParallelLayout(micro_batch_size=size.micro_batch_size, gradient_accumulation_steps=size.micro_batches)
    with initialize(layout) as context:
        config = transformer_config(size.model, context)
        chunks = [GPT(size.model, config, context)]
        initialize_parameters(chunks, context, seed=0)
        engine = MegatronEngine(
            chunks,
            shards=list(named_shards(chunks)),
            config=config,
            engine=EngineConfig(),
            optim=OPTIM,
            context=context,
        )

        def forward(batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            losses = chunk(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.labels_BS)
            return losses, lambda losses_BS: sum_losses(losses_BS, batch.loss_mask_BS)

        yield lambda batches: engine.train_step(batches, forward, lr=OPTIM.lr).totals.loss


@contextmanager
def _reference(size: Size) -> Iterator[Callable[[Sequence[MicroBatch]], float]]:
    """The same in plain PyTorch, outside of the context that redirects devices."""
    with initialize(ParallelLayout()) as context:
        chunks = [GPT(size.model, transformer_config(size.model, context), context)]
        initialize_parameters(chunks, context, seed=0)
        weights = gather_parameters(chunks, context)
    model = ReferenceGPT(size.model)
    model.load_state_dict(weights)
    del chunks, weights
    adamw = make_adamw(model, OPTIM)
    yield lambda batches: reference_step(model, adamw, batches, OPTIM, lr=OPTIM.lr)[0]


def _thin_seconds(size: Size, threads: int) -> float:
    """Median seconds of a step of the thin model."""
    process, connection = _start("ours", thin(size), threads)
    seconds = [_ask(connection, "step")[0] for _ in range(THIN_STEPS)]
    connection.close()
    process.join()
    return statistics.median(seconds)


def _profile(step: Callable[[], Any], size: Size) -> dict[str, float]:
    """Seconds of one step by kind of operation; "python" is what no operation accounts for."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        started = time.perf_counter()
        step()
        total = time.perf_counter() - started
    shapes = {tuple(p.shape) for p in ReferenceGPT(size.model).parameters() if p.ndim > 1}
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        if not event.key.startswith("ProfilerStep"):
            kind = _kind(event.key, [tuple(shape) for shape in event.input_shapes if shape], shapes, size.model.tokens)
            seconds[kind] += event.self_cpu_time_total / 1e6
    seconds["python"] = total - sum(seconds.values())
    return {kind: round(value, 4) for kind, value in seconds.items()}


def _kind(name: str, inputs: list[tuple], parameters: set[tuple], vocab_size: int) -> str:
    first = inputs[0] if inputs else ()
    if any(word in name for word in ("mm", "linear", "matmul")):
        return "matrix products"
    if "attention" in name:
        return "attention"
    if "norm" in name and "linalg" not in name and "foreach" not in name:
        return "norms"
    if "adam" in name:
        return "AdamW"
    if any(word in name for word in ("c10d", "gloo", "allreduce", "all_reduce")):
        return "collectives"
    if any(shape[-1] == vocab_size for shape in inputs):
        return "logits and loss"
    if "foreach" in name or "linalg" in name or first in parameters or (len(first) == 1 and first[0] > 10**5):
        return "gradient buffers, norm"
    if any(word in name for word in ("cat", "copy", "contiguous", "clone", "to")):
        return "copies"
    return "other pointwise"


if __name__ == "__main__":
    main()
