"""What a user waits for before an error: no torch in it."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from launch.train import main
status = main(sys.argv[1:])
heavy = sorted({"torch", "megatron", "transformers", "tensorboard", "datasets"} & set(sys.modules))
sys.stderr.write(f"{status} {heavy}\\n")
"""
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--cfg", "data.path={data}", "train.steps=3"], 0),
        (["data.path={data}", "train.steps=3", "parallel.tensor=3"], 2),
        (["-m", "data.path={data}", "train.steps=3", "seed=1,2", "parallel.tensor=3"], 2),
    ],
    ids=["cfg", "error", "sweep"],
)
def test_checking_needs_no_torch(arguments: list[str], status: int, german_data: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(argument.format(data=german_data) for argument in arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert result.stderr.splitlines()[-1] == f"{status} []"
    assert list(tmp_path.iterdir()) == []


def test_documentation_needs_no_torch() -> None:
    script = "import sys, launch.config_docs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=ROOT)


def test_a_reader_may_leave_early() -> None:
    command = [sys.executable, "-m", "launch.train", "--cfg"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.close()  # before it prints, as `| head` may do
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
