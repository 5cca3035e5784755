"""GPT training on the CPU: our loop against transformers' Trainer and against the step's matrix products alone.

    OMP_NUM_THREADS=2 python benchmarks/gpt_cpu.py [--sizes 10m-llama 50m-llama] [--rounds 9] [--threads 2] [--quick]

Sides, each in a process of its own, steps taking turns; the first rounds are warm-up and figures are medians:

- gemm: every matrix product of a step (forward, and the gradients of inputs and weights of all linear layers and of the head)
  at the same shapes, on matrices of their own; the bound. gemm_attention: those inside of attention as well, as plain batched
  products of whole S x S squares. A causal attention needs a little over half of that, so this bound is no limit of nature.
- ours: `train.loop.Loop` as `python -m launch.train` runs it on one rank, data loader, clipping, metrics and all;
  ours_compiled: the same with engine.compile=blocks.
- transformers: `Trainer` on `LlamaForCausalLM` (SDPA attention, fused AdamW), with gradient accumulation;
  transformers_compiled: the same with torch_compile=True.
- litgpt_compiled: litgpt's `pretrain.fit` on the model that it compiles by itself; left out where litgpt is not installed.

All train the same Llama from the same weights on the same samples in float32 with the same AdamW, clipping and learning
rate; their losses are compared. A step's time is from the end of the one before to its own end. At the end one step of each is
traced and its time shared out as by `steerscale profile`; what is in no operation is Python, seen from above: tracing adds to
it, and so does compiled code, whose loops are no operations.
The last line is one JSON object: `ratio` is ours / transformers in tokens per second, neither compiled, the lowest of all
sizes; the other ratios are called by their sides.
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
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import gpt_cpu_litgpt
from benchmarks._common import against, print_environment
from benchmarks.gpt_cpu_sides import BOUNDS, SIDES, Pace, gemm_flops, write_data, write_weights
from benchmarks.gpt_overhead import SIZES
from steerscale.train.profile_trace import find_traces, read_trace

WARMUP = 2
GOALS = {
    "to_transformers": 1.1,
    "compiled_to_transformers_compiled": 1.1,
    "compiled_to_litgpt_compiled": 1.1,
    "to_gemm_bound": 0.9,
    "to_gemm_attention_bound": 0.9,
}
PAIRS = {
    "to_transformers": ("ours", "transformers"),
    "compiled_to_transformers": ("ours_compiled", "transformers"),
    "compiled_to_transformers_compiled": ("ours_compiled", "transformers_compiled"),
    "compiled_to_litgpt_compiled": ("ours_compiled", "litgpt_compiled"),
    "to_gemm_bound": ("ours", "gemm"),
    "to_gemm_attention_bound": ("ours", "gemm_attention"),
    "compiled_to_gemm_bound": ("ours_compiled", "gemm"),
    "compiled_to_gemm_attention_bound": ("ours_compiled", "gemm_attention"),
}
"""Ratio -> whose tokens per second over whose."""


def main() -> None:
    """Measure and print."""
    args = _arguments()
    found = print_environment("transformers", "litgpt", "megatron-core")
    names, rounds = (["quick"], 2) if args.quick else (args.sizes, args.rounds)
    sides = [side for side in SIDES if side in args.sides or side == "ours"]
    if "litgpt_compiled" in sides and not gpt_cpu_litgpt.is_installed():
        print("litgpt is not installed (requirements-peers.txt has it): left out")
        sides.remove("litgpt_compiled")
    results = {name: measure(name, sides, rounds=rounds, threads=args.threads) for name in names}
    ratios = {
        key: min(result["ratios"][key] for result in results.values()) for key in next(iter(results.values()))["ratios"]
    }
    settings = {"threads": args.threads, "rounds": rounds}
    print(json.dumps({"ratio": ratios.get("to_transformers"), **ratios, **settings, **found, "sizes": results}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [name for name in SIZES if name.endswith("llama")]
    parser.add_argument("--sizes", nargs="+", choices=choices, default=["10m-llama", "50m-llama"])
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=list(SIDES), help="those to run; ours is always one"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: does it run?")
    return parser.parse_args()


def measure(name: str, sides: Sequence[str], *, rounds: int, threads: int) -> dict[str, Any]:
    """Alternate steps of all sides; print a table; return the figures."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory(prefix="gpt_cpu-") as folder:
        directory = Path(folder)
        write_data(directory / "data", size, steps=rounds + WARMUP + 2)
        write_weights(directory / "weights", size)
        trainers = [side for side in sides if side not in BOUNDS]
        workers = {side: _start(side, name, threads, directory) for side in sides}
        steps: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for number in range(rounds + WARMUP):
            # Taking turns at going first: nobody is always the one after a cold cache.
            for side in sides if number % 2 else reversed(sides):
                answer = _ask(workers[side][1], "step")
                if number >= WARMUP:
                    steps[side].append(answer)
        for side in trainers:
            _ask(workers[side][1], "profile")
        losses = {side: _end(*worker) for side, worker in workers.items()}
        traces = {side: read_trace(find_traces(directory / side)[0]) for side in trainers}
    _compare({side: losses[side] for side in trainers})
    wall = {side: statistics.median(seconds for seconds, _ in steps[side]) for side in sides}
    cpu = {side: statistics.median(seconds for _, seconds in steps[side]) for side in sides}
    pairs = {key: pair for key, pair in PAIRS.items() if {*pair} <= {*sides}}
    figures = {
        "parameters": size.model.num_parameters(),
        "tokens_per_step": size.tokens,
        "seconds_per_step": {side: round(wall[side], 4) for side in sides},
        "tokens_per_second": {side: round(size.tokens / wall[side], 1) for side in sides},
        "cpu_seconds_per_step": {side: round(cpu[side], 4) for side in sides},
        "ratios": {key: round(wall[other] / wall[one], 4) for key, (one, other) in pairs.items()},
        "ratios_by_cpu_time": {key: round(cpu[other] / cpu[one], 4) for key, (one, other) in pairs.items()},
        "gemm_gflops": round(gemm_flops(size) / wall["gemm"] / 1e9, 1),
        "traced_seconds": {side: round(trace.seconds, 4) for side, trace in traces.items()},
        "parts": {
            side: {part: round(seconds, 4) for part, seconds in trace.parts.items()} for side, trace in traces.items()
        },
        "longest": {
            side: [(kind, name, round(seconds, 4)) for kind, name, seconds in trace.longest[:8]]
            for side, trace in traces.items()
        },
    }
    _print(name, figures)
    return figures


def _compare(losses: dict[str, list[float]]) -> None:
    """A benchmark of something else would be worthless: all must have learned the same."""
    for side, theirs in losses.items():
        assert len(losses["ours"]) >= len(theirs) > WARMUP, side
        worst = max(abs(a / b - 1) for a, b in zip(losses["ours"], theirs))
        assert worst < 1e-3, (side, losses)


def _print(name: str, figures: dict[str, Any]) -> None:
    print(f"{name}: {figures['parameters']:,} parameters, {figures['tokens_per_step']:,} tokens a step")
    for side, seconds in figures["seconds_per_step"].items():
        print(f"  {side:<22}{seconds:9.4f} s a step{figures['tokens_per_second'][side]:10,.0f} tokens/s")
    for key, ratio in figures["ratios"].items():
        one, other = PAIRS[key]
        text = against(ratio, GOALS[key]) if key in GOALS else f"{ratio:.3g}"
        print(f"  {one} over {other}: {text}; by CPU time {figures['ratios_by_cpu_time'][key]:.3g}")
    traced, parts = figures["traced_seconds"], figures["parts"]
    print(f"  {'seconds of a traced step':<26}" + "".join(f"{side:>24}" for side in traced))
    for part in parts["ours"]:
        cells = [f"{parts[side][part]:14.4f} ({parts[side][part] / traced[side]:6.1%})" for side in traced]
        print(f"  {'Python, waiting' if part == 'idle' else part:<26}" + "".join(f"{cell:>24}" for cell in cells))
    sys.stdout.flush()


def _start(side: str, name: str, threads: int, directory: Path) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, side, name, threads, directory), daemon=True)
    process.start()
    there.close()
    here.recv()  # built, and waiting for its first turn
    return process, here


def _ask(connection: Connection, command: str) -> Any:
    connection.send(command)
    return connection.recv()


def _end(process: Any, connection: Connection) -> list[float]:
    losses = _ask(connection, "end")
    process.join()
    return losses


def _serve(connection: Connection, side: str, name: str, threads: int, directory: Path) -> None:
    """The process of one side; its last word are the losses of its steps."""
    torch.set_num_threads(threads)
    connection.send(SIDES[side](side, SIZES[name], directory, Pace(connection)))


if __name__ == "__main__":
    main()
