"""Kernels of our own for the CPU, forward and backward, against torch's: attention, SwiGLU, RMSNorm, rotated heads.

    OMP_NUM_THREADS=2 python benchmarks/cpu_kernels.py [--rounds 15] [--threads 2]

Float32, the same tensors, calls taking turns; medians. Attention of ours gets its tensors as [S, B, H, D], the order in which a
layer has them; torch's, scaled_dot_product_attention, as [B, H, S, D], on which it is fastest. The others' references are
what a model is usually written with: silu(gate) * up, torch.nn.functional.rms_norm, and cosines and sines on halves. Results
are compared. GFLOP/s count what a causal attention needs: half of each of seven products of S x S x D a head, the scores
made twice. The last line is one JSON object: `ratio` is torch's time over ours, the lowest of all.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks._common import print_environment
from steerscale import native
from steerscale.models import cpu_functions, functions
from steerscale.models.cpu_attention import causal_attention
from steerscale.models.gpt import rotary_table
from steerscale.train.host_memory import keep_freed_memory

ATTENTION = [
    # B, H, groups, S, D
    (8, 8, 8, 128, 64),
    (4, 8, 8, 256, 64),
    (4, 8, 8, 512, 64),
    (2, 16, 4, 1024, 64),
    (1, 16, 16, 2048, 64),
    (1, 16, 4, 1024, 128),
]


TOKENS, BATCH = 512, 4
WIDTHS = (512, 2048)
"""Of the residual stream, in heads of HEAD; the MLP's is 8/3 of it, in multiples of 16."""
HEAD = 64

Step = Callable[[], tuple[torch.Tensor, ...]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    found = print_environment()
    if native.attention_library() is None or native.pointwise_library() is None:
        sys.exit("our kernels need a C++ compiler")
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as a run does
    cases = {"attention B{} H{} G{} S{} D{}".format(*shape): attention(*shape) for shape in ATTENTION}
    for width in WIDTHS:
        for what, case in (("SwiGLU", swiglu), ("RMSNorm", rms_norm), ("rotated heads", rotated_heads)):
            cases[f"{what} T{TOKENS * BATCH} M{width}"] = case(width)
    results = {}
    for name, (ours, torchs, flops) in cases.items():
        results[name] = figures = measure(ours, torchs, rounds=args.rounds)
        if flops:
            figures["ours_gflops"] = round(flops / figures["ours_ms"] / 1e6, 1)
        print(f"{name}: ours {figures['ours_ms']:.2f} ms, torch {figures['torch_ms']:.2f} ms: {figures['ratio']:.2f}")
    ratio = min(figures["ratio"] for figures in results.values())
    print(json.dumps({"ratio": ratio, "rounds": args.rounds, "threads": args.threads, **found, "cases": results}))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(batch: int, heads: int, groups: int, length: int, width: int) -> tuple[Step, Step, int]:
    """Ours, torch's, FLOPs."""
    ours = [random(length, batch, n, width, seed=n).requires_grad_() for n in (heads, groups, groups)]
    torchs = [x.detach().permute(1, 2, 0, 3).contiguous().requires_grad_() for x in ours]
    gradient = random(*ours[0].shape)
    gradient_BHSD = gradient.permute(1, 2, 0, 3).contiguous()

    def by_torch() -> tuple[torch.Tensor, ...]:
        out = F.scaled_dot_product_attention(*torchs, is_causal=True, enable_gqa=heads != groups)
        return tuple(x.permute(2, 0, 1, 3) for x in torch.autograd.grad(out, torchs, gradient_BHSD))

    flops = 7 * length * length * width * heads * batch
    return lambda: torch.autograd.grad(causal_attention(*ours), ours, gradient), by_torch, flops


def swiglu(width: int) -> tuple[Step, Step, int]:
    """As `attention`, nothing counted."""
    inner = width * 8 // 3 // 16 * 16
    gate_up, gradient = random(TOKENS, BATCH, 2 * inner).requires_grad_(), random(TOKENS, BATCH, inner, seed=1)

    def by_torch() -> tuple[torch.Tensor, ...]:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.autograd.grad(F.silu(gate) * up, gate_up, gradient)

    return lambda: torch.autograd.grad(cpu_functions.swiglu(gate_up), gate_up, gradient), by_torch, 0


def rms_norm(width: int) -> tuple[Step, Step, int]:
    """As `attention`, nothing counted."""
    x, weight = random(TOKENS, BATCH, width).requires_grad_(), random(width, seed=1).requires_grad_()
    gradient = random(TOKENS, BATCH, width, seed=2)

    def by(norm: Callable[[], torch.Tensor]) -> Step:
        return lambda: torch.autograd.grad(norm(), (x, weight), gradient)

    return by(lambda: cpu_functions.rms_norm(x, weight, 1e-5)), by(lambda: F.rms_norm(x, (width,), weight, 1e-5)), 0


def rotated_heads(width: int) -> tuple[Step, Step, int]:
    """As `attention`, nothing counted."""
    qkv = random(TOKENS, BATCH, width // HEAD, 3, HEAD).requires_grad_()
    gradients = [random(TOKENS, BATCH, width // HEAD, HEAD, seed=seed) for seed in range(3)]
    rotation = rotary_table(torch.arange(TOKENS).unsqueeze(0), HEAD, 1e4, torch.float32)

    def by_torch() -> tuple[torch.Tensor, ...]:
        q, k, v = qkv.unbind(dim=3)
        return torch.autograd.grad((functions.rotate(q, rotation), functions.rotate(k, rotation), v), qkv, gradients)

    return lambda: torch.autograd.grad(cpu_functions.split_heads(qkv, rotation), qkv, gradients), by_torch, 0


def measure(by_ours: Step, by_torch: Step, *, rounds: int) -> dict[str, Any]:
    """Milliseconds of a forward and a backward pass of each, and their ratio."""
    # A benchmark of something else would be worthless.
    for mine, theirs in zip(by_ours(), by_torch()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(rounds):
        for side, run in (("ours", by_ours), ("torch", by_torch)):
            begin = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - begin)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "ours_ms": round(1e3 * medians["ours"], 3),
        "torch_ms": round(1e3 * medians["torch"], 3),
        "ratio": round(medians["torch"] / medians["ours"], 4),
    }


if __name__ == "__main__":
    main()
