"""A training step of a TopK SAE on given activations: the engine, bare functions, and other packages, on the same work.

    python benchmarks/sae_step.py [--widths 768 512] [--latents 16384] [--batch 2048] [--rounds 9] [--threads 2] [--quick]

Sides, each in a process of its own, steps alternating; the first two rounds are warm-up and figures are medians:

- gemm: the encoder's matrix product with its bias alone, B x d by d x N: what any training step contains.
- ours: `MegatronEngine` with `TopKSAE`, as `python -m launch.train` runs it on one rank.
- functions: `steerscale.sae.sparse` and torch.optim.AdamW in a plain loop.
- torch: the same written with torch operations only (topk, embedding_bag, sparse CSR products), no clipping.
- eai-sparsify, sae-lens: their own trainers' steps, where installed (`requirements-peers.txt`).

A step: forward, loss, backward, and all duties of a step: decoder at unit norm with its gradient projected, clipping, Adam
(fused where the side allows it), dead-latent counters. All float32, k latents of N, synthetic activations made of sparse
features. On the CPU, or on the first CUDA device where there is one (never run there yet; the limits are those of the CPU).
The last line is one JSON object with tokens per second and the ratios to the others.
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
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks._common import against, gpu_environment, print_environment
from benchmarks.sae_step_sides import SIDES, Work, installed

WARM_UP = 2
NUM_BATCHES = 4
GOALS = {"eai-sparsify": 1.4, "sae-lens": 5.0}
"""Tokens per second of ours over theirs."""
GEMM_GOAL = 1.5
"""A step in products of the encoder, at most."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[768, 512])
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each side")
    parser.add_argument("--latents", type=int, default=Work(d=1).latents)
    parser.add_argument("--batch", type=int, default=Work(d=1).batch)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=[side for side in SIDES if installed(side)])
    parser.add_argument("--quick", action="store_true", help="a tiny SAE and two rounds: does it run?")
    args = parser.parse_args()
    environment = print_environment("megatron-core", "eai-sparsify", "sae-lens")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment |= {"device": device} if device == "cpu" else gpu_environment()
    works = [Work(d=d, latents=args.latents, batch=args.batch, device=device) for d in args.widths]
    if args.quick:
        works = [Work(d=64, latents=512, k=8, batch=128, device=device)]
    sides = list(dict.fromkeys(["gemm", "ours", *args.sides]))
    rounds = 2 if args.quick else args.rounds
    results = {f"d={work.d}": measure(work, sides, rounds=rounds, threads=args.threads) for work in works}
    # Against another package, else against torch alone; without either there is nothing to compare with.
    peers = ("eai-sparsify", "torch")
    ratios = [next((r["speedup"][p] for p in peers if p in r["speedup"]), None) for r in results.values()]
    print(
        json.dumps(
            {
                "ratio": None if None in ratios else min(ratios),
                "rounds": rounds,
                "threads": args.threads,
                "environment": environment,
                "widths": results,
            }
        )
    )


def measure(work: Work, sides: list[str], *, rounds: int, threads: int) -> dict[str, Any]:
    """Alternate steps of all sides; print a table; return the figures."""
    workers = {side: _start(side, work, threads) for side in sides}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    try:
        for number in range(WARM_UP + rounds):
            # Taking turns at going first: nobody is always the one after a cold cache.
            for side in sides if number % 2 else reversed(sides):
                answer = _ask(workers[side][1])
                if number >= WARM_UP:
                    times[side].append(answer)
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join()
    wall = {side: statistics.median(seconds for seconds, _ in times[side]) for side in sides}
    cpu = {side: statistics.median(seconds for _, seconds in times[side]) for side in sides}
    best = {side: min(seconds for seconds, _ in times[side]) for side in sides}
    figures = {
        "seconds_per_step": {side: round(wall[side], 4) for side in sides},
        "best_seconds_per_step": {side: round(best[side], 4) for side in sides},
        "cpu_seconds_per_step": {side: round(cpu[side], 4) for side in sides},
        "tokens_per_second": {side: round(work.batch / wall[side], 1) for side in sides},
        "ours_over_gemm": round(wall["ours"] / wall["gemm"], 3),
        "ours_over_gemm_best": round(best["ours"] / best["gemm"], 3),
        "speedup": {side: round(wall[side] / wall["ours"], 3) for side in sides if side not in ("gemm", "ours")},
        "cpu_speedup": {side: round(cpu[side] / cpu["ours"], 3) for side in sides if side not in ("gemm", "ours")},
    }
    print(f"d={work.d}, N={work.latents}, k={work.k}, B={work.batch}, float32, {threads} threads, {work.device}")
    print(f"  {'':<14} {'s/step':>8} {'best':>8} {'CPU s':>8} {'tokens/s':>9} {'/ gemm':>7} {'ours is':>8}")
    for side in sides:
        row = f"{wall[side]:8.3f} {best[side]:8.3f} {cpu[side]:8.3f} {work.batch / wall[side]:9,.0f}"
        print(f"  {side:<14} {row} {wall[side] / wall['gemm']:7.2f} {wall[side] / wall['ours']:7.2f}x")
    for side, goal in GOALS.items():
        print(f"  ours / {side}: {against(figures['speedup'].get(side), goal)}")
    print(f"  ours over the encoder's product: {against(figures['ours_over_gemm'], GEMM_GOAL, at_most=True)}")
    sys.stdout.flush()
    return figures


def _start(side: str, work: Work, threads: int) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, side, work, threads), daemon=True)
    process.start()
    theirs.close()
    _ask(ours)  # built, and a first step done, before anything is measured
    return process, ours


def _ask(connection: Connection) -> tuple[float, float]:
    connection.send("step")
    return connection.recv()


def _serve(connection: Connection, side: str, work: Work, threads: int) -> None:
    """The process of one side: a step on command."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    batches = [batch.to(work.device) for batch in _batches(work)]
    with SIDES[side](work, batches[0]) as step:
        number = 0
        while True:
            try:
                connection.recv()
            except EOFError:
                return
            wall, cpu = time.perf_counter(), time.process_time()
            step(number, batches[number % NUM_BATCHES])
            if work.device == "cuda":
                torch.cuda.synchronize()  # the loss was read before the optimizer's step
            connection.send((time.perf_counter() - wall, time.process_time() - cpu))
            number += 1


def _batches(work: Work) -> list[torch.Tensor]:
    """Activations of mean norm sqrt(d): 32 of 4d random directions each, and a little noise."""
    directions = F.normalize(torch.randn(4 * work.d, work.d), dim=1)
    batches = []
    for _ in range(NUM_BATCHES):
        active = torch.randint(0, 4 * work.d, (work.batch, 32))
        weights = torch.rand(work.batch, 32) + 0.5
        x = F.embedding_bag(active, directions, per_sample_weights=weights, mode="sum")
        x = x + 0.05 * torch.randn(x.shape)
        batches.append(x * (work.d**0.5 / x.norm(dim=1).mean()))
    return batches


if __name__ == "__main__":
    main()
