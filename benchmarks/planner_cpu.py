"""The planner against real runs on this machine's CPU: peak memory in six layouts, and the order of a small sweep.

    python benchmarks/planner_cpu.py [--memory] [--sweep] [--steps 6] [--keep DIRECTORY]

Memory. Each layout is run twice, with a small model and with a larger one; a process on a CPU holds Python, torch and Gloo
beside what is planned, so the small run is the baseline and what the larger one needs more is compared: resident memory at
its peak on the fullest rank, from metrics.jsonl, against the difference of the two estimates.

Sweep. Five runs of one model calibrate the machine (`steerscale plan --calibrate`); a sweep of another model on two ranks is
then predicted and run. The question is where its fastest layout stands in the prediction. A step's time is the least of those
measured: others use this machine as well.

The last line is one JSON object.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import json
import lzma
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from benchmarks._common import against, print_environment
from steerscale.cli.calibration import read_measurement, this_cpu
from steerscale.data.prepare import PrepareConfig, prepare_dataset
from steerscale.data.sample import sample_corpus
from steerscale.metrics import read_records
from steerscale.planning.calibration import Measurement, calibrate, predicted_memory_gib, predicted_seconds
from steerscale.tokenizers.config import TokenizerConfig
from steerscale.tokenizers.registry import train_tokenizer

SHAPE = [
    "model.position=learned",
    "model.norm=layernorm",
    "model.activation=gelu",
    "model.bias=true",
    "model.d_ff=null",
]
LAYOUTS = {
    "DP1": [],
    "DP2": ["parallel.data=2"],
    "TP2": ["parallel.tensor=2"],
    "TP2+SP": ["parallel.tensor=2", "parallel.sequence=true"],
    "PP2": ["parallel.pipeline=2"],
    "PP2x2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "TP2 PP2": ["parallel.tensor=2", "parallel.pipeline=2"],
}
MEMORY_LAYOUTS = ("DP1", "DP2", "TP2", "PP2", "PP2x2", "TP2 PP2")
SWEEP_LAYOUTS = ("DP2", "TP2", "TP2+SP", "PP2", "PP2x2")


def width(d_model: int) -> list[str]:
    """Overrides of a model of this width: four layers, 256 tokens."""
    return [*SHAPE, "model.num_layers=4", f"model.d_model={d_model}", "model.num_heads=4", "model.seq_len=256"]


def batch(micro: int, whole: int, recompute: str = "none") -> list[str]:
    """Overrides of batch sizes."""
    return [
        f"parallel.micro_batch_size={micro}",
        f"parallel.global_batch_size={whole}",
        f"engine.recompute={recompute}",
    ]


MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc gives freed blocks back at once: else up to 32 MB of each stay in its heap, which is not what is to be measured."""


class Bench:
    """Runs in a directory, on one dataset."""

    def __init__(self, directory: Path, *, steps: int) -> None:
        self.directory, self.steps = directory, steps
        self.data = make_dataset(directory)

    def run(self, name: str, overrides: Sequence[str]) -> Path:
        """Run one after the other; the run directory. A run that is there already is not repeated."""
        run_dir = self.directory / name.replace(" ", "_")
        if read_records(run_dir, "train"):
            return run_dir
        command = [
            *(sys.executable, "-m", "launch.train"),
            *(f"name={run_dir.name}", f"run_dir={run_dir}", f"data.path={self.data}"),
            *(
                f"train.steps={self.steps}",
                "train.eval_interval=0",
                "checkpoint.interval=1000000",
                "optim.warmup_steps=0",
            ),
            *(
                "metrics.interval=1",
                "metrics.warmup_steps=1",
                "metrics.tensorboard=false",
                "launcher.threads_per_rank=1",
            ),
            *overrides,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **MALLOC}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"{name} failed:\n{result.stdout}\n{result.stderr}")
        return run_dir

    def measure(self, name: str, overrides: Sequence[str]) -> Measurement:
        """A run as a measurement, with the least of its step times."""
        run_dir = self.run(name, overrides)
        measured = read_measurement(run_dir, this_cpu())
        assert measured is not None
        fastest = min(
            record["seconds_per_step"] for record in read_records(run_dir, "train") if record["seconds_per_step"]
        )
        return replace(measured, name=name, seconds=fastest)


def make_dataset(directory: Path) -> Path:
    """1,200 lines of the German sample in 1,000 tokens."""
    if (directory / "data").is_dir():
        return directory / "data"
    with lzma.open(sample_corpus("german")[0], "rt", encoding="utf-8") as file:
        lines = list(islice(file, 1200))
    (directory / "text.txt").write_text("".join(lines), encoding="utf-8")
    (directory / "tokenizer").mkdir(exist_ok=True)
    train_tokenizer(TokenizerConfig(type="bpe", vocab_size=1000), lines).save(directory / "tokenizer")
    prepare_dataset(
        [str(directory / "text.txt")],
        tokenizer=directory / "tokenizer",
        output=directory / "data",
        config=PrepareConfig(split=[1.0, 0.0, 0.0]),
    )
    return directory / "data"


def memory(bench: Bench) -> dict[str, float]:
    """Print measured and predicted memory; their errors."""
    print(
        f"{'peak GiB, fullest':<20}{'baseline':>10}{'measured':>10}{'more':>8}{'predicted':>10}{'error':>8}{'of all':>8}"
    )
    errors, shares = [], []
    for name in MEMORY_LAYOUTS:
        small = bench.measure(f"{name} small", [*LAYOUTS[name], *width(32), *batch(2, 8)])
        large = bench.measure(f"{name} large", [*LAYOUTS[name], *width(640), *batch(8, 32)])
        assert small.memory_gib is not None
        assert large.memory_gib is not None
        more = large.memory_gib - small.memory_gib
        expected = predicted_memory_gib(large) - predicted_memory_gib(small)
        errors.append(expected / more - 1)
        shares.append((small.memory_gib + expected) / large.memory_gib - 1)
        print(
            f"{name:<20}{small.memory_gib:>10.3f}{large.memory_gib:>10.3f}{more:>8.3f}{expected:>10.3f}{errors[-1]:>+8.1%}"
            f"{shares[-1]:>+8.1%}"
        )
    return {**summarize("memory", errors), **summarize("memory_with_baseline", shares)}


def sweep(bench: Bench) -> dict[str, float]:
    """Calibrate, predict, run; print both orders."""
    runs = [
        bench.measure("calibration DP2 MBS1", [*LAYOUTS["DP2"], *width(256), *batch(1, 8)]),
        bench.measure("calibration DP2 MBS4", [*LAYOUTS["DP2"], *width(256), *batch(4, 8)]),
        bench.measure("calibration TP2 MBS2", [*LAYOUTS["TP2"], *width(256), *batch(2, 8)]),
        bench.measure("calibration PP2 MBS1", [*LAYOUTS["PP2"], *width(256), *batch(1, 8)]),
        bench.measure("calibration TP2 MBS4 full", [*LAYOUTS["TP2"], *width(256), *batch(4, 8, "full")]),
        bench.measure("calibration PP2 MBS4", [*LAYOUTS["PP2"], *width(256), *batch(4, 16)]),
    ]
    constants = ("matmul", "network", "layer_seconds", "collective_seconds")
    result = calibrate(this_cpu(), runs, constants=constants)
    print(f"\ncalibrated on {len(runs)} runs: mean error {result.mean_error:.1%}, largest {result.largest_error:.1%}")
    points = []
    for layout in SWEEP_LAYOUTS:
        for micro, recompute in ((1, "none"), (4, "none"), (4, "full")):
            name = f"{layout} MBS{micro} {recompute}"
            points.append(bench.measure(name, [*LAYOUTS[layout], *width(384), *batch(micro, 16, recompute)]))
    predicted = {point.name: predicted_seconds(result.machine, point) for point in points}
    order = sorted(predicted, key=predicted.__getitem__)
    errors = []
    print(f"{'sweep':<24}{'measured s':>12}{'predicted s':>12}{'error':>8}{'place':>8}{'predicted':>10}")
    for place, point in enumerate(sorted(points, key=lambda point: point.seconds), start=1):
        errors.append(predicted[point.name] / point.seconds - 1)
        print(
            f"{point.name:<24}{point.seconds:>12.3f}{predicted[point.name]:>12.3f}{errors[-1]:>+8.1%}{place:>8}"
            f"{order.index(point.name) + 1:>10}"
        )
    best = min(points, key=lambda point: point.seconds)
    return {"best_predicted_place": order.index(best.name) + 1, **summarize("sweep_time", errors)}


def summarize(name: str, errors: Sequence[float]) -> dict[str, float]:
    """Mean and largest absolute error."""
    absolute = [abs(error) for error in errors]
    return {f"{name}_mean": round(statistics.fmean(absolute), 4), f"{name}_max": round(max(absolute), 4)}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="only memory")
    parser.add_argument("--sweep", action="store_true", help="only the sweep")
    parser.add_argument(
        "--steps", type=int, default=6, help="of each run, the first one not timed (default: %(default)s)"
    )
    parser.add_argument("--keep", type=Path, help="directory for the runs; those that are there are not repeated")
    args = parser.parse_args()
    environment = print_environment("megatron-core")
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        bench = Bench(directory, steps=args.steps)
        summary: dict[str, float] = {}
        if args.memory or not args.sweep:
            summary |= memory(bench)
        if args.sweep or not args.memory:
            summary |= sweep(bench)
    if "memory_max" in summary:
        print(f"memory, largest error: {against(summary['memory_max'], 0.10, at_most=True)}")
    if "best_predicted_place" in summary:
        print(f"place of the fastest in the prediction: {against(summary['best_predicted_place'], 2, at_most=True)}")
    print(json.dumps({**summary, "environment": environment}))


if __name__ == "__main__":
    main()
