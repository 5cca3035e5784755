"""GPT training on one GPU in bf16: our loop against compiled PyTorch, transformers and Megatron-Core's own layers.

    python benchmarks/gpt_gpu.py [--sizes 125m 1.3b largest] [--seq 2048 4096] [--blocks llama|gpt] [--seconds 1500] [--quick]

Sides, each in a process of its own, one after the other on the same GPU:

- ours, ours_compiled: `train.loop.Loop` as `python -m launch.train` runs it on one rank, data loader, clipping, metrics and
  all; with engine.compile=none and =blocks.
- pytorch: steerscale/testing/reference.py, the whole model and its loss under torch.compile.
- transformers: `LlamaForCausalLM` with SDPA attention in a bare loop, not compiled; with --blocks llama only.
- megatron: Megatron-Core's `GPTModel` on `get_gpt_layer_local_spec` with its own attention (which stores the scores) and norms,
  in Megatron-Core's schedule, gradient buffers and optimizer.

The same arithmetic in all of them: bf16 weights, gradients added up in float32, AdamW on float32 main weights; torch's kernels
only. Same initial weights, same samples from the same loader; their losses are compared. The micro-batch is the largest that
the planner says fits (for megatron with its stored scores); a side that runs out of memory tries again with half of it and
twice as many. `largest`: as many layers of 6.7b's width as fit. A step's time is from its beginning to that of the next, with
the device idle at both; figures are medians. Model FLOPs, MFU and the plan are docs/throughput.md's and docs/planning.md's;
"allocated" is torch's peak after the warm-up and is held against the plan, which has neither the CUDA context nor
fragmentation; "reserved" is what torch took in all.

--seconds is for everything: what no longer fits is left out and named. The last line is one JSON object: `ratio` is
ours_compiled / pytorch in tokens per second, the lowest of all cases. Status 1 if a side failed or its losses were others.
"""

import sys
from pathlib import Path

# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
if __name__ == "__main__":  # a test imports this as well
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks._common import against, environment, gpu_environment, show
from benchmarks.gpt_gpu_cases import SIZES, Case, make_case, planned_gib, tiny_cases
from steerscale.config import from_mapping
from steerscale.planning.fit import usable_gib
from steerscale.planning.hardware import find_device
from steerscale.planning.throughput import throughput

PACKAGES = ("megatron-core", "transformers", "triton")
SIDES = ("ours", "ours_compiled", "pytorch", "transformers", "megatron")
LOSSES_DIFFER = 5e-3
"""Relative: the roundings of bf16 are far below, another model or other data far above."""
SHORTEST = 25
"""Seconds below which a side is not begun."""
LONGEST = 300
"""Seconds of one side, compilation included."""
MFU_GOAL, RATIO_GOAL, PLAN_GOAL = 0.50, 1.0, 0.10


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status."""
    args = _arguments(argv)
    if args.side:
        return _work(args)
    found = {**environment(*PACKAGES), **gpu_environment()}
    show(found)
    if found["device"] == "CPU" and not args.quick:
        print("error: there is no CUDA device; --quick runs a tiny model on the CPU", file=sys.stderr)
        return 2
    begun = time.monotonic()
    cases = list(tiny_cases()) if args.quick else _cases(args, device_gib=found["device_gib"])
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gpt_gpu-") as name:
        for case in cases:
            results[case.name] = _measure(case, args, Path(name), found, until=begun + args.seconds)
    ratios = [entry["ratios"]["pytorch"] for entry in results.values() if "pytorch" in entry["ratios"]]
    mfus = {
        name: entry["sides"]["ours_compiled"].get("mfu")
        for name, entry in results.items()
        if "ours_compiled" in entry["sides"]
    }
    print(f"ours_compiled / pytorch, lowest: {against(min(ratios, default=None), RATIO_GOAL)}")
    print(f"MFU of ours_compiled, 1.3b s2048: {against(mfus.get('1.3b s2048'), MFU_GOAL)}")
    over = [entry["sides"].get("ours", {}).get("allocated_over_plan") for entry in results.values()]
    off = [abs(share - 1) for share in over if share is not None]
    print(f"peak of ours off its plan, most: {against(max(off, default=None), PLAN_GOAL, at_most=True)}")
    print(json.dumps({"ratio": min(ratios, default=None), "environment": found, "cases": results}))
    return 1 if any(entry["trouble"] for entry in results.values()) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1.3b", "125m", "largest"])
    parser.add_argument("--seq", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--blocks", choices=["llama", "gpt"], default="llama", help="gpt: configs/model's own")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each side")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--step-tokens", type=int, default=65536, help="tokens of a step")
    parser.add_argument("--most", type=int, default=16384, help="tokens of a micro-batch, at most")
    parser.add_argument("--seconds", type=float, default=1500, help="for everything")
    parser.add_argument("--quick", action="store_true", help="a tiny model, wherever: does it run?")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _cases(args: argparse.Namespace, *, device_gib: float) -> list[Case]:
    cases = []
    for seq_len in args.seq:
        for size in args.sizes:
            case = make_case(
                size,
                args.blocks,
                seq_len=seq_len,
                device_gib=device_gib,
                step_tokens=args.step_tokens,
                most=args.most,
                steps=args.steps,
                warmup=args.warmup,
            )
            if case is None:
                print(f"{size} s{seq_len} is left out: by the plan not even one sequence fits {device_gib} GiB")
            elif case.model not in [other.model for other in cases]:
                cases.append(case)
    return cases


def _measure(
    case: Case, args: argparse.Namespace, directory: Path, found: dict[str, Any], *, until: float
) -> dict[str, Any]:
    """All sides of a case: print a line each, return the figures."""
    print(
        f"{case.name}: {case.model.num_parameters():,} parameters, {case.model.num_layers} layers, {case.tokens:,} tokens a "
        f"step, micro-batches of {case.micro_batch_size}; planned {case.planned_gib:.1f} GiB\n"
        f"  {'':<14}{'MBS':>4}{'tokens/s':>10}{'model TFLOP/s':>14}{'MFU':>7}{'allocated':>10}{'reserved':>9}{'/ plan':>7}"
        f"{'before':>8}",
        flush=True,
    )
    sides: dict[str, Any] = {}
    for side in args.sides:
        if side == "transformers" and case.model.position != "rotary":
            continue  # it is a Llama
        sides[side] = _side(case, side, directory, found, until=until)
        print(f"  {side:<14}{_row(sides[side])}", flush=True)
    reference = sides.get("ours", {}).get("losses")
    trouble = [name for name, figures in sides.items() if "failed" in figures]
    for name, figures in sides.items():
        losses = figures.get("losses")
        if losses and reference and _differ(losses, reference):
            trouble.append(name)
            print(f"  {name}: its losses are not those of ours: {losses} and {reference}")
    speed = {name: figures["tokens_per_second"] for name, figures in sides.items() if "tokens_per_second" in figures}
    ours = speed.get("ours_compiled")
    ratios = {name: round(ours / speed[name], 4) for name in speed if ours and name != "ours_compiled"}
    for name, ratio in ratios.items():
        print(f"  ours_compiled / {name:<14}{against(ratio, RATIO_GOAL) if name == 'pytorch' else f'{ratio:.3g}'}")
    described = {key: value for key, value in asdict(case).items() if key != "name"}
    return {**described, "planned_gib": case.planned_gib, "sides": sides, "ratios": ratios, "trouble": trouble}


def _differ(losses: Sequence[float], reference: Sequence[float]) -> bool:
    """Written so that nan differs."""
    return not all(abs(a / b - 1) < LOSSES_DIFFER for a, b in zip(losses, reference, strict=True))


def _side(case: Case, side: str, directory: Path, found: dict[str, Any], *, until: float) -> dict[str, Any]:
    """Run a side in its process, with smaller micro-batches where it needs them."""
    fused = side != "megatron"
    usable = usable_gib(found.get("device_gib", float("inf")))
    while case.micro_batch_size > 1 and planned_gib(case.model, case.micro_batch_size, fused_attention=fused) > usable:
        case = case.halved()
    while True:
        left = until - time.monotonic()
        if left < SHORTEST:
            return {"skipped": f"{left:.0f} s left of --seconds"}
        figures = _run(case, side, directory, seconds=min(left, LONGEST))
        if "out_of_memory" not in figures or case.micro_batch_size == 1:
            break
        case = case.halved()
    figures["micro_batch_size"] = case.micro_batch_size
    if "step_seconds" not in figures:
        return figures
    seconds = statistics.median(figures["step_seconds"])
    known, planned = find_device(found["device"]), planned_gib(case.model, case.micro_batch_size, fused_attention=fused)
    rates = throughput(
        seconds,
        model=case.model,
        layout=case.layout,
        recompute="none",
        peak_tflops=None if known is None else known.bf16_tflops,
    )
    figures |= {
        "tokens_per_second": round(rates.tokens_per_second_per_gpu, 1),
        "model_tflops": round(rates.model_tflops_per_gpu, 3),
        "mfu": None if rates.mfu is None else round(rates.mfu, 4),
        "planned_gib": round(planned, 3),
    }
    if "allocated_gib" in figures:
        figures["allocated_over_plan"] = round(figures["allocated_gib"] / planned, 4)
    return figures


def _row(figures: dict[str, Any]) -> str:
    for key in ("skipped", "failed", "out_of_memory"):
        if key in figures:
            return f"{key.replace('_', ' ')}: {figures[key]}"
    mfu, allocated = figures["mfu"], figures.get("allocated_gib")
    memory = f"{'-':>10}{'-':>9}{'-':>7}"
    if allocated is not None:
        memory = f"{allocated:>10.2f}{figures['reserved_gib']:>9.2f}{figures['allocated_over_plan']:>7.2f}"
    return (
        f"{figures['micro_batch_size']:>4}{figures['tokens_per_second']:>10,.0f}{figures['model_tflops']:>14.4g}"
        f"{'-' if mfu is None else f'{mfu:.1%}':>7}{memory}{figures['before_seconds']:>7.0f}s"
    )


def _run(case: Case, side: str, directory: Path, *, seconds: float) -> dict[str, Any]:
    """One process: its figures, or what went wrong."""
    place = Path(tempfile.mkdtemp(dir=directory))
    (place / "case.json").write_text(json.dumps(asdict(case)), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).resolve()), "--side", side, "--directory", str(place)]
    variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}  # as ranks have it
    begun, log = time.monotonic(), place / "log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # compilers have processes of their own
            process.wait()
            return {"failed": f"stopped after {time.monotonic() - begun:.0f} s"}
    if process.returncode == 0:
        return json.loads((place / "figures.json").read_text(encoding="utf-8"))
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    print("\n".join(f"    {line}" for line in lines[-25:]), flush=True)
    return {"failed": lines[-1] if lines else f"status {process.returncode}"}


def _work(args: argparse.Namespace) -> int:
    """The process of one side."""
    import torch

    from benchmarks.gpt_cpu_sides import write_data
    from benchmarks.gpt_gpu_sides import run_side
    from benchmarks.gpt_overhead import Size

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "4")))
    place: Path = args.directory
    case = from_mapping(Case, json.loads((place / "case.json").read_text(encoding="utf-8")))
    size = Size(case.model, case.micro_batches, case.micro_batch_size)
    write_data(place / "data", size, steps=case.total_steps)
    figures = run_side(args.side, case, place / "data", place / "run")
    (place / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
