import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, sys, time
start = time.process_time()
import steerscale.planning
for module in pkgutil.iter_modules(steerscale.planning.__path__, "steerscale.planning."):
    importlib.import_module(module.name)
    sys.stdout.write(module.name + " ")
seconds = time.process_time() - start
heavy = sorted({"torch", "numpy", "megatron", "hydra"} & set(sys.modules))
sys.stdout.write(f"\\n{heavy}\\n{seconds}")
"""


def test_planning_imports_neither_torch_nor_time() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    modules, heavy, seconds = result.stdout.splitlines()
    assert {f"steerscale.planning.{name}" for name in ("flops", "hardware", "memory", "throughput")} <= set(
        modules.split()
    )
    assert heavy == "[]"
    assert float(seconds) < 1  # of processor time: other users of the machine do not count
