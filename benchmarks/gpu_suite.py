"""Every GPU test and benchmark in one call, inside nine minutes: `python benchmarks/gpu_suite.py OUT_DIRECTORY`.

Each part runs in a process of its own, within its limit and what is left of --seconds; its output goes to
OUT_DIRECTORY/NAME.log, the JSON that benchmarks end with into the results. A part that fails or runs out of time does not stop
the others; one for which no time is left is named. The last line is one JSON object; also in OUT_DIRECTORY/results.json.
--only runs some of the parts; one alone may take all of --seconds. benchmarks/gpt_gpu.py by itself measures all its cases, in
about half an hour; engines.py is not in here, its ranks speak gloo. Nobody has had a GPU for this yet.
"""

import sys
from pathlib import Path

# ruff: noqa: E402
# The repository instead of this folder, where a script named tokenize.py hides Python's module of that name.
ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import json
import os
import subprocess
import time

from benchmarks._common import environment, gpu_environment, show

CLI = ["-c", "import sys; from steerscale.cli import main; sys.exit(main())"]
TRAIN = [
    "parallel.micro_batch_size=8",
    "parallel.gradient_accumulation_steps=4",
    "engine.precision=bf16",
    "train.steps=40",
]
SAE = [
    "sae.hooks=[blocks.5.hook_resid_post]",
    "parallel.micro_batch_size=8192",
    "engine.precision=bf16",
    "train.steps=60",
    "optim.warmup_steps=10",
    "stream.buffer_vectors=131072",
]
PARTS = {
    "gpt_gpu": (
        ["benchmarks/gpt_gpu.py", "--sizes", "1.3b", "--seq", "2048", "--steps", "5", "--seconds", "SECONDS"],
        220,
    ),
    "tests": (["-m", "pytest", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider"], 200),
    "tokenizer": ([*CLI, "tokenizer", "train", "sample:german", "--vocab-size", "8192", "-o", "OUT/tokenizer"], 40),
    "data": ([*CLI, "data", "prepare", "sample:german", "--tokenizer", "OUT/tokenizer", "-o", "OUT/data"], 40),
    "train_125m": (["-m", "launch.train", "model=125m", "data.path=OUT/data", "run_dir=OUT/train_125m", *TRAIN], 90),
    "train_sae": (
        ["-m", "launch.train", "--config-name", "train_sae", "stream.lm=OUT/train_125m", "run_dir=OUT/sae", *SAE],
        90,
    ),
    "throughput_125m": ([*CLI, "dashboard", "OUT/train_125m", "OUT/sae"], 30),
    "sae_step": (["benchmarks/sae_step.py", "--widths", "768", "--latents", "65536", "--batch", "8192"], 60),
}
"""Name -> (arguments of Python, OUT standing for the output directory and SECONDS for its share; seconds at most)."""
SHORTEST = 10
"""Seconds below which a part is not begun."""


def run_part(arguments: list[str], seconds: float, log: Path) -> dict[str, object]:
    """Run one part; exit status, time, and the last line of its output, as JSON where it is that."""
    if seconds < SHORTEST:
        return {"status": f"not begun: {seconds:.0f} s left of --seconds"}
    share = str(int(seconds - 5))  # it ends by itself, before it is ended
    arguments = [
        argument.replace("OUT/", f"{log.parent.resolve()}/").replace("SECONDS", share) for argument in arguments
    ]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        try:
            status: int | str = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
    result: dict[str, object] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = lines[-1] if lines else ""
    try:
        result["result"] = json.loads(last)
    except json.JSONDecodeError:
        result["last_line"] = last
    return result


def main() -> int:
    """Run all parts; 0 if every one succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for logs and results.json")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run")
    parser.add_argument("--seconds", type=float, default=530, help="for everything")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {**environment("megatron-core", "transformers", "triton"), **gpu_environment()}
    show(found)
    results: dict[str, object] = {"environment": found}
    succeeded, begun = True, time.monotonic()
    for name in args.only:
        arguments, most = PARTS[name]
        left = args.seconds - (time.monotonic() - begun)
        seconds = left if args.only == [name] else min(most, left)
        print(f"{name} (up to {seconds:.0f} s) ...", flush=True)
        part = run_part(arguments, seconds, args.out / f"{name}.log")
        succeeded = succeeded and part["status"] == 0
        print(f"  {part}", flush=True)
        results[name] = part
    text = json.dumps(results)
    (args.out / "results.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
