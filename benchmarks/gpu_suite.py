"""Every GPU test and benchmark in one call, inside nine minutes: `python benchmarks/gpu_suite.py OUT_DIRECTORY`.

Each part runs in a process of its own with a share of the time; its output goes to OUT_DIRECTORY/NAME.log. A part that fails
or runs out of time does not stop the others. The last line is one JSON object; also in OUT_DIRECTORY/results.json.
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
    "tests": (["-m", "pytest", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider"], 240),
    "tokenizer": ([*CLI, "tokenizer", "train", "sample:german", "--vocab-size", "8192", "-o", "OUT/tokenizer"], 60),
    "data": ([*CLI, "data", "prepare", "sample:german", "--tokenizer", "OUT/tokenizer", "-o", "OUT/data"], 60),
    "train_125m": (["-m", "launch.train", "model=125m", "data.path=OUT/data", "run_dir=OUT/train_125m", *TRAIN], 120),
    "train_sae": (
        ["-m", "launch.train", "--config-name", "train_sae", "stream.lm=OUT/train_125m", "run_dir=OUT/sae", *SAE],
        90,
    ),
    "throughput_125m": ([*CLI, "dashboard", "OUT/train_125m", "OUT/sae"], 30),
}
"""Name -> (arguments of Python, OUT standing for the output directory; seconds)."""


def run_part(arguments: list[str], seconds: int, log: Path) -> dict[str, object]:
    """Run one part; exit status, time, and the last line of its output."""
    arguments = [argument.replace("OUT/", f"{log.parent.resolve()}/") for argument in arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        try:
            status: int | str = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds} s"
    result: dict[str, object] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    result["last_line"] = lines[-1] if lines else ""
    return result


def main() -> int:
    """Run all parts; 0 if every one succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for logs and results.json")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    results: dict[str, object] = {"device": device, "torch": torch.__version__}
    succeeded = True
    for name in args.only:
        arguments, seconds = PARTS[name]
        print(f"{name} (up to {seconds} s) ...", flush=True)
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
