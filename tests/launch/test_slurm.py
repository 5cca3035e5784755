"""Jobs as they would be submitted: golden scripts for every cluster, and what is refused before Slurm is asked.

`make golden` writes the scripts anew; the commit that does so says why they changed.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.compose import options
from launch.slurm import check_job, show_job, submit_array
from launch.train import main
from steerscale.errors import SteerscaleError
from steerscale.jobs.script import ROOT, render_script
from steerscale.planning.cluster import load_cluster
from steerscale.train.config import LauncherConfig, RunConfig
from tests.launch.conftest import Refusal
from tests.train.runs import run_config

SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "sbatch"
RICH = {
    "account": "p_account",
    "qos": "long",
    "container": "--container-image=/images/torch.sqsh --container-mounts='/data sets:/data'",
    "setup": ["module load CUDA/12.4", "source /sites/environment.sh"],
    "environment": {"NCCL_SOCKET_IFNAME": "ib0", "GREETING": "it's #1"},
    "options": {"reservation": "course", "exclusive": ""},
    "requeue": False,
}


def job(
    cluster: str, *, run_dir: str = "/data/runs/gpt", tensor: int = 1, data: int = 1, **changes: object
) -> RunConfig:
    """A run on a cluster, the same on every machine."""
    base = run_config(
        Path("/data/corpus"), Path(run_dir), parallel={"tensor": tensor, "data": data, "global_batch_size": 16}
    )
    profile = replace(load_cluster(cluster), python="/opt/steerscale/bin/python", **changes)
    model = replace(base.model, num_heads=8)
    return replace(base, name="gpt", model=model, cluster=profile, launcher=LauncherConfig(name="slurm", dry_run=True))


JOBS = {
    **{name: [job(name, tensor=load_cluster(name).gpus_per_node, data=2)] for name in options("cluster")},
    "rich": [job("generic", tensor=2, **RICH)],
    "array": [job("testbed", run_dir=f"/data/my runs/{index}%") for index in range(3)],
}


def rendered(name: str) -> str:
    """The script of one of `JOBS`, wherever the project lies."""
    return render_script(JOBS[name], at_once=2 if name == "array" else None).replace(
        str(ROOT), "/opt/steerscale/project"
    )


@pytest.mark.parametrize("name", JOBS)
def test_golden_script(name: str) -> None:
    path, script = GOLDEN / f"{name}.sbatch", rendered(name)
    if os.environ.get("STEERSCALE_GOLDEN") == "write":
        path.write_text(script, encoding="utf-8")
    assert script == path.read_text(encoding="utf-8")


def test_every_golden_script_has_a_job() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(JOBS)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not here: make setup installs it")
@pytest.mark.parametrize("name", JOBS)
def test_script_is_clean(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(rendered(name), encoding="utf-8")
    answer = subprocess.run(
        [str(SHELLCHECK), "--exclude=SC1091", str(path)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout


def test_dry_run_shows_script_command_and_reasons(
    german_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    overrides = ["launcher=slurm", "launcher.dry_run=true", "cluster=alpha", "cluster.account=p_xyz", "model=125m"]
    overrides += [f"data.path={german_data}", "train.steps=9", "parallel.tensor=4", f"run_dir='{run_dir}'"]
    assert main([*overrides, "cluster.node_local_paths=[]", "model.seq_len=32"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#!/bin/bash\n#SBATCH --job-name=gpt\n#SBATCH --partition=alpha\n#SBATCH --account=p_xyz\n")
    assert f"# and submitted with: sbatch --parsable {run_dir}/slurm/job.sbatch" in shown
    assert "4 ranks (tensor 4 x pipeline 1 x data 1) at most cluster.gpus_per_node=8 to a node" in shown
    assert "495000M  <- cluster.memory: 4 of a node's 8 GPUs, so as much of its 990000M" in shown
    assert not run_dir.exists()


def test_every_option_of_the_script_has_a_reason() -> None:
    script, _, reasons = show_job(JOBS["rich"][0]).partition("# Nothing was submitted.")
    asked = [
        line.removeprefix("#SBATCH --").split("=")[0] for line in script.splitlines() if line.startswith("#SBATCH")
    ]
    told = [line.split()[1] for line in reasons.splitlines() if " <- " in line]
    assert [name for name in asked if name != "output"] == told


BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no cluster": ([], ("launcher=slurm needs a cluster", "cluster=NAME")),
    "unknown cluster": (["cluster=alfa"], ("no configs/cluster/alfa.yaml", "did you mean cluster=alpha?")),
    "unknown key": (["cluster=alpha", "cluster.acount=x"], ("unknown key 'cluster.acount'", "'account'")),
    "account": (["cluster=alpha"], ("alpha takes no job without an account", "cluster.account=")),
    "time": (
        ["cluster=testbed", "cluster.time=2:00:00"],
        ("cluster.time=2:00:00 is above the 01:00:00", "cluster.max_time"),
    ),
    "no time": (
        ["cluster=testbed", "cluster.time=soon"],
        ("cluster.time=soon is no time limit", "HOURS:MINUTES:SECONDS"),
    ),
    "lead": (
        ["cluster=testbed", "cluster.time=1"],
        ("cluster.signal_lead_seconds=60 must be below cluster.time=1 (60 s)",),
    ),
    "memory": (["cluster=testbed", "cluster.memory=4GiB"], ("cluster.memory=4GiB is no memory size",)),
    "device": (["cluster=testbed", "cluster.device=a100"], ("cluster.device=a100 is not known", "a100-sxm-40gb")),
    "partial nodes": (["cluster=testbed", "parallel.data=3"], ("3 ranks", "cluster.gpus_per_node=2", "= 2 or 4")),
    "node-local": (["cluster=generic", "run_dir=/tmp/run"], ("run_dir=/tmp/run is below /tmp", "all nodes share")),
    "backslash": (["cluster=testbed", "name='a\\b'"], ("a\\b: Slurm cannot write to a path with a backslash",)),
    "own option": (["cluster=testbed", "cluster.options.mem=4G"], ("--mem follows from other settings",)),
    "two lines": (["cluster=testbed", "cluster.qos='a\nb'"], ("cluster.qos", "one line only")),
    "environment": (["cluster=testbed", "cluster.environment.A-B=1"], ("'A-B' is no name of an environment variable",)),
    "local dry run": (["launcher=local"], ("launcher.dry_run=true shows a Slurm job",)),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_slurm_is_asked(case: str, refusal: Refusal, german_data: Path) -> None:
    overrides, words = BAD[case]
    base = [f"data.path={german_data}", "train.steps=9", "model.seq_len=32", "launcher=slurm", "launcher.dry_run=true"]
    error = refusal(*base, *overrides)
    assert all(word in error for word in words), error


def test_no_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SteerscaleError, match="sbatch was not found"):
        submit_array([job("testbed", run_dir=str(tmp_path / "run"))])
    assert list(tmp_path.iterdir()) == []


def test_runs_of_other_shapes_cannot_share_an_array() -> None:
    with pytest.raises(SteerscaleError, match=r"--ntasks-per-node=1 and --ntasks-per-node=2"):
        render_script([job("testbed"), job("testbed", tensor=2)])
    with pytest.raises(SteerscaleError, match="other keys of cluster"):
        render_script([job("testbed"), job("testbed", setup=["module load x"])])


def test_check_names_the_missing_account() -> None:
    with pytest.raises(SteerscaleError, match=r"cluster\.account"):
        check_job(job("juwels_booster"))
