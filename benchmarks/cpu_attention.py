"""Causal attention on the CPU, forward and backward: our kernels against torch's scaled_dot_product_attention.

    OMP_NUM_THREADS=2 python benchmarks/cpu_attention.py [--rounds 15] [--threads 2]

Float32, the same tensors, calls taking turns; medians. Ours gets them as [S, B, H, D], the order in which a layer has them;
torch's as [B, H, S, D], on which it is fastest. Results are compared. GFLOP/s count what a causal attention needs: half of
each of seven products of S x S x D a head, the scores made twice. The last line is one JSON object: `ratio` is torch's time
over ours, the lowest of all shapes.
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
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks._common import print_environment
from steerscale import native
from steerscale.models.cpu_attention import causal_attention

SHAPES = [
    # B, H, groups, S, D
    (8, 8, 8, 128, 64),
    (4, 8, 8, 256, 64),
    (4, 8, 8, 512, 64),
    (2, 16, 4, 1024, 64),
    (1, 16, 16, 2048, 64),
    (1, 16, 4, 1024, 128),
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    found = print_environment()
    if native.attention_library() is None:
        sys.exit("our kernels need a C++ compiler")
    torch.set_num_threads(args.threads)
    results = {}
    for shape in SHAPES:
        name = "B{} H{} G{} S{} D{}".format(*shape)
        results[name] = figures = measure(*shape, rounds=args.rounds)
        print(f"{name}: ours {figures['ours_ms']:.2f} ms, torch {figures['torch_ms']:.2f} ms: {figures['ratio']:.2f}")
    ratio = min(figures["ratio"] for figures in results.values())
    print(json.dumps({"ratio": ratio, "rounds": args.rounds, "threads": args.threads, **found, "shapes": results}))


def measure(batch: int, heads: int, groups: int, length: int, width: int, *, rounds: int) -> dict[str, Any]:
    """Milliseconds of a forward and a backward pass of each, and their ratio."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(length, batch, n, width, generator=generator).requires_grad_() for n in (heads, groups, groups)]
    torchs = [x.detach().permute(1, 2, 0, 3).contiguous().requires_grad_() for x in ours]
    gradient = torch.randn(ours[0].shape, generator=generator)
    gradient_BHSD = gradient.permute(1, 2, 0, 3).contiguous()

    def by_ours() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(causal_attention(*ours), ours, gradient)

    def by_torch() -> tuple[torch.Tensor, ...]:
        out = F.scaled_dot_product_attention(*torchs, is_causal=True, enable_gqa=heads != groups)
        return torch.autograd.grad(out, torchs, gradient_BHSD)

    # A benchmark of something else would be worthless.
    for mine, theirs in zip(by_ours(), by_torch()):
        torch.testing.assert_close(mine.permute(1, 2, 0, 3), theirs, rtol=1e-3, atol=1e-4)
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(rounds):
        for side, run in (("ours", by_ours), ("torch", by_torch)):
            begin = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - begin)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    flops = 7 * length * length * width * heads * batch
    return {
        "ours_ms": round(1e3 * medians["ours"], 3),
        "torch_ms": round(1e3 * medians["torch"], 3),
        "ratio": round(medians["torch"] / medians["ours"], 4),
        "ours_gflops": round(flops / medians["ours"] / 1e9, 1),
    }


if __name__ == "__main__":
    main()
