"""Every GPU test and benchmark in one call, inside nine minutes: `python benchmarks/gpu_suite.py OUT_DIRECTORY`.

Each part runs in a process of its own with a share of the time; its output goes to OUT_DIRECTORY/NAME.log. A part that fails
or runs out of time does not stop the others. The last line is one JSON object; also in OUT_DIRECTORY/results.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "tests": (["-m", "pytest", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider"], 240),
    "gpt_overhead": (["benchmarks/gpt_overhead.py", "--device", "cuda"], 240),
}
"""Name -> (arguments of Python, seconds)."""


def run_part(arguments: list[str], seconds: int, log: Path) -> dict[str, object]:
    """Run one part; exit status, time, and the JSON object of its last line if it is one."""
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
    try:
        result["figures"] = json.loads(lines[-1])
    except (IndexError, ValueError):
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
